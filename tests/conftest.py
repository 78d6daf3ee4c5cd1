"""Real objects that many tests share: a text encoder, a small generated shop, and a tiny random LLM."""

import io
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Pinned to one core, as is its way, vLLM would wait for whatever else runs on that core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import uvicorn
from local_servers import Postgres, Redis
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from persona.cli import main
from persona.demo.shop import generate_shop
from persona.encoders import EncoderConfig, TextEncoder, UserEncoder, Vocabulary, make_encoder
from persona.history import Event, History
from persona.injection import PersonalizedLM, load_llm
from persona.serving import VLLMEngine
from persona.training.configs import LMConfig
from persona.training.recipe import Domain, load_recipe
from persona.training.reference_lm import domain_lines, train_tokenizer

torch.set_num_threads(1)  # tiny models gain nothing from more, and waiting threads starve each other

DEMO = Path(__file__).parents[1] / "adapters" / "demo" / "recipe.yaml"


@pytest.fixture(scope="session")
def run():
    """`persona ARGS` in this process, as importing PyTorch for each call takes its time: what it prints, its status."""

    def run(*args):
        out, err, status = io.StringIO(), io.StringIO(), 0
        with patch.object(sys, "argv", ["persona", *map(str, args)]), redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as stopped:
                status = stopped.code or 0
        return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())

    return run


@pytest.fixture(scope="session")
def text_encoder():
    return TextEncoder()


@pytest.fixture(scope="session")
def domain(tmp_path_factory):
    """The demo shop with 60 users, and settings small enough to train within a test."""
    recipe = load_recipe(DEMO)
    recipe = replace(
        recipe,
        encoder=EncoderConfig(width=32, heads=2, layers=2, tokens=4, max_events=64, dropout=0.0),
        training=replace(recipe.training, steps=8, histories_per_step=2, questions_per_history=2),
        lm=LMConfig(vocab_size=600, hidden_size=64, layers=2, context=512, rows_per_step=2, steps=3),
    )
    return Domain(recipe, generate_shop(tmp_path_factory.mktemp("shop"), users=60))


@pytest.fixture(scope="session")
def vocabulary(domain):
    return Vocabulary.fit((domain.histories[u] for u in domain.train), domain.recipe.sources)


@pytest.fixture(scope="session")
def tokenizer_path(domain, tmp_path_factory):
    """A folder with a chat tokenizer of 600 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(domain_lines(domain), domain.recipe.lm).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return AutoTokenizer.from_pretrained(tokenizer_path)


FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": 32}),
    "gemma": (GemmaConfig, {"tie_word_embeddings": True}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "tie_word_embeddings": True,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 32,
        },
    ),
}


def make_llm(family, tokenizer):
    """A tiny random LLM of the family whose answers depend on every token of the prompt; vLLM can serve it."""
    config, special = FAMILIES[family]
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(
        config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=1024,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **{"tie_word_embeddings": False, **special},
        )
    )
    if llm.config.tie_word_embeddings:
        with torch.no_grad():  # or it repeats the last token for ever
            llm.get_input_embeddings().weight.mul_(0.05)
    return llm.eval()


@pytest.fixture(scope="session")
def llm_path(tokenizer, tmp_path_factory):
    """A folder with a tiny random Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    make_llm("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    """Each LLM family in turn."""
    return request.param


@pytest.fixture
def family_llm(family, tokenizer):
    """A tiny random LLM of the family."""
    return make_llm(family, tokenizer)


@pytest.fixture
def encoder(vocabulary, text_encoder):
    """An untrained encoder in evaluation mode, the same in every test."""
    torch.manual_seed(1)
    config = EncoderConfig(width=32, heads=2, layers=2, tokens=4, max_events=64, dropout=0.0)
    return UserEncoder(config, vocabulary, text_encoder).eval()


def untrained(kind, vocabulary, text_encoder, llm_path):
    torch.manual_seed(0)
    shape = {"heads": 2, "tokens": 4, "max_events": 64, "dropout": 0.0}
    if kind == "llm":
        config = EncoderConfig(backbone="llm", llm=str(llm_path), width=64, lora_rank=4, **shape)
    else:
        config = EncoderConfig(width=32, layers=2, head=kind, **shape)
    return make_encoder(config, vocabulary, text_encoder).eval()


@pytest.fixture(params=["resampler", "linear", "llm"])
def any_encoder(request, vocabulary, text_encoder, llm_path):
    """An untrained encoder with each way of making tokens."""
    return untrained(request.param, vocabulary, text_encoder, llm_path)


@pytest.fixture
def llm_encoder(vocabulary, text_encoder, llm_path):
    """An untrained encoder that is an LM."""
    return untrained("llm", vocabulary, text_encoder, llm_path)


@pytest.fixture
def model(llm_path, encoder):
    """An untrained adapter on the tiny Llama."""
    torch.manual_seed(2)
    llm, tokenizer = load_llm(llm_path)
    return PersonalizedLM(llm, tokenizer, encoder, base_model=str(llm_path)).eval()


@pytest.fixture(scope="session")
def shop_histories(domain):
    """Three users of the shop, cut to 40, 7 and 1 timed events."""
    return [domain.histories[user].last(count) for user, count in zip(domain.test, (40, 7, 1))]


@pytest.fixture(scope="session")
def strange_history():
    """Every kind of event, and what vocabularies do not know."""
    day = 86_400.0
    return History(
        "dana",
        (
            Event("profile", attributes={"age": None, "city": "Atlantis", "tier": "gold", "shoe": 43.0}),
            Event("purchase", 1 * day, text="oak violin music", item_id="sku040", value=58.0),
            Event("purchase", 2 * day, text="unheard-of thing", item_id="nothing", value=-1e12),
            Event("search", 2 * day, text="👩‍👩‍👧‍👦 שלום مرحبا"),
            Event("search", 3 * day, text=""),
            Event("app", 4 * day, text="radio", item_id="radio"),
            Event("page", 5 * day),
        ),
    )


@pytest.fixture(scope="session")
def engine(llm_path):
    """One engine for the session, since starting one takes 20 seconds; its prefix cache is on."""
    return VLLMEngine(
        llm_path, max_model_len=512, max_num_seqs=8, enable_prefix_caching=True, kv_cache_memory_bytes=64 * 2**20
    )


@contextmanager
def _app_server(app, **options):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, **{"log_config": None, "lifespan": "on", **options}))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="session")
def app_server():
    """Runs an ASGI application on a free port: `with app_server(app) as url`."""
    return _app_server


def _started(server):
    """A server of this machine's packages; a machine that lacks it skips its tests, but CI may not."""
    try:
        return server()
    except FileNotFoundError as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server for the session."""
    with _started(Postgres) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server():
    """A Redis server for the session."""
    with _started(Redis) as server:
        yield server
