"""A generated shop: six raw files about made-up users whose tastes are known, and sometimes change.

Each file has another raw structure (CSV with a catalogue to join, JSON lines, TSV, tabular; five ways to write a
time), as raw records have in practice. `adapters/demo/recipe.yaml` reads them. The shop itself is fixed; a seed only
draws its users.

What can be learnt from a history: purchases follow the user's present category and price band; visits, pages and
searches follow the category too, with more noise; the age does so weakly. Apps, city and tier say nothing about what
is bought.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np

from persona.errors import PersonaError

ITEMS = {
    "garden": """clay pot, tulip bulb, fern seed, moss bag, hose clip,
        rose bush, steel spade, herb planter, lawn rake, hedge shears,
        cedar bench, patio heater, robot mower, glass greenhouse, stone fountain""",
    "music": """guitar pick, drum stick, tuning fork, reed pack, cotton strap,
        bamboo flute, desk microphone, blues harmonica, folk ukulele, vinyl record,
        jazz saxophone, oak violin, bass amplifier, stage keyboard, silver trumpet""",
    "cooking": """wooden spoon, pepper mill, egg timer, lemon grater, cake tin,
        iron skillet, chef knife, soup kettle, pasta roller, wok set,
        espresso machine, copper pan, pizza oven, marble mixer, smoke grill""",
    "sport": """tennis ball, jump rope, sweat band, swim cap, yoga block,
        running shoes, hockey stick, boxing gloves, climbing harness, golf putter,
        carbon bike, rowing machine, ski set, surf board, incline treadmill""",
    "travel": """neck pillow, luggage tag, sleep mask, passport cover, city map,
        day backpack, rain poncho, trail tent, folding umbrella, beach hammock,
        leather suitcase, roof carrier, satellite phone, inflatable kayak, alpine parka""",
    "books": """pocket poems, crime novel, word puzzle, comic strip, ghost story,
        history atlas, space encyclopedia, spanish dictionary, painter biography, science manual,
        signed classic, reading tablet, antique manuscript, collector edition, velvet almanac""",
    "toys": """rubber duck, paper kite, bubble wand, glass marbles, spinning top,
        teddy bear, train track, doll house, puppet theatre, magic kit,
        drone racer, rocking horse, brick castle, electric kart, chess robot""",
    "pets": """cat collar, squeaky bone, fish flakes, bird bell, dog leash,
        hamster wheel, scratching post, rabbit hutch, puppy bed, parrot perch,
        coral aquarium, heated kennel, horse saddle, turtle terrarium, camera feeder""",
}
"""Category to its 15 items: a row of five for each price band, cheapest band first, most wanted item of a row first."""

GROUPS = {
    "garden": ("roses", "tools", "lawn"),
    "music": ("strings", "drums", "records"),
    "cooking": ("knives", "pans", "baking"),
    "sport": ("fitness", "racket", "cycling"),
    "travel": ("bags", "camping", "maps"),
    "books": ("novels", "atlases", "poems"),
    "toys": ("puzzles", "dolls", "kites"),
    "pets": ("dogs", "cats", "fish"),
}
"""Category to its groups, the words of page paths and searches."""

FOREIGN = {
    "garden": ("🌹", "バラ"),
    "music": ("🎸", "музыка"),
    "cooking": ("🍳", "кухня"),
    "sport": ("⚽", "спорт"),
    "travel": ("🧳", "旅行"),
    "books": ("📚", "книги"),
    "toys": ("🧸", "игрушки"),
    "pets": ("🐶", "ペット"),
}
"""Category to what sometimes stands in for a group: an emoji or a word in another script."""

CATEGORIES = tuple(ITEMS)
BANDS = {"budget": (4, 7, 9, 12, 14), "mid": (29, 35, 42, 49, 58), "premium": (120, 150, 190, 240, 300)}
"""Price band to the prices of its five items."""

OTHER_DEPARTMENTS = ("checkout", "cafe", "parking")
OTHER_PAGES = ("account > orders", "account > address", "help > contact", "help > returns", "deals > today")
OTHER_SEARCHES = ("opening hours", "gift card", "order status", "lost parcel")
SEARCH_FORMS = ("{}", "best {}", "cheap {}", "new {}")
APPS = ("mail", "chat", "weather", "news", "bank", "photos", "calendar", "notes", "video", "radio", "taxi", "wallet")
CITIES = ("Oslo", "Lyon", "Porto", "Ghent", "Turin", "Leeds", "Graz", "Malmo")
TIERS = ("basic", "silver", "gold")
MEAN_AGE = dict(zip(CATEGORIES, (54, 30, 46, 28, 38, 50, 34, 42)))

START = datetime(2025, 1, 6, tzinfo=UTC)
DAYS = 90
SEARCH_ZONE = timezone(timedelta(hours=2))
"""The search log writes local time with its offset; the others write UTC."""

PURCHASES = (12, 40)
BROWSING = (23, 50)
"""Fewest and most events per user: purchases; visits, pages, apps and searches together."""
BROWSING_SHARES = {"visit": 0.2, "page": 0.35, "app": 0.25, "search": 0.2}
FEWEST_PER_SOURCE = 2

DRIFT = 0.5
"""Share of the users who change their main category once, between 20% and 80% of the period."""
TASTE_IN_PURCHASES, TASTE_IN_BROWSING = 0.75, 0.6
"""Share of the events that follow the taste; the others are noise."""
PREFERRED_BAND = 0.8
WANTED = np.array([0.36, 0.26, 0.18, 0.12, 0.08])
"""How often each of the five items of a category and band is taken, once these two are settled."""
FAVOURITE_APP = 0.4
FOREIGN_SHARE = 0.05
TIES = 0.04
"""Share of browsing events that happen at the very second of one of the user's purchases."""

ITEM_COUNT = sum(len(row.split(",")) for row in ITEMS.values())
POPULARITY = 1 / (5 + np.arange(ITEM_COUNT) * 37 % ITEM_COUNT)
"""Weight of each item in the purchases that follow no taste; 37 scatters the popular ones over categories and bands."""


@dataclass(frozen=True)
class Taste:
    """What a user likes. Hidden: it is only written to `truth.jsonl`."""

    early: np.ndarray
    """Weight of each category before the change, [8], sums to 1."""
    late: np.ndarray
    """The same after the change; equal to `early` for a user who never changes."""
    changed_at: int | None
    """Second of the period at which the taste changes."""
    band: int
    """Preferred price band, an index into `BANDS`; it never changes."""
    app: int
    """Favourite app, an index into `APPS`."""

    def categories(self, rng: np.random.Generator, seconds: np.ndarray) -> np.ndarray:
        """One category per time, `[N]` to `[N]`, drawn from the taste of that time."""
        late = seconds >= (np.inf if self.changed_at is None else self.changed_at)
        return np.where(late, _draw(rng, self.late, len(seconds)), _draw(rng, self.early, len(seconds)))


def generate_shop(folder: str | Path, users: int = 1500, seed: int = 0) -> Path:
    """Writes the shop's raw files into `folder` (made if missing) and returns it.

    purchases.csv, visits.jsonl, pages.tsv, apps.jsonl, searches.csv and profile.csv are what is known of the users,
    catalogue.csv describes the items, and truth.jsonl holds the hidden tastes, for analysis only. The same arguments
    write the same bytes, and user number n is the same person whatever `users` is. Raises `PersonaError` for `users`
    below 1.
    """
    if users < 1:
        raise PersonaError(f"users is {users}; a shop needs at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    logs: dict[str, list[tuple]] = {source: [] for source in ("purchase", *BROWSING_SHARES)}
    profiles, truths = [], []
    for number, child in enumerate(np.random.SeedSequence(seed).spawn(users)):
        rng, user = np.random.default_rng(child), f"u{number:05d}"
        taste = _taste(rng)
        for source, rows in _events(rng, taste).items():
            logs[source].extend((second, user, *rest) for second, *rest in rows)
        profiles.append((user, *_profile(rng, taste)))
        truths.append(_truth(user, taste))
    for rows in logs.values():
        rows.sort(key=lambda row: row[:2])

    catalogue = _catalogue()
    _write_table(folder / "catalogue.csv", ("sku", "name", "category", "price"), catalogue)
    _write_table(
        folder / "purchases.csv",
        ("user", "time", "sku", "paid"),
        (
            (user, f"{_moment(s):%Y-%m-%dT%H:%M:%S}", catalogue[i][0], catalogue[i][3])
            for s, user, i in logs["purchase"]
        ),
    )
    _write_lines(
        folder / "visits.jsonl",
        ({"user": user, "at": int(_moment(s).timestamp()), "department": d} for s, user, d in logs["visit"]),
    )
    _write_table(
        folder / "pages.tsv",
        ("user", "viewed", "path"),
        ((user, f"{_moment(s):%d/%m/%Y %H:%M:%S}", path) for s, user, path in logs["page"]),
    )
    _write_lines(
        folder / "apps.jsonl",
        ({"user": user, "opened_ms": int(_moment(s).timestamp()) * 1000, "app": app} for s, user, app in logs["app"]),
    )
    _write_table(
        folder / "searches.csv",
        ("user", "time", "query"),
        ((user, _moment(s).astimezone(SEARCH_ZONE).isoformat(), query) for s, user, query in logs["search"]),
    )
    _write_table(folder / "profile.csv", ("user", "age", "city", "tier"), profiles)
    _write_lines(folder / "truth.jsonl", truths)
    return folder


def _catalogue() -> list[tuple[str, str, str, int]]:
    """Rows of sku, name, category, price; the item of category c, band b, place p is row 15c + 5b + p."""
    prices = [price for band in BANDS.values() for price in band]
    named = [(name.strip(), c, price) for c in CATEGORIES for name, price in zip(ITEMS[c].split(","), prices)]
    return [(f"sku{number:03d}", *row) for number, row in enumerate(named)]


def _taste(rng: np.random.Generator) -> Taste:
    count = len(CATEGORIES)
    main = int(rng.integers(count))
    early = _weights(rng, main)
    late, changed_at = early, None
    if rng.random() < DRIFT:
        late = _weights(rng, (main + int(rng.integers(1, count))) % count)
        changed_at = int(rng.uniform(0.2, 0.8) * DAYS * 86400)
    return Taste(early, late, changed_at, band=int(rng.integers(len(BANDS))), app=int(rng.integers(len(APPS))))


def _weights(rng: np.random.Generator, main: int) -> np.ndarray:
    """Weights of the categories `[8]`: nearly all on `main` or, for every other user, shared with a second category."""
    count = len(CATEGORIES)
    weights = np.full(count, 0.1 / count)
    second = (main + int(rng.integers(1, count))) % count if rng.random() < 0.5 else main
    weights[main] += 0.65
    weights[second] += 0.25
    return weights


def _events(rng: np.random.Generator, taste: Taste) -> dict[str, list[tuple]]:
    """One user's rows per source, each the second of the period and what happened."""
    bought_at = _seconds(rng, int(rng.integers(PURCHASES[0], PURCHASES[1] + 1)))
    browsing = int(rng.integers(BROWSING[0], BROWSING[1] + 1))
    shares = list(BROWSING_SHARES.values())
    counts = FEWEST_PER_SOURCE + rng.multinomial(browsing - FEWEST_PER_SOURCE * len(shares), shares)
    times = {}
    for source, count in zip(BROWSING_SHARES, counts):
        own = _seconds(rng, int(count))
        times[source] = np.where(rng.random(count) < TIES, rng.choice(bought_at, count), own)
    texts = {
        "visit": [c or _pick(rng, OTHER_DEPARTMENTS) for c in _topics(rng, taste, times["visit"])],
        "page": [_page(rng, c) for c in _topics(rng, taste, times["page"])],
        "app": _apps(rng, taste, len(times["app"])),
        "search": [_search(rng, c) for c in _topics(rng, taste, times["search"])],
    }
    rows = {source: list(zip(times[source].tolist(), texts[source])) for source in BROWSING_SHARES}
    return {"purchase": list(zip(bought_at.tolist(), _purchases(rng, taste, bought_at).tolist())), **rows}


def _purchases(rng: np.random.Generator, taste: Taste, seconds: np.ndarray) -> np.ndarray:
    """The items bought at these times, rows of the catalogue: `[N]` to `[N]`."""
    count = len(seconds)
    band_weights = np.full(len(BANDS), (1 - PREFERRED_BAND) / (len(BANDS) - 1))
    band_weights[taste.band] = PREFERRED_BAND
    row = taste.categories(rng, seconds) * len(BANDS) + _draw(rng, band_weights, count)
    liked = row * len(WANTED) + _draw(rng, WANTED, count)
    return np.where(rng.random(count) < TASTE_IN_PURCHASES, liked, _draw(rng, POPULARITY, count))


def _topics(rng: np.random.Generator, taste: Taste, seconds: np.ndarray) -> list[str | None]:
    """A category per time: from the taste or, as noise, half of the time any category and half of the time None."""
    count = len(seconds)
    topics = np.where(
        rng.random(count) < TASTE_IN_BROWSING,
        taste.categories(rng, seconds),
        np.where(rng.random(count) < 0.5, rng.integers(len(CATEGORIES), size=count), -1),
    )
    return [CATEGORIES[t] if t >= 0 else None for t in topics]


def _page(rng: np.random.Generator, category: str | None) -> str:
    return "home > " + (f"{category} > {_group(rng, category)}" if category else _pick(rng, OTHER_PAGES))


def _search(rng: np.random.Generator, category: str | None) -> str:
    return _pick(rng, SEARCH_FORMS).format(_group(rng, category)) if category else _pick(rng, OTHER_SEARCHES)


def _group(rng: np.random.Generator, category: str) -> str:
    return _pick(rng, FOREIGN[category] if rng.random() < FOREIGN_SHARE else GROUPS[category])


def _apps(rng: np.random.Generator, taste: Taste, count: int) -> list[str]:
    others = _draw(rng, 1 / (2 + np.arange(len(APPS))), count)
    return [APPS[i] for i in np.where(rng.random(count) < FAVOURITE_APP, taste.app, others)]


def _profile(rng: np.random.Generator, taste: Taste) -> tuple[int, str, str]:
    mean = MEAN_AGE[CATEGORIES[taste.early.argmax()]]
    age = int(np.clip(rng.normal(mean, 14), 18, 85))
    return age, _pick(rng, CITIES), TIERS[_draw(rng, np.array([0.6, 0.3, 0.1]), 1)[0]]


def _truth(user: str, taste: Taste) -> dict:
    return {
        "user": user,
        "early": dict(zip(CATEGORIES, taste.early.round(4).tolist())),
        "late": dict(zip(CATEGORIES, taste.late.round(4).tolist())),
        "changed_at": None if taste.changed_at is None else int(_moment(taste.changed_at).timestamp()),
        "band": list(BANDS)[taste.band],
        "app": APPS[taste.app],
    }


def _draw(rng: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    """Indexes `[count]` drawn by weight."""
    # Leaving out the last sum keeps the result in range when rounding leaves that sum below 1.
    return np.searchsorted(np.cumsum(weights / weights.sum())[:-1], rng.random(count), side="right")


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _seconds(rng: np.random.Generator, count: int) -> np.ndarray:
    """Times `[count]` in seconds from the start of the period, between 07:00 and 23:00, in no order."""
    return rng.integers(DAYS, size=count) * 86400 + rng.integers(7 * 3600, 23 * 3600, size=count)


def _moment(second: int) -> datetime:
    return START + timedelta(seconds=second)


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_lines(path: Path, records: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
