"""The headers that the integrations send are those that the server reads."""

import pytest

from persona.errors import PersonaError
from persona.integrations import headers
from persona.serving import personalizer
from persona.serving.server import auth, requests


def test_the_names_are_the_servers():
    assert headers.INSTRUCTION_HEADER == personalizer.INSTRUCTION_HEADER
    assert headers.COUNT_HEADER == personalizer.COUNT_HEADER
    assert headers.USER_TOKEN_HEADER == auth.TOKEN_HEADER


def test_the_server_reads_what_was_said():
    said = headers.request_headers("Which music?\n♪ 100%", 3)
    assert all(value.isascii() and value.isprintable() for value in said.values())
    assert requests.instruction_of(said) == "Which music?\n♪ 100%" and requests.count_of(said, most=4) == 3
    assert headers.request_headers() == {}


@pytest.mark.parametrize(
    "bad", [{"instruction": " "}, {"instruction": 7}, {"instruction": "\ud800"}, {"tokens": 0}, {"tokens": True}]
)
def test_what_cannot_be_said_is_refused(bad):
    with pytest.raises(PersonaError, match=r"instruction|user tokens"):
        headers.request_headers(**bad)
