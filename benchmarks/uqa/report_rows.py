"""Pieces of Markdown that the tables of the UQA runs share."""

from __future__ import annotations


def head(names: list[str]) -> str:
    """The first two lines of a table."""
    return "| " + " | ".join(name.replace("_", " ") for name in names) + " |\n|" + "---|" * len(names)


def commands(results: list[dict]) -> str:
    """The commands that made some results, each once, behind a line to unfold."""
    block = "\n".join(dict.fromkeys(r["command"] for r in results))
    return f"<details><summary>The commands that made it</summary>\n\n```bash\n{block}\n```\n\n</details>"
