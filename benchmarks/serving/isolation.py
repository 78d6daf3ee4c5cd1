"""Many users of two tenants at once: is every answer the one that this user gets alone? And what does a kill lose?

    python benchmarks/serving/isolation.py --data build/fresh --out benchmarks/results/isolation.json

The same user ids stand for other people in the other tenant. What each of them gets alone is computed in Hugging Face,
in another process than the server's and one at a time. Short answers of two users may be the same words, so the five
best log-probabilities of the first token are compared too: they tell users apart whose answers are the same.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import ADAPTER, LLM, QUESTIONS, SYSTEM, VLLM_FLAGS, client, free_port, server, shop_histories, write

from persona.history import History, event_to_dict
from persona.injection import PersonalizedLM

KEYS = {"shop": "key-of-the-shop", "cinema": "key-of-the-cinema"}
TOP, NEW_TOKENS = 5, 8
TOLERANCE = 1e-3
"""Largest difference of log-probabilities that float32 in other batches may make."""
WRITERS = 8


@dataclass(frozen=True)
class Answer:
    """What came back: words, and the best log-probabilities of the first of them, best first."""

    text: str
    logprobs: tuple[float, ...]

    def distance(self, other: Answer) -> float:
        """Largest difference of log-probabilities; infinite for other words."""
        if self.text != other.text:
            return float("inf")
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs))


Case = tuple[str, str, str]
"""Tenant, user, question."""


async def main(args: argparse.Namespace) -> None:
    """The answers alone, the crowd, the kill, and what is there afterwards."""
    people = assigned(shop_histories(args.data, 2 * args.users), args.users)
    questions = [*QUESTIONS, "What should this user look at next?"]
    expected = alone(people, questions)
    result: dict = {"n": {"users": args.users, "tenants": len(KEYS), "requests": args.requests}}
    result["fingerprints"] = fingerprints(expected)
    with tempfile.TemporaryDirectory() as folder:
        keys, secret = Path(folder, "keys.yaml"), Path(folder, "secret")
        keys.write_text("".join(f"{tenant}: {key}\n" for tenant, key in KEYS.items()))
        secret.write_text(random.Random(args.seed).randbytes(32).hex())
        options = ["--store", f"sqlite:///{folder}/persona.db", "--keys", str(keys), "--secret-file", str(secret)]
        # All at once: the last one's turn comes late, and it is not to be answered plainly for that.
        crowd = {"PERSONA_BUDGET_MS": "120000", "PERSONA_MAX_PENDING": str(2 * args.requests)}
        flags, port = [*options, *VLLM_FLAGS, "--enable-prefix-caching", "--disable-uvicorn-access-log"], free_port()
        with server(flags, port=port, **crowd) as found:
            async with client(found.url) as session:
                for (tenant, user), history in people.items():
                    await observe(session, tenant, user, [event_to_dict(event) for event in history.events])
                result["crowd"] = await ask_all(session, expected, args.requests, random.Random(args.seed))
                metrics = await (await session.get("/metrics")).text()
                result["crowd"]["prefix_cache_hit_tokens"] = metric(metrics, "vllm:prefix_cache_hits_total")
                acknowledged = await until_killed(session, expected, found, args)
        with server(flags, port=port, **crowd) as found:
            async with client(found.url) as session:
                result["kill"] = await after(session, acknowledged)
                result["after_restart"] = await ask_all(session, expected, len(expected), random.Random(args.seed))
    write(args.out, result, args.seed)
    wrong = [result["crowd"]["wrong"], result["after_restart"]["wrong"], result["kill"]["lost_events"]]
    if any(wrong):
        raise SystemExit(f"wrong answers or lost events: {wrong}")


def assigned(histories: Mapping[str, History], count: int) -> dict[tuple[str, str], History]:
    """Histories by (tenant, user): each id is another person in the other tenant."""
    found = list(histories.values())
    return {(t, f"user {i}"): found[n * count + i] for n, t in enumerate(KEYS) for i in range(count)}


def alone(people: Mapping[tuple[str, str], History], questions: list[str]) -> dict[Case, Answer]:
    """Everybody's answer in Hugging Face, one at a time."""
    model = PersonalizedLM.from_pretrained(ADAPTER, LLM).eval()
    answers = {}
    for (tenant, user), history in people.items():
        (state,) = model.encoder.read([history])
        for question in questions:
            rows = model.soft_rows([state], [question])[0]
            prompt = model.template.prompt(messages(question), len(rows))
            with torch.inference_mode():
                logits = model.logits(rows, model.collate([prompt]))[0, -1]
            best = torch.log_softmax(logits.float(), -1).topk(TOP).values
            text = model.complete([prompt], rows, max_new_tokens=NEW_TOKENS)[0]
            answers[tenant, user, question] = Answer(text, tuple(best.tolist()))
    return answers


def fingerprints(expected: Mapping[Case, Answer]) -> dict:
    """How well answers tell people apart: the nearest two people of each question."""
    nearest, texts = float("inf"), Counter()
    for question in {q for *_, q in expected}:
        answers = [a for (*_, q), a in expected.items() if q == question]
        texts[question] = len({a.text for a in answers})
        nearest = min([nearest, *(a.distance(b) for i, a in enumerate(answers) for b in answers[:i])])
    return {
        "different_texts": dict(texts),
        "people": len({key[:2] for key in expected}),
        "nearest_two_people": round(nearest, 5),
        "tolerance": TOLERANCE,
    }


def messages(question: str) -> list[dict]:
    """The shared system prompt and a question."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


async def ask_all(session, expected: Mapping[Case, Answer], count: int, order: random.Random) -> dict:
    """`count` calls at once, over all cases in random order, compared with what is expected."""
    cases = [list(expected)[i % len(expected)] for i in range(count)]
    order.shuffle(cases)
    got = await asyncio.gather(*(ask(session, case) for case in cases))
    table = Counter({"equal": 0, "wrong": 0, "crossed": 0, "plain": 0})
    largest = 0.0
    for case, (answer, outcome) in zip(cases, got):
        if outcome != "personalized":
            table["plain"] += 1
        distance = answer.distance(expected[case])
        if distance <= TOLERANCE:
            table["equal"] += 1
            largest = max(largest, distance)
            continue
        table["wrong"] += 1
        others = [a for other, a in expected.items() if other[2] == case[2] and other != case]
        table["crossed"] += any(answer.distance(a) <= TOLERANCE for a in others)
    print(f"{count} calls at once: {dict(table)}", flush=True)
    return {"calls": count, **table, "largest_difference": round(largest, 7)}


async def ask(session: aiohttp.ClientSession, case: Case) -> tuple[Answer, str]:
    """One user's answer, and what the header says of it."""
    tenant, user, question = case
    body = {
        "model": LLM,
        "messages": messages(question),
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP,
        "user": user,
    }
    async with session.post("/v1/chat/completions", json=body, headers=key(tenant)) as response:
        if response.status != 200:
            raise SystemExit(f"{response.status} {await response.text()}")
        choice = (await response.json())["choices"][0]
        best = sorted((top["logprob"] for top in choice["logprobs"]["content"][0]["top_logprobs"]), reverse=True)
        return Answer(choice["message"]["content"].strip(), tuple(best[:TOP])), response.headers["x-persona"]


async def observe(session: aiohttp.ClientSession, tenant: str, user: str, events: list[dict]) -> None:
    """Appends events; returns when the server has acknowledged them."""
    async with session.post("/persona/v1/events", json={"user": user, "events": events}, headers=key(tenant)) as answer:
        answer.raise_for_status()
        await answer.read()


async def until_killed(session, expected: Mapping[Case, Answer], found, args) -> dict[str, list[str]]:
    """Calls and appends go on while the server is killed; the ids of the events that it has acknowledged, by user."""
    acknowledged: dict[str, list[str]] = {f"writer {i}": [] for i in range(WRITERS)}

    async def write_on(user: str) -> None:
        number = 0
        while True:
            event = {
                "source": "search",
                "timestamp": number,
                "text": f"violin {number}",
                "event_id": f"{user} {number}",
            }
            await observe(session, "shop", user, [event])
            acknowledged[user].append(event["event_id"])
            number += 1

    async def ask_on(cases: list[Case]) -> None:
        while True:
            await ask(session, cases[random.randrange(len(cases))])

    tasks = [asyncio.create_task(write_on(user)) for user in acknowledged]
    tasks += [asyncio.create_task(ask_on(list(expected))) for _ in range(WRITERS)]
    await asyncio.sleep(args.kill_after)
    if over := [task for task in tasks if task.done()]:
        raise SystemExit(f"a call failed before the kill: {over[0].exception()}")
    found.kill()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    if not all(isinstance(error, (aiohttp.ClientError, OSError)) for error in ended):
        raise SystemExit(f"another end than a lost connection: {ended}")
    return acknowledged


async def after(session: aiohttp.ClientSession, acknowledged: Mapping[str, list[str]]) -> dict:
    """What of the acknowledged events is there after the restart."""
    stored, lost = 0, 0
    for user, ids in acknowledged.items():
        async with session.post(
            "/persona/v1/history", json={"user": user, "last": 10_000}, headers=key("shop")
        ) as response:
            found = {event["event_id"] for event in (await response.json())["events"]}
        stored, lost = stored + len(found), lost + len(set(ids) - found)
    count = sum(map(len, acknowledged.values()))
    print(f"{count} events acknowledged before the kill, {lost} of them lost", flush=True)
    return {"acknowledged_events": count, "stored_events": stored, "lost_events": lost}


def key(tenant: str) -> dict[str, str]:
    """The header that speaks for a tenant."""
    return {"authorization": f"Bearer {KEYS[tenant]}"}


def metric(text: str, name: str) -> int:
    """The sum of a Prometheus counter over its labels."""
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name)))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="records of a shop (`persona data shop --seed 1`)")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--users", type=int, default=50, help="in each tenant")
    parser.add_argument("--requests", type=int, default=2000, help="calls at once")
    parser.add_argument("--kill-after", type=float, default=5.0, help="seconds of calls and appends before the kill")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(arguments()))
