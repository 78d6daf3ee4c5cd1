"""Many result files to one page: a self-contained HTML file, and its tables as Markdown.

`result_files.py` reads, `sections.py` says what is shown, `plots.py` draws, `page.html.j2` lays out.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from persona.errors import DataError, MissingExtraError
from persona.evaluation.result_files import Result, load_results, without_seed

try:
    import jinja2

    from persona.evaluation.sections import Section, build_sections
except ImportError as error:
    raise MissingExtraError(f"the page cannot be made ({error}): pip install 'persona[eval]'") from error


def write_page(files: Sequence[str | Path], out: str | Path, markdown: str | Path | None = None) -> list[str]:
    """Writes the page of `files` to `out`, and its tables to `markdown`; returns the warnings that it shows.

    Raises `DataError` for a file that is no result, for two of one name that differ, and where it cannot write.
    """
    results = load_results(files)
    sections, missing = build_sections(results)
    content = {"sections": sections, "missing": missing, "warnings": _warnings(results)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    _write(out, environment.get_template("page.html.j2").render(results=results, **content))
    if markdown:
        _write(markdown, _markdown(**content))
    return content["warnings"]


def _warnings(results: Sequence[Result]) -> list[str]:
    """What a reader must know before comparing lines."""
    found: list[str] = []
    data: dict[str, list[str]] = {}
    unlike: dict[str, list[str]] = {}
    for r in results:
        data.setdefault(r.data["data_sha256"], []).append(r.name)
        if r.kind == "uqa" and r.group == r.name:
            unlike.setdefault(without_seed(r.name), []).append(r.name)
    if len(data) > 1:
        sets = "; ".join(f"{sha[:12]} ({', '.join(names)})" for sha, names in data.items())
        found.append(f"these results are of different data, so lines of one cannot be compared with another's: {sets}.")
    for names in unlike.values():
        if len(names) > 1:
            found.append(f"{', '.join(names)} are not taken for seeds of one run: data or configuration differ.")
    return found


def _markdown(sections: Sequence[Section], missing: Sequence[tuple[str, str]], warnings: Sequence[str]) -> str:
    lines = ["# Results", *(f"**Warning:** {_escape(w)}" for w in warnings)]
    for section in (s for s in sections if s.tables):
        lines += [f"## {section.title}", _escape(section.text)]
        for table in section.tables:
            head = [*map(_escape, table.head)] or [""] * len(table.rows[0])
            cells = [[_escape(f"{c.text} {c.interval}".strip()) for c in row] for row in table.rows]
            rows = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]
            lines += [*([f"**{_escape(table.caption)}**"] if table.caption else []), "\n".join(rows)]
    lines += [f"Not shown: {title} ({_escape(reason)})." for title, reason in missing]
    return "\n\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """Text that neither ends a cell of a Markdown table nor is read as HTML."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


def _write(path: str | Path, text: str) -> None:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from None
