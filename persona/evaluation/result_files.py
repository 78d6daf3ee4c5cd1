"""Reading result files for the page: what they must hold, what may be missing, and which are seeds of one run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from persona.errors import DataError

KINDS = ("uqa", "uqa-baselines", "ranking")
KEYS = ("kind", "results", "config", "n", "command", "seed", "git_hash", "data_sha256", "versions", "date")


class Value(NamedTuple):
    """A number with its interval; NaN where it is not known."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0; False where it is not known."""
        return self.low > 0 or self.high < 0


@dataclass
class Result:
    """One result file. `rows` has accuracies by row and measure: a sub-task, a dimension or "mean"."""

    file: str
    data: dict
    name: str
    group: str = ""
    """The name without its seed where several seeds of one run are given, else the name."""
    rows: dict[str, dict[str, Value]] = field(default_factory=dict)
    paired: dict[str, dict[str, Value]] = field(default_factory=dict)
    lengths: dict[int, dict[str, Value]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.data["kind"]

    def prompt_tokens(self, row: str) -> float | None:
        """Mean length of the prompt in tokens, if the file says."""
        tokens = self.data["results"][row].get("tokens")
        return _positive(tokens.get("prompt")) if isinstance(tokens, dict) else None

    def size(self, key: str) -> float | None:
        """A number of parameters of the configuration, if the file says."""
        return _positive(self.data["config"].get(key))

    @property
    def ours(self) -> dict[int, str]:
        """Our rows, by the number K of embeddings."""
        return dict(sorted((int(m[1]), row) for row in self.rows if (m := re.fullmatch(r"soft_k([1-9]\d*)", row))))

    @property
    def best(self) -> str | None:
        """Our row of the best mean; the one with most embeddings where no mean is known."""
        order = {row: (_mean(self.rows[row]), k) for k, row in self.ours.items()}
        return max(order, key=order.get, default=None)


def load_results(files: Sequence[str | Path]) -> list[Result]:
    """The results in the order given, each once.

    Raises `DataError` without a file, for a file that is no result, and for two of one name that differ.
    """
    if not files:
        raise DataError("no result file given; `persona bench uqa` makes one")
    results: dict[tuple[str, str], Result] = {}
    for file in files:
        result = _load(Path(file))
        other = results.setdefault((result.kind, result.name), result)
        if json.dumps(other.data, sort_keys=True) != json.dumps(result.data, sort_keys=True):
            raise DataError(
                f"{other.file} and {result.file} are both named {result.name!r:.80} but differ; rename one of them"
            )
    alike: dict[str, list[Result]] = {}
    for result in results.values():
        result.group = result.name
        if result.kind == "uqa":
            alike.setdefault(without_seed(result.name), []).append(result)
    for name, seeds in alike.items():
        if len({_settings(result) for result in seeds}) == 1 < len(seeds):
            for result in seeds:
                result.group = name
    return list(results.values())


def _load(path: Path) -> Result:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; make it with `persona bench uqa`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} is not a result: its JSON is a {type(data).__name__}, not an object")
    if absent := [key for key in KEYS if key not in data]:
        raise DataError(f"{path} is not a result of `persona bench uqa`: it lacks {', '.join(absent)}")
    if data["kind"] not in KINDS:
        raise DataError(f"{path} is of kind {data['kind']!r:.60}; the page shows {', '.join(KINDS)}")
    if not isinstance(data["config"], dict) or not isinstance(data["data_sha256"], str):
        raise DataError(f"{path}: config must be an object and data_sha256 a string")
    result = Result(str(path), data, str(data.get("name", path.stem)))
    number = "value" if result.kind == "ranking" else "acc"
    result.rows = _values(path, data, "results", number)
    if not result.rows:
        raise DataError(f"{path} has no results")
    if result.kind == "uqa":
        result.paired = _values(path, data, "paired", number)
        lengths = _values(path, data, "lengths", number)
        if wrong := [key for key in lengths if not re.fullmatch(r"[1-9]\d{0,8}", key)]:
            raise DataError(f"{path}: lengths are numbers of events, not {wrong[0]!r:.60}")
        result.lengths = {int(key): lengths[key] for key in sorted(lengths, key=int)}
    return result


def _values(path: Path, data: dict, key: str, number: str) -> dict[str, dict[str, Value]]:
    """A table of a file: rows of cells of a number with its interval."""
    table = data.get(key) or {}
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise DataError(f"{path}: {key} must be an object of objects")
    return {
        row: {m: _value(f"{path}: {key}.{row}.{m}", cell, number) for m, cell in cells.items() if m != "tokens"}
        for row, cells in table.items()
    }


def _value(where: str, cell: object, number: str) -> Value:
    """null, NaN and infinity become NaN, which the page shows as n/a."""
    cell = {number: None} if cell is None else cell
    if not isinstance(cell, dict) or number not in cell:
        raise DataError(f'{where} must be an object with "{number}", "low" and "high", not {cell!r:.60}')
    numbers = [cell[number], cell.get("low"), cell.get("high")]
    if wrong := [n for n in numbers if n is not None and (isinstance(n, bool) or not isinstance(n, int | float))]:
        raise DataError(f"{where} has {wrong[0]!r:.60} where a number should be")
    return Value(*(float(n) if n is not None and math.isfinite(n) else math.nan for n in numbers))


def without_seed(text: str) -> str:
    """The text without the -s0, -s1, ... at the end of a name or a path in it."""
    return re.sub(r"-s\d+\b", "", text)


def _settings(result: Result) -> str:
    """All that seeds of one run share: their data, and their configuration apart from the seed and its name."""
    config = _seedless(result.data["config"])
    if isinstance(config.get("run"), dict):  # before there was another, files did not say so
        config["run"] = {"injection": "soft_prompt", **config["run"]}
    return without_seed(json.dumps([result.data["data_sha256"], config], sort_keys=True))


def _seedless(value: object) -> object:
    """A configuration without its seeds, at whatever depth they stand."""
    if isinstance(value, list):
        return [_seedless(item) for item in value]
    if isinstance(value, dict):
        return {key: _seedless(item) for key, item in value.items() if not key.endswith("seed")}
    return value


def _positive(number: object) -> float | None:
    return number if isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 1e18 else None


def _mean(row: dict[str, Value]) -> float:
    """A row's mean for ordering; below every real one where it is not known."""
    value = row.get("mean", Value(math.nan)).value
    return -1.0 if math.isnan(value) else value
