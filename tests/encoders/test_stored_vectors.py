"""Reading stored vectors: all of one encoder's, or none."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona.encoders.embed_files import embed_file
from persona.encoders.stored_vectors import instructions_of, read_vectors
from persona.errors import DataError

ASK = "What does this user buy most?"
REVISION = "a" * 64


@pytest.fixture(scope="module")
def histories(domain):
    return sorted((domain.histories[user] for user in domain.test), key=lambda h: h.user)


@pytest.fixture
def folder(histories, encoder, tmp_path):
    """Six users in three parts, for two instructions."""
    rows = [
        {"user": h.user, "source": e.source, "timestamp": e.timestamp, "text": e.text}
        for h in histories
        for e in h.events
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "events.parquet")
    out = tmp_path / "vectors"
    embed_file(
        encoder,
        REVISION,
        tmp_path / "events.parquet",
        out,
        instructions=["", ASK],
        batch_size=2,
        say=lambda text: None,
    )
    return out


def rewrite(path, **columns):
    """Writes a part again with other columns."""
    table = pq.read_table(path)
    for name, values in columns.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, values)
        else:
            table = table.append_column(name, values)
    pq.write_table(table, path)


def test_what_is_read_is_what_was_written(folder, histories):
    assert instructions_of(folder) == ["", ASK]
    vectors = read_vectors(folder, ASK)
    assert vectors.users == tuple(h.user for h in histories) and len(histories) == 6
    assert (vectors.revision, vectors.mapped_from) == (REVISION, "")
    assert vectors.matrix.shape == (6, 32) and vectors.matrix.dtype == np.float32
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    expected = [row["embedding"] for row in rows if row["instruction"] == ASK]
    np.testing.assert_array_equal(vectors.matrix, np.array(expected, np.float32))
    assert np.abs(vectors.matrix - read_vectors(folder, "").matrix).max() > 0.01


def test_an_instruction_is_named_where_there_are_several(folder):
    with pytest.raises(DataError, match=r"for 2 instructions, name one of \['', 'What"):
        read_vectors(folder)
    with pytest.raises(DataError, match="no vectors for 'tea'"):
        read_vectors(folder, "tea")
    for path in folder.glob("*.parquet"):
        pq.write_table(pq.read_table(path, filters=[("instruction", "=", ASK)]), path)
    assert len(read_vectors(folder).users) == 6


def test_mixed_revisions_are_named_and_refused(folder):
    part = folder / "part-00001.parquet"
    rewrite(part, revision=pa.array([REVISION, "b" * 64, "b" * 64, "b" * 64]))
    with pytest.raises(DataError, match=r"2 encoder revisions.*: 9 of a{12}, 3 of b{12}\. Embed"):
        read_vectors(folder, ASK)


def test_mapped_vectors_are_not_mixed_with_encoded_ones(folder):
    rewrite(folder / "part-00002.parquet", mapped_from=pa.array(["c" * 64] * 4))
    with pytest.raises(DataError, match=r"8 of a{12}, 4 of a{12} mapped from c{12}"):
        read_vectors(folder, ASK)


def test_vectors_of_several_widths_are_refused(folder):
    narrow = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(4 * 8, np.float32)), 8)
    rewrite(folder / "part-00002.parquet", embedding=narrow)
    with pytest.raises(DataError, match=r"widths \[8, 32\]"):
        read_vectors(folder, ASK)


def test_folders_that_are_not_whole_are_refused(folder, tmp_path):
    last = folder / "part-00002.parquet"
    content = last.read_bytes()
    (folder / ".writing-7-part-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="a run is writing it, or was killed"):
        read_vectors(folder, ASK)
    (folder / ".writing-7-part-00002.parquet").unlink()
    last.rename(folder / "part-00003.parquet")
    with pytest.raises(DataError, match=r"lacks 1 parts, part-00002\.parquet first"):
        read_vectors(folder, ASK)
    last.write_bytes(content)
    with pytest.raises(DataError, match=r"holds part-00003\.parquet, which its _manifest\.json does not know"):
        read_vectors(folder, ASK)
    (folder / "part-00003.parquet").unlink()
    last.write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"part-00002\.parquet is damaged"):
        read_vectors(folder, ASK)
    (folder / "_manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"_manifest\.json is damaged"):
        read_vectors(folder, ASK)
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"_manifest\.json cannot be read"):
            read_vectors(nothing)


def test_a_folder_of_no_parts_is_refused(folder):
    manifest = json.loads((folder / "_manifest.json").read_text())
    del manifest["parts"]  # as persona refresh writes it from an event store
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    assert len(read_vectors(folder, ASK).users) == 6
    for path in folder.glob("*.parquet"):
        path.unlink()
    with pytest.raises(DataError, match="holds no vectors"):
        read_vectors(folder, ASK)


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("embedding", pa.array([[1.0], [1.0], [1.0], [1.0]]), "not a list of a fixed size"),
        ("revision", pa.array([REVISION, None, REVISION, REVISION]), "rows with a null"),
        ("user", pa.array(["ana"] * 4), "the user 'ana' twice"),
        (
            "embedding",
            pa.FixedSizeListArray.from_arrays(pa.array(np.full(4 * 32, np.nan, np.float32)), 32),
            "NaN or an infinity",
        ),
    ],
)
def test_rows_that_make_no_sense_are_refused(column, values, message, folder):
    rewrite(folder / "part-00001.parquet", **{column: values})
    with pytest.raises(DataError, match=message):
        read_vectors(folder, ASK)


def test_a_missing_column_is_refused(folder):
    path = folder / "part-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["revision"]), path)
    with pytest.raises(DataError, match="no column 'revision'"):
        read_vectors(folder, ASK)
