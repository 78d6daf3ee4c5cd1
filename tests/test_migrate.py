"""`persona migrate` with two real encoders: it measures first, refuses what loses too much, and marks what it wrote."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from scipy.stats import ortho_group
from typer.testing import CliRunner

from persona.cli.migrate import migrate
from persona.encoders import EncoderConfig, UserEncoder
from persona.encoders.embed_files import embed_file, encoder_revision
from persona.encoders.stored_vectors import read_vectors
from persona.errors import DataError, PersonaError

ASK = ["", "What does this user buy most?"]

app = typer.Typer()
app.command()(migrate)


def call(*args):
    """What the verb prints; raises what it raises."""
    done = CliRunner().invoke(app, [str(a) for a in args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def encoders(vocabulary, text_encoder, tmp_path_factory):
    """Folders of an encoder, of the same one in a rotated space, and of one with other weights."""

    def made(seed):
        torch.manual_seed(seed)
        config = EncoderConfig(width=16, heads=2, layers=1, tokens=2, max_events=64, dropout=0.0, head="linear")
        return UserEncoder(config, vocabulary, text_encoder).eval()

    old, rotated, other = made(1), made(1), made(2)
    turn = torch.tensor(ortho_group.rvs(16, random_state=0), dtype=torch.float32)
    with torch.no_grad():
        out = rotated.head.out
        out.weight.copy_(torch.cat([turn @ part for part in out.weight.split(16)]))
        out.bias.copy_(torch.cat([turn @ part for part in out.bias.split(16)]))
    root = tmp_path_factory.mktemp("encoders")
    names = {"old": old, "rotated": rotated, "other": other}
    return {name: encoder.save_pretrained(root / name) for name, encoder in names.items()}


@pytest.fixture(scope="module")
def events(domain, tmp_path_factory):
    rows = [
        {"user": user, "source": e.source, "timestamp": e.timestamp, "text": e.text, "item_id": e.item_id}
        for user, history in domain.histories.items()
        for e in history.events
    ]
    path = tmp_path_factory.mktemp("events") / "events.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def embed(encoders, events, text_encoder):
    def embed(name, out, **options):
        encoder = UserEncoder.from_pretrained(encoders[name], text_encoder)
        options = {"instructions": ASK, "batch_size": 25, "say": lambda text: None, **options}
        return embed_file(encoder, encoder_revision(encoders[name]), events, out, **options)

    return embed


@pytest.fixture(scope="module")
def old(embed, tmp_path_factory):
    """60 users' vectors, in three parts."""
    folder = tmp_path_factory.mktemp("old") / "vectors"
    embed("old", folder)
    return folder


def test_a_rotated_space_is_mapped_and_marked(encoders, old, events, embed, tmp_path):
    out = tmp_path / "new"
    common = (old, "--encoder", encoders["rotated"], "--events", events, "--out", out)
    said = call(*common)
    assert "'': recall@10 among 30 held-out users: mapped 1.000 [1.000, 1.000]" in said
    assert "nothing was written" in said and not out.exists() and "counts as drift" not in said
    assert "120 vectors of" in call(*common, "--write")
    before, after = encoder_revision(encoders["old"]), encoder_revision(encoders["rotated"])
    embed("rotated", tmp_path / "anew")
    for text in ASK:
        mapped, anew = read_vectors(out, text), read_vectors(tmp_path / "anew", text)
        assert mapped.users == anew.users and (mapped.revision, mapped.mapped_from) == (after, before)
        np.testing.assert_allclose(mapped.matrix, anew.matrix, atol=1e-5)
        assert np.abs(mapped.matrix - read_vectors(old, text).matrix).max() > 0.1
    rows, others = pd.read_parquet(out), pd.read_parquet(old)
    assert list(rows) == [*others, "mapped_from"]
    assert rows[["events", "truncated"]].equals(others[["events", "truncated"]])


def test_events_that_came_since_are_told(encoders, old, events, tmp_path):
    newer = tmp_path / "newer.parquet"
    pq.write_table(pq.read_table(events).slice(5), newer)
    said = call(old, "--encoder", encoders["rotated"], "--events", newer, "--out", tmp_path / "new")
    assert f"{newer} is not what {old} was made of" in said


def test_mapped_vectors_are_never_taken_for_encoded_ones(encoders, old, events, embed, tmp_path):
    out = tmp_path / "new"
    common = ("--encoder", encoders["rotated"], "--events", events)
    call(old, *common, "--out", out, "--write")
    with pytest.raises(PersonaError, match=r"made otherwise: revision was '\w+ mapped from \w+' and is '\w+'"):
        embed("rotated", out)
    with pytest.raises(PersonaError, match="mapped before"):
        call(out, "--encoder", encoders["other"], "--events", events, "--out", tmp_path / "twice")
    assert embed("rotated", out, overwrite=True).kept == 0
    assert read_vectors(out, "").mapped_from == ""


def test_another_training_is_refused_unless_less_is_accepted(encoders, old, events, tmp_path):
    out = tmp_path / "new"
    common = (old, "--encoder", encoders["other"], "--events", events, "--out", out, "--write")
    with pytest.raises(PersonaError, match=r"recall of mapped vectors is 0\.\d+, below the 0\.9 of --least-recall"):
        call(*common)
    assert not out.exists()
    call(*common, "--least-recall", 0, "--dim", 16, "--tokens", 1)
    assert read_vectors(out, "").revision == encoder_revision(encoders["other"])
    assert json.loads((out / "_manifest.json").read_text())["tokens"] == 1


def test_narrower_vectors_are_not_mapped_to(encoders, old, events, tmp_path):
    with pytest.raises(DataError, match="16 dimensions and new ones 8"):
        call(old, "--encoder", encoders["other"], "--events", events, "--out", tmp_path / "new", "--dim", 8)


def test_what_there_is_nothing_to_do_for_is_refused(encoders, old, events, tmp_path):
    common = ("--events", events, "--out", tmp_path / "new")
    with pytest.raises(PersonaError, match="of this very encoder"):
        call(old, "--encoder", encoders["old"], *common)
    with pytest.raises(PersonaError, match="sample of 10 users is too small"):
        call(old, "--encoder", encoders["other"], *common, "--sample", 10)
    with pytest.raises(PersonaError, match="--sample is at least 1"):
        call(old, "--encoder", encoders["other"], *common, "--sample", 0)
    strangers = tmp_path / "strangers.parquet"
    pq.write_table(pa.table({"user": ["nobody"], "source": ["search"], "text": ["tea"]}), strangers)
    with pytest.raises(PersonaError, match="none of the users"):
        call(old, "--encoder", encoders["other"], "--events", strangers, "--out", tmp_path / "new")
    with pytest.raises(DataError, match="name a folder of persona embed"):
        call(tmp_path, "--encoder", encoders["other"], *common)
