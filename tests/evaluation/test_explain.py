"""Explanations: leave-one-out against encoding each history alone, and what is asked of both sides together."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from persona.encoders import EncoderConfig, make_encoder
from persona.encoders.attention_weights import state_attention
from persona.errors import EventError, PersonaError
from persona.evaluation.explain import Score, answer_cosine, answer_likelihood, explain
from persona.evaluation.likelihood import Request, option_scores
from persona.history import Event, History

ROOT = Path(__file__).parents[2]
QUESTION = "What does this user buy most?"
UNKNOWN = Event("nosuch", 86_400.0 * 2.5, text="of a source that the encoder does not know")


def test_each_event_has_its_share_and_its_fall(any_encoder, strange_history):
    history = strange_history.of([*strange_history.events, UNKNOWN])
    found = explain(any_encoder, history, QUESTION, "music")
    assert found.events == history.events and found.answer == "music" and found.measure == "cosine"
    assert found.attention.shape == found.leave_one_out.shape == (8,) and not found.truncated
    assert (found.attention >= 0).all() and np.isclose(found.attention.sum() + found.elsewhere, 1, atol=1e-5)
    number = found.events.index(UNKNOWN)
    assert number == 4 and found.attention[number] == found.leave_one_out[number] == 0
    share = state_attention(any_encoder, any_encoder.read([history]), [QUESTION])[0]
    assert np.isclose(found.attention[0], share[1:5].sum())  # the profile's four columns
    assert np.allclose(found.attention[[1, 2, 3, 5, 6, 7]], share[5:])
    answer = any_encoder.encode_answers(["music"])[0]
    assert found.score == pytest.approx(any_encoder.encode([history], QUESTION)[0] @ answer, abs=1e-5)
    for i, fall in enumerate(found.leave_one_out):
        without = history.of(history.events[:i] + history.events[i + 1 :])
        alone = any_encoder.encode([without], QUESTION)[0] @ answer
        assert fall == pytest.approx(found.score - alone, abs=1e-5)
    keep = np.arange(8) != number
    assert found.agreement == pytest.approx(tuple(spearmanr(found.attention[keep], found.leave_one_out[keep])))


def test_the_batch_size_changes_nothing(any_encoder, shop_histories):
    one, many = (explain(any_encoder, shop_histories[1], QUESTION, "music", batch_size=size) for size in (1, 64))
    assert np.allclose(one.leave_one_out, many.leave_one_out, atol=1e-5) and np.ptp(one.leave_one_out) > 1e-4
    assert np.array_equal(one.attention, many.attention) and one.score == pytest.approx(many.score, abs=1e-5)


def test_the_event_that_decides_is_found_by_both(encoder):
    """All that this resampler does is to look up one event, by weights set by hand."""
    things = ["tea", "oak violin music", "garden hose", "radio", "drum stick"]
    history = History("ana", tuple(Event("search", 1e9 + 86_400 * i, text=t) for i, t in enumerate(things)))
    layers = encoder.head.layers
    with torch.no_grad():
        encoder.events.time.weight.zero_()
        for block in encoder.backbone.blocks:
            block.out.weight.zero_(), block.down.weight.zero_()
        encoder.head.age.weight.zero_()
        target = layers[0].state_norm(encoder.read([history])[0].states[2])
        for layer in layers:
            for linear in (layer.self_attention.out, layer.mlp[-1]):
                linear.weight.zero_(), linear.bias.zero_()
            attention = layer.cross_attention
            attention.query.weight.zero_(), attention.query.bias.copy_(50 * target)
            attention.key_value.weight.copy_(torch.eye(32).repeat(2, 1)), attention.key_value.bias.zero_()
            attention.out.weight.copy_(torch.eye(32)), attention.out.bias.zero_()
    found = explain(encoder, history, QUESTION, Score(lambda tokens: tokens.mean(1) @ target))
    others = np.arange(5) != 1
    assert found.attention[1] > 0.99 and found.leave_one_out[1] > 1
    assert found.attention[others].sum() < 0.01 and np.abs(found.leave_one_out[others]).max() < 0.01


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_history_of_no_event_or_few(any_encoder, count):
    history = History("ana", tuple(Event("search", 1e9 + i, text=f"tea {i}") for i in range(count)))
    found = explain(any_encoder, history, QUESTION, "tea")
    assert found.attention.shape == found.leave_one_out.shape == (count,) and found.agreement is None
    assert np.isclose(found.attention.sum() + found.elsewhere, 1, atol=1e-5) and -1 <= found.score <= 1
    if count == 1:
        nobody = any_encoder.encode([History("nobody")], QUESTION)[0] @ any_encoder.encode_answers(["tea"])[0]
        assert found.leave_one_out[0] == pytest.approx(found.score - nobody, abs=1e-5)


def test_only_unknown_sources(any_encoder):
    found = explain(any_encoder, History("ana", (UNKNOWN,) * 4), QUESTION, "tea")
    assert not found.attention.any() and not found.leave_one_out.any() and found.agreement is None
    assert found.elsewhere == pytest.approx(1)


def test_agreement_is_undefined_where_nothing_changes_or_the_score_is_no_number(encoder, shop_histories):
    for value in (0.5, float("nan")):
        found = explain(encoder, shop_histories[1], QUESTION, Score(lambda t, v=value: torch.full((len(t),), v)))
        assert found.agreement is None


def test_of_a_long_history_the_newest_events_are_explained(vocabulary, text_encoder, shop_histories):
    torch.manual_seed(0)
    config = EncoderConfig(width=32, heads=2, tokens=4, max_events=5, dropout=0.0)
    encoder, history = make_encoder(config, vocabulary, text_encoder).eval(), shop_histories[0]
    found = explain(encoder, history, QUESTION, "music")
    untimed = len(history) - len(history.timed)
    assert found.truncated and untimed and found.events == history.last(5).events and len(found.events) == untimed + 5
    short = explain(encoder, history.last(5), QUESTION, "music")  # nothing older moves up when an event is left out
    assert np.array_equal(found.leave_one_out, short.leave_one_out) and not short.truncated


def test_a_prefix_of_the_tokens(encoder, shop_histories):
    first = explain(encoder, shop_histories[1], QUESTION, "music", count=1)
    answer = encoder.encode_answers(["music"])[0]
    assert first.score == pytest.approx(encoder.encode([shop_histories[1]], QUESTION, tokens=1)[0] @ answer, abs=1e-5)
    assert not np.allclose(first.attention, explain(encoder, shop_histories[1], QUESTION, "music").attention)
    with pytest.raises(EventError, match="1 to 4 tokens, not 0"):
        explain(encoder, shop_histories[1], QUESTION, "music", count=0)


@pytest.mark.parametrize("answer", ["garden", "a rather long answer"])
def test_the_likelihood_of_an_answer(model, shop_histories, answer):
    history = shop_histories[1]
    found = explain(model.encoder, history, QUESTION, answer_likelihood(model, QUESTION, answer))
    assert found.measure == "log-likelihood" and found.answer == answer and found.score < 0
    without = history.of(history.events[1:])
    rows = model.soft_rows(model.encoder.read([history, without]), [QUESTION] * 2)
    whole, rest = (s[0] for s in option_scores(model, [Request(QUESTION, (answer,), r) for r in rows]))
    assert found.score == pytest.approx(whole, abs=1e-3)
    assert found.leave_one_out[0] == pytest.approx(whole - rest, abs=1e-3)


def test_a_score_gives_a_number_for_each_user(encoder, shop_histories):
    with pytest.raises(PersonaError, match=r"a score of \d+ users' tokens has the shape \[\]"):
        explain(encoder, shop_histories[1], QUESTION, Score(lambda tokens: tokens.sum()))
    same = explain(encoder, shop_histories[1], QUESTION, answer_cosine(encoder, "music"))
    assert np.array_equal(same.leave_one_out, explain(encoder, shop_histories[1], QUESTION, "music").leave_one_out)


def test_the_mean_looks_at_all_states_alike(vocabulary, text_encoder, shop_histories):
    encoder = make_encoder(EncoderConfig(width=32, heads=2, head="mlp", tokens=4), vocabulary, text_encoder).eval()
    history = shop_histories[1].of(e for e in shop_histories[1].events if e.source != "profile")
    found = explain(encoder, history, QUESTION, "music")
    assert np.allclose(found.attention, 1 / (1 + len(history))) and np.isclose(found.elsewhere, 1 / (1 + len(history)))
    assert found.leave_one_out.any() and found.agreement is None  # one side is alike for all


def test_the_readme_explains_an_answer(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- explain -->\n```python\n(.*?)```\n<!-- explain -->", text, re.S)[1]
    (tmp_path / "adapters").symlink_to(ROOT / "adapters")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    said = re.findall(r"^([a-z ]+?) +([\d.]+) ([+-][\d.]+)$", capsys.readouterr().out, re.M)
    violin, hose, stick = (float(fall) for _, _, fall in said)
    assert violin > 0.01 and stick > 0.01 and hose < 0
    assert (tmp_path / "explanation.png").stat().st_size > 10_000
