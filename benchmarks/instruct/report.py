"""Writes the tables of benchmarks/instruct between their markers, and the curves beside the results.

python benchmarks/instruct/report.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from persona.evaluation.report import cell, replace_section

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DETAILS, README = ROOT / "benchmarks" / "README.md", ROOT / "README.md"
RUNS = ("demo", "movies")
VARIANTS = {
    "both": "LLM encoder, contrastive + answer loss",
    "contrastive": "LLM encoder, contrastive",
    "autoregressive": "LLM encoder, answer loss",
    "next_item": "LLM encoder, next item alone",
    "no_instruction": "LLM encoder, both, never given an instruction",
    "resampler": "resampler, contrastive + answer loss",
}
WAYS = {"llm": "answered by the LLM", "similarity": "nearest answer", "probe": "linear probe"}
KINDS = ("right", "empty", "wrong", "another user's")


def main() -> None:
    """All tables for which there are results."""
    for domain in RUNS:
        file = RESULTS / f"instruct-{domain}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        body = "\n\n".join(
            filter(None, (objectives(result), tasks(result), controls(result), paired(result), made(result)))
        )
        replace_section(DETAILS, f"instruct-{domain}", body)
        for name, table in (("noise", noise), ("sources", sources), ("matryoshka", matryoshka)):
            if domain == "demo" and name in result["results"]:
                replace_section(DETAILS, f"instruct-{name}", table(result))
        if "noise" in result["results"] and domain == "demo":
            plot(result, RESULTS / "instruct-noise.png")
        if domain == "demo":
            replace_section(
                README, "instruct-demo", "\n\n".join((objectives(result), controls(result, short=True), made(result)))
            )
    for name in ("instruct-hidden", "instruct-hidden-movies"):
        file = RESULTS / f"{name}.json"
        if file.exists():
            replace_section(DETAILS, name, hidden(json.loads(file.read_text(encoding="utf-8"))))
    cost = RESULTS / "instruct-cost.json"
    if cost.exists():
        replace_section(DETAILS, "instruct-cost", costs(json.loads(cost.read_text(encoding="utf-8"))))


def head(names: Sequence[str]) -> str:
    """The first two lines of a table."""
    return "| " + " | ".join(name.replace("_", " ") for name in names) + " |\n|" + "---|" * len(names)


def objectives(result: dict) -> str:
    """Mean accuracy over tasks by variant, way of reading it out, and instruction."""
    lines = [head(["trained by", "read out by", *(f"{k} instruction" if k in KINDS[:3] else k for k in KINDS)])]
    for name, title in VARIANTS.items():
        rows = result["results"].get(name, {})
        for way, said in WAYS.items():
            if f"{way}, right" in rows:
                cells = " | ".join(cell(rows.get(f"{way}, {kind}", {}).get("mean")) for kind in KINDS)
                lines.append(f"| {title} | {said} | {cells} |")
    return "\n".join(lines)


def tasks(result: dict) -> str:
    """Accuracy by task with the right and the empty instruction, of the encoder trained by both objectives."""
    names = result["config"]["tasks"]
    lines = [head(["both objectives", *names])]
    for way, said in WAYS.items():
        for kind in ("right", "empty"):
            row = result["results"].get("both", {}).get(f"{way}, {kind}")
            if row:
                lines.append(f"| {said}, {kind} | " + " | ".join(cell(row.get(n)) for n in names) + " |")
    return "\n".join(lines)


def controls(result: dict, *, short: bool = False) -> str:
    """What needs no user embedding, or no training; in `short` the mean alone. Empty where none was asked."""
    rows = result["results"].get("controls")
    if not rows:
        return ""
    names = ["mean"] if short else [*result["config"]["tasks"], "mean"]
    lines = [head(["control", *names])]
    for title, row in rows.items():
        lines.append(f"| {title} | " + " | ".join(cell(row.get(n)) for n in names) + " |")
    return "\n".join(lines)


def paired(result: dict) -> str:
    """Differences user by user."""
    lines = [head(["difference", "mean over tasks"])]
    for name, row in result["paired"].items():
        if not name.startswith("noise"):
            left, right = name.split(" - ")
            lines.append(f"| {left} minus {right} | {cell(row['mean'], signed=True)} |")
    return "\n".join(lines)


def made(result: dict) -> str:
    """How to get the result again."""
    n, config = result["n"], result["config"]
    answers = ", ".join(f"{count} {task}" for task, count in n["answers"].items())
    steps = {r["steps"] for r in result["training"].values()}
    untrained = "Of the next item alone the user positions learn nothing; what is read at them is the LM's. "
    untrained *= "next_item" in result["results"]
    return (
        f"Accuracy, mean over tasks and over {n['users']} users who took no part in training, with bootstrap 95% "
        f"intervals over users; {n['cuts']} cuts; answers: {answers}. A probe is fitted on {config['probe_users']} "
        f"training users and answers {', '.join(config['probed'])}. {', '.join(map(str, sorted(steps)))} steps of "
        f"training each, one seed, whose variance the intervals do not hold. {untrained}Made by `{result['command']}`."
    )


def noise(result: dict) -> str:
    """Accuracy by share of other users' events, and what the largest share costs."""
    rows = result["results"]["noise"]
    shares = list(dict.fromkeys(name.split(": ")[0] for name in rows))
    ways = list(dict.fromkeys(name.split(": ")[1] for name in rows))
    lines = [head(["", *(f"{share} foreign" for share in shares), f"{shares[-1]} minus 0%"])]
    for way in ways:
        cells = [cell(rows[f"{share}: {way}"]["mean"]) for share in shares]
        lost = result["paired"][f"noise: {shares[-1]}: {way} - noise: 0%: {way}"]["mean"]
        lines.append(f"| {way} | " + " | ".join(cells) + f" | {cell(lost, signed=True)} |")
    of = ", ".join(result["config"]["noise"])
    lines += [
        "",
        f"Mean over all tasks; of probes over {', '.join(result['config']['probed'])}. Mixed in are other users' "
        f"{of}, but for the source that is asked about.",
        "",
    ]
    lines += [head(["difference of the two differences to 0%", *(f"{share} noise" for share in shares[1:])])]
    for pair in dict.fromkeys(name.split(": ", 1)[1] for name in result["robustness"]):
        cells = [cell(result["robustness"][f"{share}: {pair}"], signed=True) for share in shares[1:]]
        lines.append(f"| {pair.replace(' - ', ' minus ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sources(result: dict) -> str:
    """Accuracy with sources added one by one, and with each left out."""
    rows, names = result["results"]["sources"], result["config"]["tasks"]
    lines = [head(["sources", "read out by", *names, "mean"])]
    for name, row in rows.items():
        way, title = name.split(", ")
        cells = " | ".join(cell(row.get(n))[:5] for n in names)
        lines.append(f"| {title} | {WAYS[way]} | {cells} | {cell(row['mean'])} |")
    return "\n".join(lines)


def matryoshka(result: dict) -> str:
    """Accuracy by tokens and dimensions."""
    rows = result["results"]["matryoshka"]
    dims = list(dict.fromkeys(name.split(" x ")[1] for name in rows))
    lines = [head(["tokens", *(f"{d} dimensions" for d in dims)])]
    for tokens in dict.fromkeys(name.split(" x ")[0] for name in rows):
        lines.append(f"| {tokens} | " + " | ".join(cell(rows[f"{tokens} x {d}"]["mean"]) for d in dims) + " |")
    return "\n".join(lines)


def hidden(result: dict) -> str:
    """AUC and KS of linear probes, and look-alikes, by attribute."""
    targets = result["config"]["targets"]
    lines = [head(["embedding", *(f"{t}: AUC, KS, look-alike AUC" for t in targets)])]
    for name, row in result["results"].items():
        cells = []
        for target in targets:
            auc, ks = row[target]["auc"], row[target]["ks"]
            told = f"{auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}], {ks['value']:.2f}"
            cells.append(f"{told}, {row[target]['look_alike_auc']:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    n = result["n"]
    lines += ["", f"{n['train']} training users, {n['test']} test users. Made by `{result['command']}`."]
    return "\n".join(lines)


def costs(result: dict) -> str:
    """Milliseconds by length, and pairs a second."""
    ways = ("from scratch", "new instruction", "event appended")
    lines = [
        head(["encoder", "events", *(f"{way}, ms" for way in ways), *(f"scratch / {w}" for w in ways[1:]), "state"])
    ]
    for length, encoders in result["results"]["lengths"].items():
        for name, row in encoders.items():
            cells = [f"{row[way]:.1f}" for way in ways] + [f"{row[f'from scratch / {way}']:.1f}" for way in ways[1:]]
            lines.append(f"| {name} | {length} | " + " | ".join(cells) + f" | {row['state_bytes'] / 1024:,.0f} KiB |")
    lines += ["", head(["gradient caching", "pairs a second", "memory of a step"])]
    for name, row in result["results"]["training"].items():
        chunk = name.split()[1]
        title = "none" if chunk == "0" else f"{chunk} histories at a time"
        lines.append(f"| {title} | {row['pairs_per_s']} | {row['step_mib']:,} MiB |")
    config = result["config"]
    lines += [
        "",
        f"Medians of {config['rounds']} rounds on {config['threads']} thread; the encoder's LLM has "
        f"{config['llm_parameters']:,} parameters; batches of {config['pairs']} pairs. Made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def plot(result: dict, file: Path) -> None:
    """Curves of accuracy by share of other users' events, one panel for each way of reading an embedding."""
    rows = result["results"]["noise"]
    shares = list(dict.fromkeys(name.split(": ")[0] for name in rows))
    x = [float(share.rstrip("%")) for share in shares]
    panels = {
        "Linear probe": (
            "probe, right",
            "probe, empty",
            "probe of mean text embeddings",
            "probe of mean text embeddings, fitted on noise",
        ),
        "Answered by the LLM": ("llm, right", "llm, empty", "text in the prompt"),
        "Nearest answer": ("similarity, right", "similarity, empty"),
    }
    names = {"right": "right instruction", "empty": "empty instruction"}
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (title, ways) in zip(figure.subplots(1, len(panels), sharey=True), panels.items()):
        for way, marker in zip(ways, "os^v"):
            own = [rows[f"{share}: {way}"]["mean"] for share in shares]
            error = [[r["acc"] - r["low"] for r in own], [r["high"] - r["acc"] for r in own]]
            label = names.get(way.rsplit(", ", 1)[-1], way.removeprefix("probe of "))
            axes.errorbar(x, [r["acc"] for r in own], yerr=error, marker=marker, capsize=2, label=label)
        axes.set_title(title)
        axes.set_xlabel("other users' events, % of the history")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("accuracy, mean over tasks")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
