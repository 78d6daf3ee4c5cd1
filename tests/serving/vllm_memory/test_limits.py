"""What is refused at start-up, on vLLM's own config, and that a refusal reaches whoever starts the engine."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from persona.errors import PersonaError
from persona.serving.vllm_memory import ARCHITECTURES, MemoryLayout
from persona.serving.vllm_memory.limits import check_backend, check_config, has_sliding_window
from persona.serving.vllm_offline import import_vllm

pytestmark = pytest.mark.vllm

LAYOUT = MemoryLayout(tokens=40, slots=64, every=2)


@pytest.fixture(scope="module")
def vllm_config(deploy):
    """The config that an engine for an exported checkpoint gets."""
    import_vllm()
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"dtype": "float32", "block_size": 32, "max_model_len": 512, "kv_cache_memory_bytes": 2**24}
    served = str(deploy(tokens=40).folder / "served")
    return EngineArgs(model=served, enable_prompt_embeds=True, enforce_eager=True, **arguments).create_engine_config()


def test_the_layout_arrives_and_nothing_is_wrong(vllm_config):
    layout = MemoryLayout.from_config(vllm_config.model_config.hf_config)
    assert layout == LAYOUT
    check_config(vllm_config, layout)


def test_layouts_do_not_share_compiled_code(vllm_config, monkeypatch):
    before = vllm_config.compute_hash()  # by which vLLM finds code that it compiled before, with the numbers in it
    monkeypatch.setattr(vllm_config.model_config.hf_config, "persona_memory", {"tokens": 40, "slots": 96, "every": 2})
    assert vllm_config.compute_hash() != before


CHANGES = {
    "pipeline parallelism": ("parallel_config.pipeline_parallel_size", 2),
    "tensor parallelism": ("parallel_config.tensor_parallel_size", 2),
    "context parallelism": ("parallel_config.decode_context_parallel_size", 2),
    "dual batch": ("parallel_config.ubatch_size", 2),
    "does not divide the 64 slots": ("cache_config.block_size", 128),
    "quantized KV": ("cache_config.cache_dtype", "fp8"),
    "KV scales": ("quant_config", SimpleNamespace(kv_cache_scheme={"num_bits": 8})),
    "--kv-sharing-fast-prefill": ("cache_config.kv_sharing_fast_prefill", True),
    "--kv-transfer-config": ("kv_transfer_config", object()),
    "--enable-prompt-embeds": ("model_config.enable_prompt_embeds", False),
    "sliding window": ("cache_config.sliding_window", 32),
    "speculative": ("speculative_config", object()),
    "--enable-lora": ("lora_config", object()),
    "only text generation": ("model_config.runner_type", "pooling"),
}


@pytest.mark.parametrize("said, change", CHANGES.items(), ids=CHANGES)
def test_refused(vllm_config, monkeypatch, said, change):
    path, value = change
    *parents, name = path.split(".")
    owner = vllm_config
    for parent in parents:
        owner = getattr(owner, parent)
    monkeypatch.setitem(owner.__dict__, name, value)
    with pytest.raises(PersonaError) as refusal:
        check_config(vllm_config, LAYOUT)
    assert said in str(refusal.value)
    assert str(refusal.value).count("\n- ") == 1


def test_model_runner_v2_is_refused(vllm_config, monkeypatch):
    from vllm import envs

    # Not in the environment, of which vLLM keeps what it read once an engine runs in this process.
    monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", True)
    with pytest.raises(PersonaError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        check_config(vllm_config, LAYOUT)
    monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", False)
    check_config(vllm_config, LAYOUT)


def test_every_reason_at_once(vllm_config, monkeypatch):
    monkeypatch.setitem(vllm_config.__dict__, "lora_config", object())
    monkeypatch.setitem(vllm_config.parallel_config.__dict__, "tensor_parallel_size", 2)
    with pytest.raises(PersonaError, match=r"(?s)tensor parallelism.*LoRA"):
        check_config(vllm_config, LAYOUT)


def test_sliding_windows():
    assert has_sliding_window(SimpleNamespace(sliding_window=32))
    assert has_sliding_window(SimpleNamespace(layer_types=["full_attention", "sliding_attention"]))
    assert not has_sliding_window(SimpleNamespace(sliding_window=None, layer_types=["full_attention"]))
    assert not has_sliding_window(SimpleNamespace())


def test_backends():
    import_vllm()
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    check_backend(CPUAttentionBackend)

    class Other(CPUAttentionBackend):
        get_name = staticmethod(lambda: "FLASHINFER")

    with pytest.raises(PersonaError, match="FLASHINFER"):
        check_backend(Other)


def test_blocks_that_vllm_chose_later():
    import_vllm()
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from persona.serving.vllm_memory.metadata import text_backend

    builder = text_backend(CPUAttentionBackend, LAYOUT).get_builder_cls()
    with pytest.raises(PersonaError, match="64 slots for user tokens are not whole blocks of 128"):
        builder(SimpleNamespace(block_size=128), [], None, None)


def test_the_plug_in_loads_nothing():
    code = """
import sys, types
import persona
package = sys.modules["persona.serving"] = types.ModuleType("persona.serving")  # whose own imports are not asked for
package.__path__ = [persona.__path__[0] + "/serving"]
import persona.serving.vllm_memory
print(sorted({"torch", "transformers", "numpy", "vllm"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_vllm_knows_our_models_and_keeps_its_own():
    import_vllm()
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    supported = ModelRegistry.get_supported_archs()
    assert set(supported) >= {*ARCHITECTURES, *ARCHITECTURES.values()}


@pytest.mark.slow
def test_a_refusal_reaches_whoever_starts_the_engine(deploy):
    d = deploy(tokens=40)
    with pytest.raises(AssertionError, match=r"(?s)PersonaError.*--block-size 128.*--enable-prompt-embeds"):
        d.served([], 1, bare=True, enable_prompt_embeds=False, block_size=128)
