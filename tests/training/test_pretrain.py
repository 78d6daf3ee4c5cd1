"""Pre-training: it learns what comes next, keeps its best state, goes on after a stop, and corrects for sampling."""

import json
from dataclasses import replace

import pytest
import torch

from persona.encoders import EncoderConfig, UserEncoder, Vocabulary
from persona.errors import CheckpointError, DataError
from persona.history import Event, History, SourceSpec
from persona.training.configs import PretrainingConfig
from persona.training.objectives import next_item_loss
from persona.training.pretrain import Sequences, Stretches, pad, pretrain
from persona.training.ranking import leave_one_out, ranking_values

SOURCES = {"buy": SourceSpec("item")}
CONFIG = PretrainingConfig(steps=60, batch_size=16, learning_rate=1e-2, warmup_steps=5, evaluations=3)


def circle(user, start, size=12):
    """Someone who takes items 0 to 19 in a circle, so that the next one can be known."""
    items = [(start + n) % 20 for n in range(size)]
    events = [Event("buy", 100.0 * n, text=f"thing {i}", item_id=str(i)) for n, i in enumerate(items)]
    return History(user, tuple(events))


@pytest.fixture(scope="module")
def histories():
    return [circle(f"u{u}", u) for u in range(40)]


def make(histories, text_encoder, **changes):
    torch.manual_seed(0)
    config = EncoderConfig(width=32, heads=2, max_events=10, dropout=0.0, backbone="sasrec", item_targets="id")
    return UserEncoder(replace(config, **changes), Vocabulary.fit(histories, SOURCES), text_encoder)


@pytest.mark.parametrize("negatives, item_text", [(0, True), (12, False)])
def test_it_learns_the_next_item(negatives, item_text, histories, text_encoder, tmp_path):
    encoder = make(histories, text_encoder, item_text=item_text)
    held = leave_one_out(histories)
    before = ranking_values(encoder.eval(), held)["ndcg@10"].mean()
    train = leave_one_out(histories, -2).histories
    pretrain(encoder, train, held, replace(CONFIG, negatives=negatives), tmp_path / "out")
    after = ranking_values(encoder, held)["ndcg@10"].mean()
    record = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert after > 0.9 > 0.6 > before
    assert record["best_ndcg@10"] == pytest.approx(after) and record["best_step"] in (20, 40, 60)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    again = UserEncoder.from_pretrained(tmp_path / "out", text_encoder)
    assert ranking_values(again, held)["ndcg@10"].mean() == pytest.approx(after)


def test_a_stopped_run_goes_on_and_ends_alike(histories, text_encoder, tmp_path, monkeypatch):
    held = leave_one_out(histories)
    whole = pretrain(make(histories, text_encoder), histories, held, CONFIG, tmp_path / "whole")
    seen = []

    def stop(self, *args, **kwargs):
        seen.append(None)
        if len(seen) == 30:
            raise InterruptedError
        return step(self, *args, **kwargs)

    step = torch.optim.AdamW.step
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(torch.optim.AdamW, "step", stop)
        pretrain(make(histories, text_encoder), histories, held, CONFIG, tmp_path / "halves")
    assert [p.name for p in (tmp_path / "halves").glob("checkpoint-*")] == ["checkpoint-20"]
    halves = pretrain(make(histories, text_encoder), histories, held, CONFIG, tmp_path / "halves")
    a, b = whole.state_dict(), halves.state_dict()
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


def test_stretches_end_anywhere_and_are_padded(histories, text_encoder):
    encoder = make(histories, text_encoder)
    sequences = Sequences.of(encoder, [*histories[:3], History("short", histories[0].events[:2])])
    stretches = Stretches(sequences, length=5, size=200, seed=0)
    sizes = {stretches[i].mask.shape[1] for i in range(200)}
    assert sizes == {2, 3, 4, 5} and torch.equal(stretches[7].item, stretches[7].item)
    batch = pad([stretches[i] for i in range(8)])
    assert batch.mask.shape == batch.item.shape and not batch.item[~batch.mask].any()
    with pytest.raises(DataError, match="no next item"):
        Sequences.of(encoder, [History("one", histories[0].events[:1])])


def test_the_sampled_softmax_is_the_full_one_in_expectation(histories, text_encoder):
    encoder = make(histories, text_encoder).eval()
    texts = encoder.text_encoder.vectors(encoder.vocabulary.item_texts)
    events = encoder.batch(histories)
    frequency = torch.bincount(events.item.flatten(), minlength=21)[1:].float()
    with torch.no_grad():
        states, _ = encoder.states(events)
        full = next_item_loss(encoder, states, events, texts)
        torch.manual_seed(0)
        drawn = [next_item_loss(encoder, states, events, texts, negatives=60, frequency=frequency) for _ in range(20)]
    # All 20 items are offered, and are all equally common: then the correction shifts every score alike.
    assert torch.stack(drawn).mean() == pytest.approx(float(full), abs=1e-3)


def test_a_pretrained_encoder_gives_all_but_the_head(histories, text_encoder, tmp_path):
    encoder = make(histories, text_encoder)
    with torch.no_grad():
        encoder.start.fill_(7.0)
    encoder.save_pretrained(tmp_path)
    other = make(histories, text_encoder, head="linear")
    head = {name: value.clone() for name, value in other.head.state_dict().items()}
    other.load_pretrained(tmp_path)
    assert other.start[0] == 7.0 and all(torch.equal(head[n], v) for n, v in other.head.state_dict().items())
    with pytest.raises(CheckpointError, match="its vocabulary differs"):
        make(histories[:1], text_encoder).load_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        make(histories, text_encoder, backbone="gru4rec").load_pretrained(tmp_path)


def test_a_frozen_encoder_learns_nothing_but_its_head(histories, text_encoder):
    encoder = make(histories, text_encoder, dropout=0.5)
    encoder.freeze()
    encoder.train()
    assert {name.split(".")[0] for name, p in encoder.named_parameters() if p.requires_grad} == {"head"}
    batch = encoder.batch(histories[:2])
    assert torch.equal(encoder.states(batch)[0], encoder.states(batch)[0]) and encoder.head.training
    encoder.freeze(False)
    encoder.train()
    assert all(p.requires_grad for p in encoder.parameters()) and encoder.backbone.training
