"""The results page: real files in, one self-contained page out, and a sentence for every file that is none."""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from persona.errors import DataError
from persona.evaluation.page import write_page

TASKS = ("direct_feature", "next_item", "long_term_interest")
DIMENSIONS = ("sequence understanding", "action prediction", "interest perception")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def cell(acc, key="acc"):
    return {key: acc, "low": acc - 0.05, "high": acc + 0.05}


def row(acc, tokens=None, measures=(*TASKS, *DIMENSIONS, "mean")):
    cells = {measure: cell(acc) for measure in measures}
    return cells | ({"tokens": {"prompt": tokens, "user": tokens - 15.0}} if tokens else {})


def provenance(name, kind, seed=0, **more):
    return {
        "name": name,
        "kind": kind,
        "config": {"domain": "movies", "backbone": "sasrec", "encoder_parameters": 1_200_000, "run": {"seed": seed}},
        "n": {"users": 95, "cuts": 491, "answers": dict.fromkeys(TASKS, 300)},
        "versions": {"torch": "2.10"},
        "command": f"persona bench uqa movies.yaml --seed {seed}",
        "seed": seed,
        "git_hash": "9fd3cc1",
        "data_sha256": "3f2a" * 16,
        "date": "2026-11-25T18:00:00+00:00",
        **more,
    }


def uqa(name="sasrec-s0", seed=0, acc=0.5, **more):
    results = {f"soft_k{k}": row(acc + k / 100, 16.0 + k) for k in (1, 2, 4, 8)} | {"shuffled_user": row(0.31, 24.0)}
    paired = {
        "soft_k8 - shuffled_user": {"next_item": cell(0.2), "long_term_interest": cell(-0.2), "mean": cell(0.2)},
        "soft_k8 - learned_prompt": {"next_item": cell(0.01), "mean": cell(0.01)},
    }
    lengths = {str(n): row(acc + n / 1000) for n in (10, 25, 50)}
    return {**provenance(name, "uqa", seed), "results": results, "paired": paired, "lengths": lengths, **more}


def baselines(name="floors", **more):
    results = {
        "chance": row(0.25),
        "ease": row(0.41, measures=["next_item"]),
        "learned_prompt": row(0.32, 24.0),
        "no_history": row(0.3, 15.0),
        "text_128": row(0.4, 143.0),
        "text_256": row(0.45, 270.0),
        "text_full": row(0.6, 930.0),
        "retrieved_128": row(0.43, 140.0),
    }
    return {**provenance(name, "uqa-baselines"), "results": results, **more}


def ranking(name="quality"):
    results = {model: {"recall@10": cell(v, "value")} for model, v in (("sasrec", 0.123), ("popularity", 0.051))}
    return {**provenance(name, "ranking"), "results": results}


class Page(HTMLParser):
    """Text of the page, its tables as rows of cells, and every address that it would load or link to."""

    def __init__(self, source):
        super().__init__()
        self.source, self.text, self.rows, self.addresses, self.tags = source, "", [], [], []
        self.in_cell = False
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] = " ".join([*self.rows[-1][-1].split(), *data.split()])


@pytest.fixture
def page(tmp_path):
    """Writes results to files and gives the page made of them."""

    def make(*results, markdown=None):
        files = [tmp_path / f"{number}.json" for number in range(len(results))]
        for file, result in zip(files, results):
            file.write_text(result if isinstance(result, str) else json.dumps(result), encoding="utf-8")
        write_page(files, tmp_path / "report.html", markdown)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return make


def test_every_section_is_there_and_nothing_is_loaded_from_elsewhere(page):
    bigger = uqa("hstu-s0", acc=0.55)
    bigger["config"] |= {"backbone": "hstu", "encoder_parameters": 5_000_000}
    made = page(uqa(), uqa("sasrec-s1", 1, 0.52), bigger, baselines(), ranking())
    assert "Not on this page" not in made.text
    assert all(address.startswith(("#", "data:")) for address in made.addresses)
    assert not re.search(r"url\((?!#)|@import|<script|<link rel=.stylesheet", made.source)
    # The best K of a run, its control, and a floor that answers one sub-task only.
    assert ["sasrec-s0", "K = 8", *["0.580 [0.530, 0.630]"] * 4, "24"] in made.rows
    assert ["sasrec-s0", "shuffled user", *["0.310 [0.260, 0.360]"] * 4, "24"] in made.rows
    assert ["floors", "EASE (no LM)", "–", "–", "–", "–", "–"] in made.rows
    assert ["floors", "EASE (no LM)", "–", "0.410 [0.360, 0.460]", "–"] in made.rows
    assert ["sasrec", "0.123 [0.073, 0.173]"] in made.rows
    for label in ("mean prompt length (tokens)", "history (newest events)", "user encoder (parameters)", "5M", "930"):
        assert f">{label}</text>" in made.source
    for fact in ("persona bench uqa movies.yaml --seed 1", "9fd3cc1", "3f2a" * 16, "torch: 2.10", "2026-11-25T18:00"):
        assert fact in made.text


def test_an_interval_that_excludes_zero_is_marked_by_a_sign(page):
    rows = page(uqa()).rows
    assert [
        "sasrec-s0",
        "K = 8 minus shuffled user",
        "▲ +0.200 [+0.150, +0.250]",
        "▲ +0.200 [+0.150, +0.250]",
        "▼ -0.200 [-0.250, -0.150]",
    ] in rows
    other = next(r for r in rows if r[1:2] == ["K = 8 minus learned prompt"])
    assert other[2:] == ["+0.010 [-0.040, +0.060]", "+0.010 [-0.040, +0.060]", "–"]


def test_sections_without_data_are_left_out_with_a_reason(page):
    made = page(baselines())
    assert "Accuracy against history length: no file has accuracies at two lengths" in made.text
    assert "Pre-training: ranking quality: no file is of kind ranking" in made.text
    assert "<h2>Paired differences</h2>" not in made.source and "<h2>Headline</h2>" in made.source
    only_ranking = page(ranking())
    assert "<h2>Headline</h2>" not in only_ranking.source and "no file has accuracies" in only_ranking.text


def test_seeds_of_one_configuration_are_summarised(page):
    made = page(*(uqa(f"sasrec-s{seed}", seed, acc) for seed, acc in enumerate((0.5, 0.52, 0.54))))
    assert ["sasrec", "K = 8", "3", *["0.600 ± 0.020"] * 4] in made.rows
    other = uqa("sasrec-s1", 1)
    other["config"]["window"] = 20
    made = page(uqa(), other)
    assert "no two files are seeds of one run" in made.text
    assert "sasrec-s0, sasrec-s1 are not taken for seeds of one run" in made.text


def test_names_are_text_never_markup(page, tmp_path):
    evil = '<script>alert(1)</script> $x_1$ & "q" | \ud800'
    task = "<b>" + "a very long task name " * 200
    result = uqa(evil)
    for cells in (*result["results"].values(), *result["lengths"].values()):
        cells[task] = cell(0.4)
    made = page(result, baselines(), markdown=tmp_path / "report.md")
    assert "script" not in made.tags and "b" not in made.tags
    assert html.escape("<script>alert(1)</script>") in made.source
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in text and '&lt;script&gt;alert(1)&lt;/script&gt; $x_1$ &amp; "q" \\| ?' in text


def test_numbers_that_are_none_are_shown_as_such(page):
    result = uqa()
    result["results"]["soft_k8"]["mean"] = None
    result["results"]["shuffled_user"]["mean"] = {"acc": float("nan"), "low": None, "high": None}
    result["results"]["soft_k4"]["mean"] = {"acc": 0.7}
    rows = page(result, baselines()).rows
    assert next(r for r in rows if r[:2] == ["sasrec-s0", "K = 4"])[5] == "0.700"
    assert next(r for r in rows if r[:2] == ["sasrec-s0", "shuffled user"])[5] == "n/a"
    for cells in (*result["results"].values(), *result["lengths"].values()):
        cells.update(dict.fromkeys(cells.keys() - {"tokens"}))
    made = page(result)
    assert "the files hold no number for it" in made.text and not re.search(r"\bnan\b", made.source, re.I)


def test_results_of_different_data_are_shown_with_a_warning(page):
    assert "different data" not in page(uqa(), baselines()).text
    made = page(uqa(), baselines(data_sha256="9c1d" * 16))
    assert "different data" in made.text and "9c1d9c1d9c1d (floors)" in made.text


def test_the_same_file_twice_counts_once(page):
    assert page(uqa(), uqa()).source.count("K = 8 minus shuffled user") == 1


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "no result file"),
        (["{"], r"0\.json is not valid JSON"),
        (["[]"], "not an object"),
        ([{k: v for k, v in uqa().items() if k not in ("n", "git_hash")}], "lacks n, git_hash"),
        ([uqa(kind="serving")], "of kind 'serving'; the page shows uqa, uqa-baselines, ranking"),
        ([uqa(), uqa(acc=0.6)], r"0\.json and .*1\.json are both named 'sasrec-s0' but differ"),
        ([uqa(results={})], "has no results"),
        ([uqa(results={"soft_k1": {"mean": {"accuracy": 1}}})], "results.soft_k1.mean must be an object"),
        ([uqa(results={"soft_k1": {"mean": {"acc": "high"}}})], "'high' where a number should be"),
        ([uqa(results={"soft_k1": 3})], "results must be an object of objects"),
        ([uqa(lengths={"all": {}})], "lengths are numbers of events, not 'all'"),
    ],
)
def test_what_is_no_result_is_refused_in_a_sentence(page, results, message):
    with pytest.raises(DataError, match=message):
        page(*results)


def test_files_that_cannot_be_read_or_written_are_errors(page, tmp_path):
    with pytest.raises(DataError, match=r"none\.json does not exist"):
        write_page([tmp_path / "none.json"], tmp_path / "report.html")
    page(uqa())
    with pytest.raises(DataError, match="cannot be written"):
        write_page([tmp_path / "0.json"], tmp_path)


def test_the_verb_writes_both_files_and_its_errors_are_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(uqa()))
    done = run("bench", "report", "a.json", "--out", "out/report.html", "--markdown", "report.md")
    assert done.returncode == 0 and "wrote out/report.html and report.md" in done.stderr, done.stderr
    assert "| sasrec-s0 | K = 8 | 0.580 [0.530, 0.630] |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<svg" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    done = run("bench", "report", "b.json")
    assert done.returncode == 1 and done.stderr.startswith("persona: b.json does not exist")


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_names_the_extra(library):
    code = f"import sys; sys.modules[{library!r}] = None; import persona.evaluation.page"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingExtraError" in run.stderr and "persona[eval]" in run.stderr


LOOK = """
{frames}
<pre id="found">not loaded</pre>
<script>
window.onload = () => {{
  const found = [];
  let figures = 0;
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, excess = page.documentElement.scrollWidth - frame.clientWidth;
    if (excess > 0) found.push("the body is " + excess + " px wider than " + frame.clientWidth);
    for (const figure of page.querySelectorAll("svg")) {{
      figures += 1;
      const box = figure.getBoundingClientRect();
      const labels = [...figure.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
      labels.forEach(([name, a], i) => {{
        if (a.left < box.left - 1 || a.right > box.right + 1) found.push("cut off: " + name);
        for (const [other, b] of labels.slice(i + 1))
          if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
              Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2) found.push(name + " overlaps " + other);
      }});
    }}
  }}
  document.getElementById("found").textContent = found.join("; ") || figures + " figures are fine";
}};
</script>
"""
FRAME = '<iframe srcdoc="{page}" style="border: 0; width: {width}px; height: 900px"></iframe>'


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser_nothing_overflows_overlaps_or_complains(page, tmp_path):
    runs = [uqa(f"sasrec-with-a-rather-long-name-s{seed}", seed) for seed in (0, 1)]
    wide, chinese = uqa("W" * 300), uqa("用户最感兴趣的商品的标题是什么用户最感兴趣的商品" * 3)
    chinese["config"]["encoder_parameters"] = 1_250_000
    wide["results"]["soft_k8"]["t" * 3000] = cell(0.4)
    made = page(*runs, wide, chinese, baselines(), ranking())
    frames = "".join(FRAME.format(page=html.escape(made.source), width=width) for width in (360, 1280))
    look = tmp_path / "look.html"
    look.write_text(LOOK.format(frames=frames), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command = [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", look.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.S)
    assert found and re.fullmatch(r"[1-9]\d* figures are fine", found[1]), found and found[1][:2000]
    assert "CONSOLE" not in run.stderr
