"""The command line and environment that start vLLM, made with vLLM's own parser; no server is started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from persona.cli import app
from persona.errors import CheckpointError, PersonaError
from persona.serving.server.config import ServerConfig
from persona.serving.server.flags import MIDDLEWARE
from persona.serving.server.launch import SERVER, command

ROOT = Path(__file__).parents[3]
ADAPTER = str(ROOT / "adapters" / "demo" / "weights")
LLM = str(ROOT / "adapters" / "demo" / "lm")


def build(*vllm_args, cuda=False, environment=None, **settings):
    """The command as {flag: values} and its environment."""
    config = ServerConfig(**{"adapter": ADAPTER, **settings})
    argv, environment = command(config, vllm_args, environment or {}, cuda=cuda)
    assert argv[:3] == [sys.executable, "-m", SERVER]
    flags: dict[str, list[str]] = {}
    for word in argv[3:]:
        if word.startswith("--"):
            values = flags.setdefault(word, [])
        else:
            values.append(word)
    return flags, environment


def test_stock_vllm_is_started_with_our_middleware_and_settings(tmp_path):
    flags, environment = build(
        "--max-num-seqs", "4", store="sqlite:///x.db", keys_file=tmp_path, budget_ms=50, require_personalization=True
    )
    assert flags["--model"] == [LLM] and flags["--enable-prompt-embeds"] == []
    assert flags["--middleware"] == [MIDDLEWARE]
    assert flags["--host"] == ["127.0.0.1"] and flags["--port"] == ["8000"]
    assert environment["PERSONA_ADAPTER"] == ADAPTER and environment["PERSONA_LLM"] == LLM
    assert environment["PERSONA_STORE"] == "sqlite:///x.db" and environment["PERSONA_KEYS_FILE"] == str(tmp_path)
    assert environment["PERSONA_BUDGET_MS"] == "50.0" and environment["PERSONA_REQUIRE_PERSONALIZATION"] == "True"
    assert "PERSONA_MAX_BODY" not in environment  # neither given nor set: the server's own default
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"


def test_the_server_reads_back_the_settings_it_was_started_with(monkeypatch):
    given = {"adapter": ADAPTER, "max_body": 4096, "jwt_key": "k" * 32, "require_personalization": True}
    _, environment = build(**given)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ServerConfig.load() == ServerConfig(**given, llm=LLM)


def test_defaults_for_a_cpu_stay_off_a_gpu():
    flags, environment = build()
    assert flags["--dtype"] == ["float32"] and flags["--block-size"] == ["32"] and flags["--enforce-eager"] == []
    assert flags["--kv-cache-memory-bytes"] == [str(256 * 2**20)] and "--max-num-seqs" in flags
    assert environment["VLLM_TARGET_DEVICE"] == "cpu" and environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    flags, environment = build(cuda=True)
    assert set(flags) == {"--model", "--enable-prompt-embeds", "--host", "--port", "--middleware"}
    assert "VLLM_TARGET_DEVICE" not in environment and "VLLM_CPU_OMP_THREADS_BIND" not in environment


def test_what_the_caller_gives_wins_over_defaults(tmp_path):
    flags, environment = build(
        *("--dtype=bfloat16", "--no-enforce-eager", "--block_size", "64", "--host", "0.0.0.0"),
        environment={"VLLM_CPU_OMP_THREADS_BIND": "auto", "VLLM_CPU_KVCACHE_SPACE": "1", "DO_NOT_TRACK": "0"},
    )
    assert not {"--dtype", "--enforce-eager", "--block-size", "--kv-cache-memory-bytes"} & set(flags)
    assert flags["--host"] == ["0.0.0.0"] and flags["--block_size"] == ["64"]
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "auto" and environment["DO_NOT_TRACK"] == "0"
    assert "--kv-cache-memory-bytes" not in build("--gpu-memory-utilization", "0.5")[0]

    file = tmp_path / "vllm.yaml"
    file.write_text("port: 9001\ndtype: bfloat16\nmiddleware: some.Other\n")
    flags, _ = build("--config", str(file), "--max-num-seqs", "4")
    assert not {"--port", "--dtype"} & set(flags) and flags["--max-num-seqs"] == ["4"]


def test_a_full_prompt_of_embeddings_may_be_decoded_and_no_more():
    assert build()[1]["VLLM_MAX_EMBED_DECODE_BYTES"] == str(4 * 2**20)  # the demo's prompts are short
    assert build("--max-model-len", "16384")[1]["VLLM_MAX_EMBED_DECODE_BYTES"] == str(4 * 16384 * 128)
    own = {"VLLM_MAX_EMBED_DECODE_BYTES": "77"}
    assert build(environment=own)[1]["VLLM_MAX_EMBED_DECODE_BYTES"] == "77"


def test_the_llm_may_be_named_in_vllms_way_but_only_once():
    assert build("--model", LLM)[1]["PERSONA_LLM"] == LLM
    with pytest.raises(PersonaError, match="--llm alone"):
        build("--model", "other", llm=LLM)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--no-such-flag", "1"], "unrecognized arguments: --no-such-flag"),
        (["--max-num-seqs", "many"], "--max-num-seqs"),
        (["--dtype"], "--dtype"),
        (["--speculative-config", "{no json"], "--speculative-config"),
        (["stray"], "'stray'.*--llm"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config=vllm.yaml"], "without the equals sign"),
        (["--api-server-count", "4"], "does not read --api-server-count"),
        (["--enable-lora"], "--lora-target-modules"),
        (["--middleware", MIDDLEWARE], "twice"),
        (["--no-enable-prompt-embeds"], "--enable-prompt-embeds"),
        (["--tokenizer", "other"], "--tokenizer other"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, why, capfd):
    with pytest.raises(PersonaError, match=why) as error:
        build(*arguments)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_configuration_file_and_the_environment_are_checked_too(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("kv-transfer-config:\n  kv_connector: LMCacheConnectorV1\n  kv_role: kv_both\n")
    with pytest.raises(PersonaError, match="--kv-transfer-config"):
        build("--config", str(file))
    with pytest.raises(PersonaError, match="VLLM_SERVER_DEV_MODE"):
        build(environment={"VLLM_SERVER_DEV_MODE": "1"})
    with pytest.raises(PersonaError, match="use --keys"):
        build("--api-key", "a-key", keys_file=tmp_path)


def test_an_adapter_that_vllm_cannot_serve_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        build(adapter=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        build(adapter=str(tmp_path))
    saved = json.loads((Path(ADAPTER) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, "lora": True}))
    with pytest.raises(PersonaError, match="merge it"):
        build(adapter=str(tmp_path), llm=LLM)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, "base_model": ""}))
    with pytest.raises(PersonaError, match="give one with --llm"):
        build(adapter=str(tmp_path))


def test_an_llm_that_is_missing_or_of_another_width_is_refused(tmp_path):
    LlamaConfig(hidden_size=64, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"width 128 .* is 64 wide"):
        build(llm=str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be loaded") as error:
        build(llm=str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--upstream", "http://x", "--dtype", "half"], "--dtype half"),
        (["--upstream", "no-url"], "upstream"),
        (["--upstream", "http://x", "--upstream-key-file", "nowhere.key"], "nowhere.key"),
        (["--upstream-key-file", "README.md"], "--upstream URL"),
        (["--budget-ms", "-1"], "PERSONA_BUDGET_MS"),
    ],
)
def test_wrong_options_of_ours_are_refused(arguments, why, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["serve", "--adapter", ADAPTER, *arguments])
    assert isinstance(result.exception, PersonaError) and why in str(result.exception)


NOWHERE = (["--adapter", "nowhere"], "nowhere")
LORA = (["--adapter", ADAPTER, "--enable-lora"], "--lora-target-modules")


def check_refusal(ran, why):
    """One line on the standard error, and nothing else."""
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("persona: ") and why in ran.stderr and len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "why"), [NOWHERE, LORA])
def test_the_verb_says_in_one_line_why_it_does_not_start(run, monkeypatch, arguments, why):
    monkeypatch.setattr("os.execve", lambda *started: pytest.fail("vLLM would have taken this process's place"))
    check_refusal(run("serve", *arguments), why)


@pytest.mark.parametrize(("arguments", "why"), [NOWHERE, pytest.param(*LORA, marks=pytest.mark.slow)])
def test_the_console_script_says_in_one_line_why_it_does_not_start(arguments, why):
    command = [sys.executable, "-m", "persona.cli", "serve", *arguments]
    check_refusal(subprocess.run(command, capture_output=True, text=True, cwd=ROOT), why)
