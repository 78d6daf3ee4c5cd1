"""What cross-attention costs beside a soft prompt and beside no user: throughput, time to first token, memory.

    python benchmarks/serving/cross_attention.py --data build/fresh --out benchmarks/results/cross-attention-cost.json

Two servers stand ready, stock vLLM with the demo's adapter and an export with cross-attention layers on the same LLM,
encoder and projector. Their layers were not trained, since what they cost does not depend on what they learned. All
kinds of calls alternate, ask the same questions of the same users, and stream 16 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import ADAPTER, LLM, QUESTIONS, SYSTEM, VLLM_FLAGS, client, median, server, shop_histories, write
from load import QUIET, parameters, store, warm

from persona.injection import PersonalizedLM, load_llm
from persona.serving.memory import Memory
from persona.serving.personalizer import INSTRUCTION_HEADER

KINDS = ("plain", "soft_prompt", "cross_attention", "cross_attention_nobody")
"""No user on stock vLLM; a user as a soft prompt; a user as a memory; nobody on a server with cross-attention."""


async def main(args: argparse.Namespace) -> None:
    """Both servers, all kinds of calls in turn."""
    histories = shop_histories(args.data, args.users)
    with tempfile.TemporaryDirectory() as folder:
        model = with_layers(args.every)
        adapter = str(model.save_pretrained(Path(folder) / "adapter"))
        flags = ["--store", f"sqlite:///{folder}/persona.db", *VLLM_FLAGS, *QUIET]
        environment = {"PERSONA_BUDGET_MS": "20000", "XDG_CACHE_HOME": folder}
        with server(flags, **environment) as soft, server(flags, adapter=adapter, **environment) as cross:
            async with client(soft.url) as first, client(cross.url) as second:
                await store(first, histories)
                for session in (first, second):
                    await warm(session, LLM, histories)
                sessions = dict(zip(KINDS, (first, first, second, second)))
                load = Load(sessions, list(histories), args)
                result = {
                    "n": {"users": len(histories)},
                    "llm": parameters(LLM),
                    "memory": memory(model),
                    "callers": {str(c): await load.compare(c) for c in args.concurrency},
                }
    write(args.out, result, args.seed)


def with_layers(every: int) -> PersonalizedLM:
    """The demo's adapter with cross-attention in the place of its soft prompt."""
    soft = PersonalizedLM.from_pretrained(ADAPTER, LLM)
    torch.manual_seed(0)
    llm, tokenizer = load_llm(LLM)
    model = PersonalizedLM(
        llm, tokenizer, soft.encoder, base_model=LLM, injection="cross_attention", cross_every=every, domain="shop"
    )
    model.projector.load_state_dict(soft.projector.state_dict())
    with torch.no_grad():
        for layer in model.cross_attention.layers.values():
            layer.gate.fill_(0.5)
    return model


def memory(model: PersonalizedLM) -> dict:
    """Parameters, and bytes that one request of a user takes, by shapes."""
    config, adapter = model.llm.config, model.adapter
    layout = Memory.of(adapter).layout
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    return {
        "parameters": {
            "llm": count(model.llm),
            "encoder": count(model.encoder),
            "projector": count(model.projector),
            "cross_attention": count(model.cross_attention),
        },
        "layers": len(model.cross_attention.layers),
        "layout": {"tokens": layout.tokens, "slots": layout.slots, "every": layout.every},
        "user_tokens_bytes": layout.tokens * adapter.llm_width * 4,
        "kv_cache_bytes_per_token": per_token,
        "kv_cache_bytes_soft_prompt": layout.tokens * per_token,
        "kv_cache_bytes_cross_attention": layout.slots * per_token,
    }


class Load:
    """So many callers, each with one call at a time."""

    def __init__(self, sessions: dict, users: list[str], args: argparse.Namespace):
        self.sessions, self.users, self.args = sessions, users, args
        self.random, self.turn = random.Random(args.seed), count()

    async def compare(self, concurrency: int) -> dict:
        """Rounds of all kinds in random order; figures and their ratios to `plain`, round by round."""
        calls, number = (1, 10 * self.args.rounds) if concurrency == 1 else (6 * concurrency, self.args.rounds)
        rounds = []
        for _ in range(number):
            order = self.random.sample(KINDS, len(KINDS))
            rounds.append({kind: await self.run(kind, concurrency, calls) for kind in order})
        table: dict = {"rounds": number, "calls_per_round": calls}
        for kind in KINDS:
            rates, firsts = zip(*(r[kind] for r in rounds))
            table[kind] = {
                "requests_per_second": round(float(np.median(rates)), 1),
                "first_token_ms": round(float(np.median(firsts)), 1),
                "throughput_to_plain": median(self.args.seed, [r[kind][0] / r["plain"][0] for r in rounds]),
                "added_first_token_ms": median(self.args.seed, [r[kind][1] - r["plain"][1] for r in rounds]),
            }
        print(f"{concurrency} callers: {table}", flush=True)
        return table

    async def run(self, kind: str, concurrency: int, calls: int) -> tuple[float, float]:
        """Calls a second, and the median time to the first token in ms."""
        todo, firsts = iter(range(calls)), []

        async def caller() -> None:
            for _ in todo:
                firsts.append(await self._call(kind, next(self.turn)))

        start = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(concurrency)))
        return calls / (time.perf_counter() - start), float(np.median(firsts)) * 1000

    async def _call(self, kind: str, number: int) -> float:
        question, named = QUESTIONS[number % 2], kind in ("soft_prompt", "cross_attention")
        body = {
            "model": LLM,
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"Visit {number}. {question}"},
            ],
            "temperature": 0,
            "max_tokens": 16,
            "ignore_eos": True,
            "stream": True,
            **({"user": self.users[number % len(self.users)]} if named else {}),
        }
        start, first = time.perf_counter(), None
        headers = {INSTRUCTION_HEADER: quote(question)}
        async with self.sessions[kind].post("/v1/chat/completions", json=body, headers=headers) as response:
            if response.status != 200 or response.headers["x-persona"] != ("personalized" if named else "plain"):
                raise SystemExit(f"{kind}: {response.status} {await response.text()}")
            async for line in response.content:
                if first is None and b'"content":"' in line and b'"content":""' not in line:
                    first = time.perf_counter() - start
        return first if first is not None else time.perf_counter() - start


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="records of a shop (`persona data shop --seed 1`)")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=6, help="ten times as many for one caller")
    parser.add_argument("--every", type=int, default=2, help="layers after every so many blocks")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(arguments()))
