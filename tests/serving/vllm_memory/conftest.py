"""Tiny LLMs with cross-attention layers, exported for vLLM; a reference written apart; engines in their own process."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from persona.injection import CrossAttention
from persona.serving.vllm_memory import export_checkpoint, memory_rows

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "gemma": (GemmaConfig, {"tie_word_embeddings": True}),
}

ENGINE = """
import json, sys
import torch
from safetensors.torch import load_file
from persona.serving import VLLMEngine

folder, options = sys.argv[1], json.loads(sys.argv[2])
asked = json.load(open(folder + "/asked.json"))
rows = load_file(folder + "/rows.safetensors")

def prompt(request):
    if request["user"] is None:
        return {"prompt_token_ids": request["ids"]}
    own = rows[request["user"]]
    ids = [0] * len(own) + request["ids"]
    embeds = torch.cat([own, own.new_zeros(len(request["ids"]), own.shape[1])])
    is_token = [False] * len(own) + [True] * len(request["ids"])
    return {"prompt_embeds": embeds, "prompt_token_ids": ids, "prompt_is_token_ids": is_token}

engine = VLLMEngine(folder + "/" + asked["model"], **{"max_num_seqs": 8, "max_model_len": 512,
    "kv_cache_memory_bytes": 16 * 2**20, "disable_log_stats": False, **options})
sampling = engine._sampling(temperature=0.0, max_tokens=asked["new"], logprobs=1, ignore_eos=True)
passes = [
    engine.engine.generate([prompt(r) for r in asked["requests"]], sampling, use_tqdm=False)
    for _ in range(asked["passes"])
]
chats = [engine.engine.chat(c, sampling, use_tqdm=False)[0] for c in asked["chats"]]

from vllm.compilation.counter import compilation_counter

def answer(out):
    ids = list(out.outputs[0].token_ids)
    logprobs = [step[i].logprob for step, i in zip(out.outputs[0].logprobs, ids)]
    return {"ids": ids, "logprobs": logprobs, "cached": out.num_cached_tokens}

result = {
    "passes": [[answer(out) for out in outputs] for outputs in passes],
    "chats": [answer(out) for out in chats],
    "preemptions": sum(m.value for m in engine.engine.get_metrics() if m.name == "vllm:num_preemptions"),
    "compiled": compilation_counter.num_aot_compiles,
    "blocks": engine.engine.llm_engine.vllm_config.cache_config.num_gpu_blocks,
}
json.dump(result, open(folder + "/result.json", "w"))
"""


class Reference:
    """Hugging Face's blocks, and after some of them cross-attention in plain matrix products over every head."""

    def __init__(self, llm, state, every):
        self.llm, self.state, self.every = llm, state, every
        self.config = llm.config

    @torch.inference_mode()
    def logits(self, ids, memory):
        """Logits `[T, vocab]` of a prompt; `memory` `[K, width]`, or None for the LLM alone."""
        model = self.llm.model
        hidden = self.llm.get_input_embeddings()(torch.tensor([ids]))
        length = len(ids)
        rotary = model.rotary_emb(hidden, torch.arange(length)[None])
        causal = torch.full((length, length), -math.inf).triu(1)[None, None]
        for number, block in enumerate(model.layers):
            hidden = block(hidden, position_embeddings=rotary, attention_mask=causal)
            if memory is not None and number % self.every == 0:
                hidden = hidden + self._read(hidden[0], memory, number)
        return self.llm.lm_head(model.norm(hidden))[0]

    def greedy(self, ids, memory, new):
        """Token ids and log-probabilities of a greedy answer of `new` tokens."""
        answer, logprobs = [], []
        for _ in range(new):
            scores = torch.log_softmax(self.logits([*ids, *answer], memory)[-1], -1)
            answer.append(scores.argmax().item())
            logprobs.append(scores.max().item())
        return {"ids": answer, "logprobs": logprobs}

    def _read(self, hidden, memory, number):
        weight = {name: self.state[f"{number}.{name}.weight"] for name in ("norm", "memory_norm")}
        query_of, key_of, value_of, out_of = (self.state[f"{number}.to_{kind}.weight"] for kind in "qkvo")
        hidden, memory = self._rms(hidden, weight["norm"]), self._rms(memory, weight["memory_norm"])
        query, keys, values = hidden @ query_of.T, memory @ key_of.T, memory @ value_of.T
        size = self.config.head_dim if hasattr(self.config, "head_dim") else 32
        shared = self.config.num_attention_heads // self.config.num_key_value_heads
        heads = []
        for head in range(self.config.num_attention_heads):
            own, theirs = (slice(h * size, (h + 1) * size) for h in (head, head // shared))
            scores = query[:, own] @ keys[:, theirs].T / math.sqrt(size)
            heads.append(torch.softmax(scores, -1) @ values[:, theirs])
        return torch.tanh(self.state[f"{number}.gate"]) * (torch.cat(heads, -1) @ out_of.T)

    def _rms(self, x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight


class Deployment:
    """A tiny LLM, its layers and its export in one folder."""

    def __init__(self, folder, family, tokenizer, *, tokens, every, slots, **changes):
        self.folder, self.tokens, self.every = folder, tokens, every
        self.llm = make_llm(family, tokenizer, **changes)
        self.tokenizer = tokenizer
        self.width = self.llm.config.hidden_size
        self.cross = CrossAttention(self.llm, every)
        self.state = open_layers(self.cross.layers)
        self.llm.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        export_checkpoint(folder / "base", folder / "served", self.state, tokens=tokens, every=every, slots=slots)
        self.slots = json.loads((folder / "served" / "config.json").read_text())["persona_memory"]["slots"]
        self.reference = Reference(self.llm, self.state, every)

    def user(self, seed, count=None):
        """User tokens `[count, width]` unlike those of other seeds."""
        rows = torch.randn(count or self.tokens, self.width, generator=torch.Generator().manual_seed(seed))
        return 2 * rows

    def rows(self, user):
        """The rows that open this user's request."""
        return memory_rows(user, tokens=self.tokens, slots=self.slots, width=self.width)

    def expected(self, requests, new):
        """Answers of the reference to (user tokens or None, ids) pairs."""
        return [self.reference.greedy(ids, user, new) for user, ids in requests]

    def served(self, requests, new, *, chats=(), model="served", bare=False, passes=1, **options):
        """The same requests, and chats, in a fresh engine in a process of its own; `bare` without any rows."""
        rows = {} if bare else {str(i): self.rows(user).clone() for i, (user, _) in enumerate(requests)}
        rows["none"] = torch.zeros(1)  # a file needs something
        save_file(rows, self.folder / "rows.safetensors")
        asked = {
            "requests": [{"user": None if bare else str(i), "ids": list(ids)} for i, (_, ids) in enumerate(requests)],
            "chats": list(chats),
            "new": new,
            "passes": passes,
            "model": model,
        }
        (self.folder / "asked.json").write_text(json.dumps(asked))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", ENGINE, str(self.folder), json.dumps(options)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((self.folder / "result.json").read_text())


def make_llm(family, tokenizer, **changes):
    """A tiny random LLM of three blocks whose answers depend on every token; two query heads share a key head."""
    config, special = FAMILIES[family]
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(
        config(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "max_position_embeddings": 1024,
                "initializer_range": 0.3,
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "tie_word_embeddings": False,
                **special,
                **changes,
            }
        )
    )
    if llm.config.tie_word_embeddings:
        with torch.no_grad():  # or it repeats the last token for ever
            llm.get_input_embeddings().weight.mul_(0.05)
    return llm.eval()


@torch.no_grad()
def open_layers(layers):
    """State of layers that add something, as after training."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in layers.named_parameters():
        if name.endswith("gate"):
            parameter.fill_(0.7)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, 0.3, generator=generator)
    return {name: tensor.clone() for name, tensor in layers.state_dict().items()}


@pytest.fixture(scope="session")
def deploy(tokenizer, tmp_path_factory):
    """Makes a deployment in a folder of its own."""

    def made(family="llama", *, tokens=32, every=2, slots=None, **changes):
        folder = tmp_path_factory.mktemp(family)
        return Deployment(folder, family, tokenizer, tokens=tokens, every=every, slots=slots, **changes)

    return made


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Makes random prompts of given lengths as token ids."""

    def made(*lengths):
        generator = torch.Generator().manual_seed(5)
        return [torch.randint(5, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]

    return made
