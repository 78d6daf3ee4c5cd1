"""Small files in the official schema, and an adapter whose encoder has learned their clicks."""

import json

import pyarrow
import pytest
import torch

from persona.encoders import EncoderConfig, UserEncoder, Vocabulary
from persona.evaluation.uqa.official import IDS, SOURCES, TEXT, TOKENS, OfficialFile, to_history
from persona.injection import PersonalizedLM, load_llm

BAGS = pyarrow.list_(pyarrow.list_(pyarrow.int64()))
SCHEMA = pyarrow.schema([(column, BAGS) for column in (*IDS.values(), *TOKENS.values())])
ALIGN = SCHEMA.append(pyarrow.field(TEXT, pyarrow.string()))
QUESTIONS = (
    "用户最近第1次浏览的商品的品牌是什么？",
    "用户的行为序列长度是多少？",
    "用户下一个可能点击的商品的标题是什么？",
    "用户下一个可能点击的商品的店铺是什么？",
    "用户最感兴趣的3个品牌是什么？",
    "用户近期最感兴趣的类目是什么？",
    "用户的类目偏好的转移路径是什么？",
)
"""One for each sub-task."""


def official_row(items, question=None, answer="A"):
    """A row whose ids and tokens follow from its items; `question` makes it one of an align file."""
    row = {column: [[item % (7 + n)] for item in items] for n, column in enumerate(IDS.values())}
    row[IDS["item"]] = [[item] for item in items]
    row |= {column: [[item % 50, n] for item in items] for n, column in enumerate(TOKENS.values())}
    if question is not None:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row[TEXT] = json.dumps(turns, ensure_ascii=False)
    return row


def write_rows(path, rows, schema=None, chunk=None):
    """Writes an Arrow IPC file, `chunk` rows to a record batch."""
    schema = schema or (ALIGN if rows and TEXT in rows[0] else SCHEMA)
    with pyarrow.ipc.new_file(path, schema) as writer:
        writer.write_table(pyarrow.Table.from_pylist(rows, schema), max_chunksize=chunk)
    return path


@pytest.fixture
def write(tmp_path):
    """Writes rows as an official file and gives its path."""
    return lambda rows, schema=None, chunk=None: write_rows(tmp_path / "align_data_eval.arrow", rows, schema, chunk)


@pytest.fixture(scope="session")
def rows():
    """14 questions, two of each sub-task, of users with 0 to 13 clicks."""
    return [official_row(range(n, 2 * n), question) for n, question in enumerate(QUESTIONS * 2)]


@pytest.fixture(scope="session")
def model(rows, tmp_path_factory, llm_path, text_encoder):
    """An untrained adapter on the tiny Llama, whose encoder knows the ids in `rows`."""
    file = OfficialFile(write_rows(tmp_path_factory.mktemp("uqa") / "align_data_train.arrow", rows))
    vocabulary = Vocabulary.fit((to_history(row, "user") for row in file), SOURCES)
    torch.manual_seed(1)
    config = EncoderConfig(width=32, heads=2, layers=2, tokens=4, max_events=64, dropout=0.0)
    encoder = UserEncoder(config, vocabulary, text_encoder)
    torch.manual_seed(2)
    llm, tokenizer = load_llm(llm_path)
    return PersonalizedLM(llm, tokenizer, encoder, base_model=str(llm_path)).eval()


@pytest.fixture(scope="session")
def questions():
    return QUESTIONS


@pytest.fixture(scope="session")
def make_row():
    return official_row
