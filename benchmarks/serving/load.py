"""Throughput and latency of personalised calls against plain ones and against the history as text, interleaved.

    python benchmarks/serving/load.py --data build/fresh --out benchmarks/results/serving.json

All kinds of calls ask the same questions in turns that differ from call to call, as users' turns do, after the same
system prompt. A personalised call gives the instruction in the header, so that the server knows it; where it is the
turn itself, and new at every call, it has to be encoded first. Also what a cold user costs, what memory the plug-in
adds, and how long it holds up the event loop. A vLLM without the plug-in answers calls that bring ready-made rows, as
many as a user has: what these cost is vLLM's share of what a personalised call costs.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from urllib.parse import quote

import aiohttp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    ADAPTER,
    LLM,
    QUESTIONS,
    SYSTEM,
    VLLM_FLAGS,
    client,
    history_text,
    median,
    plain_vllm,
    server,
    shop_histories,
    write,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from persona.history import event_to_dict
from persona.injection import PersonalizedLM
from persona.serving.personalizer import INSTRUCTION_HEADER, Personalizer
from persona.serving.rows import encode_rows
from persona.serving.states import UserStates
from persona.store import EventStore

KINDS = ("plain", "personalised", "personalised_new_instruction", "text_400")
KINDS_WITHOUT_PLUG_IN = ("plain", "ready_made_rows")
WORKLOADS = {"short": {"max_tokens": 8}, "long": {"max_tokens": 32, "ignore_eos": True}}
"""The answer as it comes, one or two tokens for most questions; and 32 tokens whatever the LLM would say."""
QUIET = ["--disable-uvicorn-access-log"]
HISTORY_TOKENS = 400
COLD_EVENTS = 500


async def main(args: argparse.Namespace) -> None:
    """All measurements, one server after the other."""
    histories = shop_histories(args.data, args.users)
    tokenizer = AutoTokenizer.from_pretrained(args.llm)
    texts = {user: history_text(history, tokenizer, HISTORY_TOKENS) for user, history in histories.items()}
    result: dict = {"n": {"users": len(histories)}, "llm": parameters(args.llm), "workloads": {}}
    chosen = {"adapter": args.adapter, "llm": args.llm}
    with tempfile.TemporaryDirectory() as folder:
        with server(
            ["--store", f"sqlite:///{folder}/persona.db", *VLLM_FLAGS, *QUIET], PERSONA_BUDGET_MS="20000", **chosen
        ) as found:
            async with client(found.url) as session:
                await store(session, histories)
                before = found.memory()
                await warm(session, args.llm, histories)
                load = Load(session, texts, args)
                for name in args.workloads:
                    result["workloads"][name] = {str(c): await load.compare(name, c) for c in args.concurrency}
                result["cold_user"] = await cold(session, args.llm, histories)
                result["plug_in"] = plug_in(await (await session.get("/persona/metrics")).text())
                with_plug_in = {"idle_mib": round(before), "after_load_mib": round(found.memory())}
        with plain_vllm([*VLLM_FLAGS, *QUIET], **chosen) as found:
            async with client(found.url) as session:
                load = Load(session, texts, args, ready_made_rows(args, histories, folder))
                await load.run("plain", "short", 32, 32 * args.rounds)
                memory = {
                    "plain_after_load_mib": round(found.memory()),
                    **{f"plug_in_{k}": v for k, v in with_plug_in.items()},
                }
                result["without_plug_in"] = {
                    name: {str(c): await load.compare(name, c) for c in args.concurrency} for name in args.workloads
                }
        result["memory"] = {**memory, "added_mib": memory["plug_in_after_load_mib"] - memory["plain_after_load_mib"]}
    write(args.out, result, args.seed)


class Load:
    """Closed-loop load: so many callers, each with one call at a time."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        texts: dict[str, str],
        args: argparse.Namespace,
        rows: dict[tuple[str, str], str] | None = None,
    ):
        self.session, self.users, self.texts, self.args, self.rows = session, list(texts), texts, args, rows
        self.kinds = KINDS if rows is None else KINDS_WITHOUT_PLUG_IN
        self.random, self.turn = random.Random(args.seed), count()

    async def compare(self, workload: str, concurrency: int) -> dict:
        """Rounds of all kinds in random order; each kind's figures and their ratios, round by round."""
        calls = 1 if concurrency == 1 else 6 * concurrency  # one caller's calls alternate, call by call
        number = self.args.rounds * (10 if concurrency == 1 else 1)
        rounds: list[dict[str, tuple[float, float, int]]] = []
        for _ in range(number):
            order = self.random.sample(self.kinds, len(self.kinds))
            rounds.append({kind: await self.run(kind, workload, concurrency, calls) for kind in order})
        table: dict = {"rounds": number, "calls_per_round": calls}
        for kind in self.kinds:
            rates, latencies, tokens = zip(*(r[kind] for r in rounds))
            table[kind] = {
                "requests_per_second": round(float(np.median(rates)), 1),
                "median_latency_ms": round(float(np.median(latencies)), 1),
                "prompt_tokens": round(float(np.mean(tokens))),
            }
        for kind in (k for k in self.kinds if k not in ("plain", "text_400")):
            for name, other in (("plain", "plain"), ("text", "text_400")):
                if other in self.kinds:
                    ratios = [r[kind][0] / r[other][0] for r in rounds]
                    table[f"throughput_to_{name}_{kind}"] = median(self.args.seed, ratios)
            table[f"added_latency_ms_{kind}"] = median(self.args.seed, [r[kind][1] - r["plain"][1] for r in rounds])
        print(f"{workload} answers, {concurrency} callers: {table}", flush=True)
        return table

    async def run(self, kind: str, workload: str, concurrency: int, calls: int) -> tuple[float, float, int]:
        """Calls a second, the median latency in ms, and the mean prompt tokens, of one kind of call."""
        todo, latencies, tokens = iter(range(calls)), [], []

        async def caller() -> None:
            for _ in todo:
                # In turn, so that a user's own prompt has left the prefix cache when the user comes again.
                number = next(self.turn)
                body, headers = self._request(kind, workload, number)
                start = time.perf_counter()
                answer, said = await post(self.session, "/v1/chat/completions", body, headers)
                latencies.append(time.perf_counter() - start)
                tokens.append(answer["usage"]["prompt_tokens"])
                if kind.startswith("personalised") and said["x-persona"] != "personalized":
                    raise SystemExit(f"answered plainly: {said.get('x-persona-reason')}")

        start = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(concurrency)))
        return calls / (time.perf_counter() - start), float(np.median(latencies)) * 1000, float(np.mean(tokens))

    def _request(self, kind: str, workload: str, number: int) -> tuple[dict, dict]:
        """The body and the headers of a call."""
        user, question = self.users[number % len(self.users)], QUESTIONS[number % 2]
        turn = f"Visit {number}. {question}"
        if kind == "text_400":
            turn = f"{self.texts[user]}\n{turn}"
        if kind == "ready_made_rows":
            turn = [{"type": "prompt_embeds", "data": self.rows[user, question]}, {"type": "text", "text": turn}]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": turn}]
        body = {"model": self.args.llm, "messages": messages, "temperature": 0, **WORKLOADS[workload]}
        if not kind.startswith("personalised"):
            return body, {}
        return {**body, "user": user}, {INSTRUCTION_HEADER: quote(question)} if kind == "personalised" else {}


def ready_made_rows(args: argparse.Namespace, histories: dict, folder: str) -> dict[tuple[str, str], str]:
    """Each user's rows for each question, in the form that vLLM takes."""
    model = PersonalizedLM.from_pretrained(args.adapter, args.llm, llm_weights=False)
    with EventStore(f"sqlite:///{folder}/rows.db") as events:
        personalizer = Personalizer(model, UserStates(model.encoder, events))
        rows = {}
        for user, history in histories.items():
            events.append(user, history.events)
            made, _ = personalizer.rows(user, QUESTIONS)
            rows |= {(user, question): encode_rows(row) for question, row in zip(QUESTIONS, made)}
    return rows


async def store(session: aiohttp.ClientSession, histories: dict) -> None:
    """Appends all histories through the user API."""
    for user, history in histories.items():
        events = [event_to_dict(event) for event in history.events]
        await post(session, "/persona/v1/events", {"user": user, "events": events})


async def warm(session: aiohttp.ClientSession, llm: str, histories: dict) -> None:
    """One short call for each user, so that all states are cached."""
    for user in histories:
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        await post(session, "/v1/chat/completions", {"model": llm, "messages": messages, "max_tokens": 1, "user": user})


async def cold(session: aiohttp.ClientSession, llm: str, histories: dict) -> dict:
    """Calls for users with 500 events whose state is not cached, with known and with new texts."""
    events = [event_to_dict(e) for history in list(histories.values())[:20] for e in history.events if e.timestamp]
    times: dict[str, list[float]] = {"known_texts": [], "new_texts": [], "cached_after": [], "storing_500_events": []}
    for number in range(10):
        for name in ("known_texts", "new_texts"):
            user, own = f"cold {name} {number}", []
            for i, event in enumerate(events[number : number + COLD_EVENTS]):
                text = event["text"] if name == "known_texts" else f"{event['text']} {number} {i}"
                own.append({**event, "timestamp": 1.7e9 + i, "text": text})
            start = time.perf_counter()
            await post(session, "/persona/v1/events", {"user": user, "events": own})
            times["storing_500_events"].append(time.perf_counter() - start)
            body = {
                "model": llm,
                "messages": [{"role": "user", "content": QUESTIONS[0]}],
                "max_tokens": 1,
                "user": user,
            }
            for kind in (name, "cached_after"):
                start = time.perf_counter()
                _, headers = await post(session, "/v1/chat/completions", body)
                times[kind].append(time.perf_counter() - start)
                if headers["x-persona"] != "personalized":
                    raise SystemExit(f"{name}: answered plainly: {headers.get('x-persona-reason')}")
    return {"events": COLD_EVENTS, **{f"{k}_ms": round(float(np.median(v)) * 1000, 1) for k, v in times.items()}}


def parameters(llm: str) -> dict:
    """How large the LLM is."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llm))
    return {"name": llm, "parameters": sum(p.numel() for p in model.parameters())}


def plug_in(metrics: str) -> dict:
    """What the plug-in's own metrics say after all this."""
    value = {
        m[1]: float(m[2]) for m in re.finditer(r"^(\S+?)(?:\{\})? (\S+)$", metrics, re.M) if not m[1].endswith("}")
    }
    mean = {
        n: 1000 * value[f"persona_{n}_seconds_sum"] / value[f"persona_{n}_seconds_count"]
        for n in ("encode", "overhead")
    }
    return {
        "calls": int(value["persona_overhead_seconds_count"]),
        "mean_encode_ms": round(mean["encode"], 2),
        "mean_overhead_ms": round(mean["overhead"], 2),
        "longest_stretch_on_event_loop_ms": round(1000 * value["persona_event_loop_longest_seconds"], 2),
    }


async def post(
    session: aiohttp.ClientSession, path: str, body: dict, headers: dict | None = None
) -> tuple[dict, Mapping[str, str]]:
    """The JSON that a call gives, and its headers."""
    async with session.post(path, json=body, headers=headers) as response:
        if response.status != 200:
            raise SystemExit(f"{path}: {response.status} {await response.text()}")
        return await response.json(), response.headers


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="records of a shop (`persona data shop --seed 1`)")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--users", type=int, default=300, help="more than whose prompts the KV cache holds")
    parser.add_argument("--rounds", type=int, default=10, help="ten times as many for one caller")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--adapter", default=ADAPTER, help="another adapter than the demo's")
    parser.add_argument("--llm", default=LLM, help="the LLM it is for")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(arguments()))
