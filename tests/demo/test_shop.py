"""The generated shop: same seed same bytes, the promised counts, and tastes that a history gives away."""

import csv
import json
import re
import time
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from persona.demo import shop
from persona.errors import PersonaError
from persona.history import ReaderSpec, SourceSpec, read_histories
from persona.history.render import render_event

RECIPE = Path(__file__).parents[2] / "adapters" / "demo" / "recipe.yaml"
USERS = 400
SOURCES = ["purchase", "visit", "page", "app", "search", "profile"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shop.generate_shop(tmp_path_factory.mktemp("shop"), users=USERS, seed=0)


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def times(folder):
    """Source to user to times in seconds, read with the standard library only."""
    raw = {
        "purchase": [
            (r["user"], datetime.fromisoformat(r["time"] + "+00:00")) for r in table(folder / "purchases.csv")
        ],
        "page": [
            (r["user"], datetime.strptime(r["viewed"] + " +0000", "%d/%m/%Y %H:%M:%S %z"))
            for r in table(folder / "pages.tsv")
        ],
        "search": [(r["user"], datetime.fromisoformat(r["time"])) for r in table(folder / "searches.csv")],
    }
    seconds = {source: [(user, moment.timestamp()) for user, moment in rows] for source, rows in raw.items()}
    seconds["visit"] = [(r["user"], r["at"]) for r in lines(folder / "visits.jsonl")]
    seconds["app"] = [(r["user"], r["opened_ms"] / 1000) for r in lines(folder / "apps.jsonl")]
    grouped = {source: defaultdict(list) for source in seconds}
    for source, rows in seconds.items():
        for user, second in rows:
            grouped[source][user].append(second)
    return grouped


@pytest.fixture(scope="module")
def purchases(folder):
    """User to (time, category, price band) of each purchase, oldest first."""
    catalogue = {r["sku"]: r for r in table(folder / "catalogue.csv")}
    band = {str(price): name for name, prices in shop.BANDS.items() for price in prices}
    found = defaultdict(list)
    for row in table(folder / "purchases.csv"):
        item = catalogue[row["sku"]]
        assert row["paid"] == item["price"]
        when = datetime.fromisoformat(row["time"] + "+00:00").timestamp()
        found[row["user"]].append((when, item["category"], band[item["price"]]))
    return {user: sorted(rows) for user, rows in found.items()}


@pytest.fixture(scope="module")
def truth(folder):
    return {row["user"]: row for row in lines(folder / "truth.jsonl")}


def main(weights):
    return max(weights, key=weights.get)


def test_same_seed_same_bytes_another_seed_other_users(tmp_path):
    first, again, other = (
        contents(shop.generate_shop(tmp_path / name, users=30, seed=seed))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first == again
    assert {name for name in first if first[name] == other[name]} == {"catalogue.csv"}


def test_a_user_is_the_same_person_in_a_larger_shop(tmp_path):
    small, large = (shop.generate_shop(tmp_path / str(n), users=n, seed=1) for n in (5, 9))
    mine = [r for r in table(large / "purchases.csv") if r["user"] <= "u00004"]
    assert table(small / "purchases.csv") == mine
    assert table(small / "profile.csv") == table(large / "profile.csv")[:5]


def test_a_shop_without_users_is_refused(tmp_path):
    with pytest.raises(PersonaError, match="users is 0"):
        shop.generate_shop(tmp_path, users=0)


def test_the_catalogue_has_unique_two_word_names_and_clear_price_levels(folder):
    catalogue = table(folder / "catalogue.csv")
    assert Counter(r["category"] for r in catalogue) == dict.fromkeys(shop.CATEGORIES, 15)
    assert len({r["name"] for r in catalogue}) == len({r["sku"] for r in catalogue}) == 120
    assert all(re.fullmatch(r"[a-z]+ [a-z]+", r["name"]) for r in catalogue)
    assert max(shop.BANDS["budget"]) * 2 < min(shop.BANDS["mid"])
    assert max(shop.BANDS["mid"]) * 2 < min(shop.BANDS["premium"])


def test_every_user_has_every_source_in_the_promised_numbers(folder, times):
    users = {f"u{n:05d}" for n in range(USERS)}
    assert [r["user"] for r in table(folder / "profile.csv")] == sorted(users)
    assert set(times) == set(SOURCES) - {"profile"}
    for source in times:
        assert set(times[source]) == users
        assert min(len(seconds) for seconds in times[source].values()) >= 2
    bought = [len(times["purchase"][user]) for user in users]
    assert (min(bought), max(bought)) == (12, 40)
    total = [sum(len(times[source][user]) for source in times) for user in users]
    assert min(total) >= 35 and max(total) <= 90


def test_times_lie_in_the_period_and_few_are_tied(times):
    start = shop.START.timestamp()
    tied = total = 0
    for user in times["purchase"]:
        seconds = [second for source in times for second in times[source][user]]
        assert start <= min(seconds) and max(seconds) < start + shop.DAYS * 86400
        tied += len(seconds) - len(set(seconds))
        total += len(seconds)
    assert 0.01 < tied / total < 0.05


def test_half_of_the_users_change_their_main_category(truth):
    changed = {user for user, row in truth.items() if row["changed_at"] is not None}
    assert 0.4 < len(changed) / USERS < 0.6
    for user, row in truth.items():
        assert (main(row["early"]) != main(row["late"])) == (user in changed)
        assert sum(row["early"].values()) == pytest.approx(1)
        assert sum(sorted(row["late"].values())[-2:]) > 0.9


def test_purchases_follow_the_present_taste_and_the_price_band(purchases, truth):
    now, before, band = [], [], []
    for user, rows in purchases.items():
        row = truth[user]
        for when, category, level in rows:
            late = row["changed_at"] is not None and when >= row["changed_at"]
            now.append(category == main(row["late" if late else "early"]))
            band.append(level == row["band"])
            if late:
                before.append(category == main(row["early"]))
    # By chance: 1/8 of the categories, 1/3 of the bands. Expected: 0.75 * (0.9 or 0.66) + noise, 0.75 * 0.8 + noise.
    assert 0.55 < np.mean(now) < 0.7
    assert np.mean(before) < 0.25
    assert 0.62 < np.mean(band) < 0.75


def test_browsing_follows_the_taste_with_noise_and_apps_do_not(folder, truth):
    steady = {user: main(row["early"]) for user, row in truth.items() if row["changed_at"] is None}
    paths = [(r["user"], r["path"].split(" > ")[1]) for r in table(folder / "pages.tsv")]
    visits = [(r["user"], r["department"]) for r in lines(folder / "visits.jsonl")]
    for rows in (paths, visits):
        share = np.mean([topic == steady[user] for user, topic in rows if user in steady])
        assert 0.4 < share < 0.6
    apps = [(r["user"], r["app"]) for r in lines(folder / "apps.jsonl")]
    assert 0.4 < np.mean([app == truth[user]["app"] for user, app in apps]) < 0.6
    by_taste = {c: Counter(app for user, app in apps if steady.get(user) == c) for c in shop.CATEGORIES}
    assert all(max(count.values()) / count.total() < 0.35 for count in by_taste.values())


def test_age_is_weakly_tied_to_the_taste(folder, truth):
    rows = table(folder / "profile.csv")
    age = np.array([int(r["age"]) for r in rows])
    usual = np.array([shop.MEAN_AGE[main(truth[r["user"]]["early"])] for r in rows])
    assert age.min() >= 18 and age.max() <= 85
    assert 0.3 < np.corrcoef(age, usual)[0, 1] < 0.7


def test_few_words_and_a_few_of_them_foreign(folder):
    written = [r["name"] + " " + r["category"] for r in table(folder / "catalogue.csv")]
    written += [r["department"] for r in lines(folder / "visits.jsonl")]
    written += [r["app"] for r in lines(folder / "apps.jsonl")]
    written += [f"{r['age']} {r['city']} {r['tier']}" for r in table(folder / "profile.csv")]
    browsed = [r["path"] for r in table(folder / "pages.tsv")] + [r["query"] for r in table(folder / "searches.csv")]
    words = {word for text in written + browsed for word in text.lower().split() if not word.isdigit()}
    assert 200 < len(words) < 400
    assert 0.02 < np.mean([not text.isascii() for text in browsed]) < 0.06


def test_the_whole_shop_takes_seconds(tmp_path):
    start = time.process_time()
    shop.generate_shop(tmp_path)
    assert time.process_time() - start < 5


@pytest.fixture(scope="module")
def recipe():
    """The recipe's sources and readers."""
    raw = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    sources = TypeAdapter(dict[str, SourceSpec]).validate_python(raw["sources"])
    return sources, TypeAdapter(list[ReaderSpec]).validate_python(raw["readers"])


def test_the_recipe_names_the_six_sources_and_never_the_truth(recipe):
    sources, readers = recipe
    assert list(sources) == [r.source for r in readers] == SOURCES
    assert not any("truth" in r.path for r in readers)


def test_the_recipe_reads_every_row_of_the_shop(recipe, folder, times, purchases):
    sources, readers = recipe
    histories, report = read_histories(readers, folder, strict=True)
    assert not report.bad
    assert sorted(histories) == sorted(purchases)
    for user, history in histories.items():
        read = {source: [e for e in history.events if e.source == source] for source in sources}
        for source in times:
            assert [e.timestamp for e in read[source]] == sorted(times[source][user])
            assert all(e.text for e in read[source])
        bought = sorted((e.timestamp, e.attributes["category"]) for e in read["purchase"])
        assert bought == sorted(row[:2] for row in purchases[user])
        assert len(read["profile"]) == 1 and read["profile"][0].timestamp is None


def test_lines_are_short(recipe, folder):
    sources, readers = recipe
    histories, _ = read_histories(readers, folder)
    written = [render_event(e, sources[e.source]) for history in histories.values() for e in history.events]
    assert all(re.match(r"(bought|visited|page|app|searched|age \d\d) \S", line) for line in written)
    assert max(len(line.split()) for line in written) <= 6
