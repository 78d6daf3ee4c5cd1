"""Embedding files of users: equal to `encode`, whole parts alone, and no mixture of settings."""

import hashlib
import json
import os
import shutil
import socket
import subprocess

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona.encoders.embed_files import embed_file, encoder_folder, encoder_revision
from persona.errors import CheckpointError, DataError, EventError, PersonaError
from persona.history import Event, History

ASK = ["", "What does this user buy most?"]
REVISION = "0" * 64


def save(path, histories):
    """Histories as a Parquet file, its rows in random order but for those of one user and time, whose order counts."""
    rows = [
        {
            "user": h.user,
            **{name: getattr(e, name) for name in ("source", "timestamp", "text", "item_id", "value")},
            "attributes": json.dumps(e.attributes) if e.attributes else None,
        }
        for h in histories
        for e in h.events
    ]
    rng, place = np.random.default_rng(0), {}
    rows.sort(key=lambda row: place.setdefault((row["user"], row["timestamp"]), rng.random()))
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"timestamp": pa.float64(), "value": pa.float64()}
    names = ("user", "source", "timestamp", "text", "item_id", "value", "attributes")
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


@pytest.fixture(scope="module")
def histories(domain, strange_history):
    """Eleven users in the order of their ids, some of them with more events than the encoder reads."""
    shop = [domain.histories[user] for user in domain.test + domain.validation][:8]
    long = History("long", tuple(Event("search", float(t), text=f"violin {t % 3}") for t in range(100)))
    stranger = History("👩‍👩‍👧‍👦 stranger", (Event("tv", 5.0, text="news"), Event("radio", 6.0), Event("tv", 7.0)))
    return sorted([*shop, long, strange_history, stranger], key=lambda h: h.user)


@pytest.fixture
def events(histories, tmp_path):
    return save(tmp_path / "events.parquet", histories)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "made" / "embeddings"


def embed(encoder, events, out, **settings):
    settings = {"instructions": ASK, "batch_size": 4, "say": lambda text: None, **settings}
    return embed_file(encoder, REVISION, events, out, **settings)


def files(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def parts(out):
    return [f"{p.name}: {pq.read_metadata(p).num_rows}" for p in sorted(out.glob("*.parquet"))]


def test_embeddings_are_those_of_encode(encoder, events, out, histories):
    said = []
    made = embed(encoder, events, out, say=said.append)
    assert (made.users, made.parts, made.kept) == (11, 3, 0) and "11 users in 3 parts" in str(made)
    assert parts(out) == ["part-00000.parquet: 8", "part-00001.parquet: 8", "part-00002.parquet: 6"]
    rows = pd.read_parquet(out)  # passes over the manifest
    assert list(rows) == ["user", "instruction", "embedding", "events", "truncated", "revision"]
    assert rows.user.tolist() == [h.user for h in histories for _ in ASK]
    assert rows.instruction.tolist() == ASK * 11 and set(rows.revision) == {REVISION}
    vectors = np.stack(rows.embedding).reshape(11, 2, 32)
    for number, text in enumerate(ASK):
        np.testing.assert_allclose(vectors[:, number], encoder.encode(histories, text), atol=1e-5)
    assert np.abs(vectors[:, 0] - vectors[:, 1]).max() > 0.01
    kind = pq.read_schema(out / "part-00000.parquet").field("embedding").type
    assert kind == pa.list_(pa.float32(), 32)
    of = rows.drop_duplicates("user").set_index("user")
    assert of.truncated.tolist() == [len(h.timed) > 64 for h in histories] and of.truncated["long"]
    assert (of.events["long"], of.events["dana"], of.events["👩‍👩‍👧‍👦 stranger"]) == (64, 7, 0)
    np.testing.assert_allclose(of.embedding["👩‍👩‍👧‍👦 stranger"], encoder.encode([History("x")])[0], atol=1e-5)
    assert made.unknown == {"tv": 2, "radio": 1}
    assert any("3 events are of sources that the encoder does not know" in s and "tv (2)" in s for s in said)


def test_times_in_milliseconds_are_remarked_on_once(encoder, out, tmp_path):
    said = []
    late = [History("ana", (Event("search", 1.7e12, text="violin"), Event("search", 1.7e9, text="oak")))]
    embed(encoder, save(tmp_path / "events.parquet", late), out, say=said.append)
    assert [s for s in said if "in the future: 1 event; are timestamps in seconds?" in s] == said[:1]


def test_dim_and_tokens_are_cut(encoder, events, out, histories):
    embed(encoder, events, out, dim=5, tokens=2, instructions=["x"])
    vectors = np.stack(pd.read_parquet(out).embedding)
    np.testing.assert_allclose(vectors, encoder.encode(histories, "x", dim=5, tokens=2), atol=1e-5)


def test_users_scattered_over_files_are_those_of_one_file(encoder, events, out, tmp_path):
    table = pq.read_table(events)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, start in enumerate(range(0, len(table), 50)):
        pq.write_table(table.slice(start, 50), folder / f"{number:03d}.parquet")
    embed(encoder, events, out)
    embed(encoder, folder, tmp_path / "other")
    for name, content in files(out).items():
        if name.endswith(".parquet"):
            assert pq.read_table(pa.BufferReader(content)).equals(pq.read_table(tmp_path / "other" / name))


def test_what_another_process_is_writing_is_left_alone(encoder, events, out):
    embed(encoder, events, out)
    here, elsewhere, old = (
        out / f".writing-{name}-part-00001.parquet"
        for name in (f"{os.getppid()}@{socket.gethostname()}", "7@another-machine", "8@another-machine")
    )
    for file in (here, elsewhere, old):
        file.write_bytes(b"PAR1 half a file")
    os.utime(old, (0, 0))
    embed(encoder, events, out, overwrite=True)
    assert here.exists() and elsewhere.exists() and not old.exists()


def test_a_killed_run_goes_on(encoder, events, out):
    embed(encoder, events, out)
    whole = files(out)
    (out / "part-00001.parquet").unlink()
    ended = subprocess.Popen(["true"])
    ended.wait()
    (out / f".writing-{ended.pid}@{socket.gethostname()}-part-00001.parquet").write_bytes(b"PAR1 half a file")
    kept = {name: (out / name).stat().st_mtime_ns for name in ("part-00000.parquet", "part-00002.parquet")}
    made = embed(encoder, events, out)
    assert (made.parts, made.kept) == (3, 2) and "2 of which were there already" in str(made)
    assert files(out) == whole  # the temporary file is gone, the part is the same
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}
    assert embed(encoder, events, out).kept == 3


def test_a_run_that_fails_leaves_whole_parts_alone(encoder, events, out):
    class Killed(Exception):
        pass

    def say(text):
        if text.startswith("wrote part-00001"):
            raise Killed

    with pytest.raises(Killed):
        embed(encoder, events, out, say=say)
    assert list(files(out)) == ["_manifest.json", "part-00000.parquet", "part-00001.parquet"]
    assert embed(encoder, events, out).kept == 2


def test_a_damaged_part_is_made_again(encoder, events, out):
    embed(encoder, events, out)
    whole, said = files(out), []
    (out / "part-00000.parquet").write_bytes(whole["part-00000.parquet"][:-9])
    pq.write_table(pq.read_table(out / "part-00001.parquet").slice(1), out / "part-00001.parquet")
    assert embed(encoder, events, out, say=said.append).kept == 1
    assert files(out) == whole and [s for s in said if "damaged" in s] == [
        "part-00000.parquet is damaged and is made again",
        "part-00001.parquet is damaged and is made again",
    ]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"dim": 8}, "dim was 32 and is 8"),
        ({"tokens": 1}, "tokens was 4 and is 1"),
        ({"batch_size": 5}, "batch_size was 4 and is 5"),
        ({"instructions": ["other"]}, r"instructions was \['', 'What .*'\] and is \['other'\]"),
    ],
)
def test_other_settings_are_refused_unless_overwritten(encoder, events, out, change, said):
    embed(encoder, events, out)
    before = files(out)
    with pytest.raises(PersonaError, match=f"made otherwise: {said}.*--overwrite"):
        embed(encoder, events, out, **change)
    assert files(out) == before
    assert embed(encoder, events, out, overwrite=True, **change).kept == 0
    assert embed(encoder, events, out, **change).kept == len(list(out.glob("*.parquet")))


def test_settings_that_say_the_same_go_on(encoder, events, out):
    embed(encoder, events, out)
    assert embed(encoder, events, out, dim=32, tokens=4).kept == 3


def test_another_encoder_and_other_events_are_refused(encoder, events, out, histories):
    embed(encoder, events, out)
    with pytest.raises(PersonaError, match=r"revision was '000.*' and is '111"):
        embed_file(encoder, "1" * 64, events, out, instructions=ASK, batch_size=4)
    save(events, histories[:-1])
    message = r"users was 11 and is 10; files of events changed, came or went: events\.parquet"
    with pytest.raises(PersonaError, match=message):
        embed(encoder, events, out)
    assert embed(encoder, events, out, overwrite=True, batch_size=10).parts == 1
    assert parts(out) == ["part-00000.parquet: 20"]


def test_a_touched_or_moved_file_is_the_same(encoder, events, out, tmp_path):
    embed(encoder, events, out)
    (tmp_path / "moved").mkdir()
    shutil.copyfile(events, tmp_path / "moved" / events.name)
    assert embed(encoder, tmp_path / "moved" / events.name, out).kept == 3


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"events": 3}'])
def test_a_damaged_manifest(encoder, events, out, content):
    embed(encoder, events, out)
    (out / "_manifest.json").write_bytes(content)
    with pytest.raises(PersonaError, match=r"_manifest\.json is damaged.*--overwrite"):
        embed(encoder, events, out)
    assert embed(encoder, events, out, overwrite=True).kept == 0


def test_folders_of_something_else_are_left_alone(encoder, events, out):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(PersonaError, match=r"holds thesis\.tex, but no _manifest\.json"):
            embed(encoder, events, out, overwrite=overwrite)
    with pytest.raises(PersonaError, match="is a file"):
        embed(encoder, events, out / "thesis.tex")
    with pytest.raises(PersonaError, match="cannot be written"):
        embed(encoder, events, out / "thesis.tex" / "below")
    assert list(files(out)) == ["thesis.tex"]
    for inside in (events.parent, events.parent / "deeper"):
        with pytest.raises(PersonaError, match="whose files are read as events"):
            embed(encoder, events.parent, inside)


def test_nothing_is_made_of_bad_events(encoder, events, out, tmp_path):
    table = pq.read_table(events)
    values = [*[1.0] * (len(table) - 1), float("nan")]
    pq.write_table(table.set_column(table.column_names.index("value"), "value", [values]), events)
    with pytest.raises(DataError, match=rf"events\.parquet, row {len(table)}: event\.value is nan"):
        embed(encoder, events, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"dim": 33}, EventError, "1 to 32 dimensions, not 33"),
        ({"tokens": 0}, EventError, "1 to 4 tokens, not 0"),
        ({"batch_size": 0}, PersonaError, "at least 1 user"),
        ({"instructions": []}, PersonaError, "no instruction"),
        ({"instructions": ["a", "b", "a"]}, PersonaError, "'a' is given twice"),
        ({"instructions": ["\ud800"]}, PersonaError, "not valid Unicode"),
    ],
)
def test_bad_settings(encoder, events, out, settings, error, message):
    with pytest.raises(error, match=message):
        embed(encoder, events, out, **settings)
    assert not out.exists()


def test_user_ids_arrive_whole(encoder, out, tmp_path):
    """None is cut, stripped or taken for another."""
    users = sorted(["a", " a", "a ", "😀" * 256, "a\n", "é", "e\u0301"])
    save(tmp_path / "e.parquet", [History(user, (Event("search", None, text="x"),)) for user in users])
    embed(encoder, tmp_path / "e.parquet", out, instructions=[""])
    found = [u for p in sorted(out.glob("*.parquet")) for u in pq.read_table(p)["user"].to_pylist()]
    assert found == users


def test_revision_is_of_all_three_files(encoder, tmp_path):
    folder = encoder.save_pretrained(tmp_path / "encoder")
    names = ("config.json", "vocabulary.json", "model.safetensors")
    content = b"".join((folder / name).read_bytes() for name in names)
    assert encoder_revision(folder) == hashlib.sha256(content).hexdigest()
    (folder / "README.md").write_text("changed")
    assert encoder_revision(folder) == hashlib.sha256(content).hexdigest()
    (folder / "vocabulary.json").unlink()
    with pytest.raises(CheckpointError, match=r"vocabulary\.json cannot be read"):
        encoder_revision(folder)


def test_the_verb_embeds_resumes_and_refuses(run, encoder, events, out, histories, llm_path, tmp_path):
    adapter = tmp_path / "adapter"
    encoder.save_pretrained(adapter / "encoder")
    (adapter / "adapter_config.json").write_text("{}")
    assert encoder_folder(adapter) == adapter / "encoder" and encoder_folder(adapter / "encoder") == adapter / "encoder"
    call = ("embed", adapter, "--events", events, "--out", out, "--batch-size", 4)
    done = run(*call)
    assert done.returncode == 0, done.stderr
    assert "11 users in 3 parts, 0 of which were there already" in done.stderr and "tv (2)" in done.stderr
    rows = pd.read_parquet(out)
    assert set(rows.instruction) == {""} and set(rows.revision) == {encoder_revision(adapter / "encoder")}
    np.testing.assert_allclose(np.stack(rows.embedding), encoder.encode(histories), atol=1e-5)
    (out / "part-00002.parquet").unlink()
    again = run("embed", adapter / "encoder", *call[2:], "--resume")
    assert again.returncode == 0 and "2 of which were there already" in again.stderr
    other = run(*call, "--dim", 8)
    assert other.returncode == 1 and "dim was 32 and is 8" in other.stderr and "Traceback" not in other.stderr
    assert run(*call, "--dim", 8, "--instruction", "a", "--instruction", "b", "--overwrite").returncode == 0
    rows = pd.read_parquet(out)
    assert rows.instruction.tolist() == ["a", "b"] * 11 and {len(v) for v in rows.embedding} == {8}
    nowhere = run("embed", tmp_path / "nothing", *call[2:])
    assert nowhere.returncode == 1 and nowhere.stderr.startswith("persona: ")
    an_lm = run("embed", llm_path, *call[2:])
    assert an_lm.returncode == 1 and len(an_lm.stderr.splitlines()) == 1
    assert "holds no persona encoder or adapter (its config.json is of a llama model)" in an_lm.stderr
