"""The pure function: equal to `embed_file`, picklable, and in Spark's form (run on plain pandas: Spark is no need)."""

import json
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest

from persona.batch import SCHEMA, EmbedUsers
from persona.encoders import UserEncoder
from persona.encoders.embed_files import embed_file, encoder_revision
from persona.errors import CheckpointError, DataError, EventError, PersonaError
from persona.history.event import event_to_dict

ASK = ("", "What does this user buy most?")


def frame(histories):
    """Users as the function takes them."""
    events = [json.dumps([event_to_dict(e) for e in h.events], ensure_ascii=False) for h in histories]
    return pd.DataFrame({"user": [h.user for h in histories], "events": events})


def test_rows_are_those_of_embed_file(folder, events, histories, tmp_path):
    embed = pickle.loads(pickle.dumps(EmbedUsers(folder, ASK, dim=8, tokens=2)))
    made = embed(frame(histories))
    encoder, revision = UserEncoder.from_pretrained(folder), encoder_revision(folder)
    embed_file(encoder, revision, events, tmp_path / "out", instructions=ASK, dim=8, tokens=2, say=lambda text: None)
    wanted = pd.read_parquet(tmp_path / "out")
    np.testing.assert_allclose(np.stack(made.embedding), np.stack(wanted.embedding), atol=1e-6)
    pd.testing.assert_frame_equal(made.drop(columns="embedding"), wanted.drop(columns="embedding"))
    assert made.truncated.sum() == 2 * sum(len(h.timed) > 64 for h in histories) > 0
    assert [len(v) for v in made.embedding] == [8] * 80


def test_only_settings_are_pickled_and_an_encoder_is_loaded_once(folder):
    one, other = EmbedUsers(folder), EmbedUsers(folder, ASK)
    assert one.encoder is other.encoder is pickle.loads(pickle.dumps(one)).encoder
    assert len(pickle.dumps(one)) < 2000


def test_the_form_of_spark(folder, histories):
    """An iterator of frames, some of them empty, in columns of the schema."""
    whole, embed = frame(histories), EmbedUsers(folder, ASK)
    parts = list(embed.pandas_batches(iter([whole[:0], whole[:7], whole[7:8], whole[8:]])))
    assert [len(part) for part in parts] == [14, 2, 64]
    made, wanted = pd.concat(parts, ignore_index=True), embed(whole)
    np.testing.assert_allclose(np.stack(made.embedding), np.stack(wanted.embedding), atol=1e-5)
    pd.testing.assert_frame_equal(made.drop(columns="embedding"), wanted.drop(columns="embedding"))
    fields = dict(field.split(" ") for field in SCHEMA.split(", "))
    assert list(made) == list(fields)
    numpy = {"int": "int32", "boolean": "bool", "array<float>": "object"}
    assert all(made[name].dtype == numpy[kind] for name, kind in fields.items() if kind != "string")
    assert made.embedding[0].dtype == np.float32
    assert list(embed.pandas_batches(iter([]))) == []


@pytest.mark.parametrize(
    "events, said",
    [
        ("[", "user 'ana', event 1: cannot be read: Expecting value"),
        ("{}", "they are a JSON dict, not a list"),
        (None, "event 1: cannot be read"),
        ('[{"source": "search"}, {"source": "search", "value": NaN}]', r"event 2: .*event\.value is nan"),
        ('[{"source": "search", "timestamp": "2025-01-06"}]', r"event\.timestamp must be a number"),
        ('[{"source": "search", "price": 3}]', "no field 'price'"),
        ("[3]", "not int"),
    ],
)
def test_bad_events(folder, events, said):
    with pytest.raises(DataError, match=said):
        EmbedUsers(folder)(pd.DataFrame({"user": ["ana"], "events": [events]}))


def test_a_bad_user(folder):
    with pytest.raises(DataError, match=r"user '', event 1: .*1 to 256 characters"):
        EmbedUsers(folder)(pd.DataFrame({"user": [""], "events": ["[]"]}))


@pytest.mark.parametrize(
    "settings, error, said",
    [
        ({"dim": 33}, EventError, "1 to 32 dimensions, not 33"),
        ({"tokens": 0}, EventError, "1 to 4 tokens, not 0"),
        ({"instructions": []}, PersonaError, "no instruction"),
        ({"instructions": ["a", "a"]}, PersonaError, "'a' is given twice"),
    ],
)
def test_bad_settings(folder, settings, error, said):
    with pytest.raises(error, match=said):
        EmbedUsers(folder, **settings)


def test_another_encoder_in_the_folder_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor a repository"):
        EmbedUsers(tmp_path / "nothing")
    shutil.copytree(folder, tmp_path / "encoder")
    embed = EmbedUsers(tmp_path / "encoder")
    with (tmp_path / "encoder" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match="holds another encoder than it did"):
        embed(pd.DataFrame({"user": ["ana"], "events": ["[]"]}))
