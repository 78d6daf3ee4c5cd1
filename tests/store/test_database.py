"""URLs of databases, and what messages show of them."""

import traceback

import pytest

from persona.errors import PersonaError
from persona.store import EventStore


@pytest.mark.parametrize("url, message", [("nonsense", "not a database URL"), ("mssql://x/y", "works with sqlite")])
def test_urls_that_cannot_work(url, message):
    with pytest.raises(PersonaError, match=message):
        EventStore(url)


@pytest.mark.parametrize(
    "url",
    [
        "mssql://bob:hunter2@host/db",
        "mysql://bob@host/db?password=hunter2",
        "postgresql+nodriver://bob:hunter2@host/db",
        "postgresql://bob:x@host:hunter2/db",
        "postgresql//bob:hunter2@host/db",
        "hunter2",
        "postgresql+psycopg://bob:hunter2@127.0.0.1:1/db",
    ],
)
def test_no_message_shows_a_password(url):
    with pytest.raises(PersonaError) as error:
        EventStore(url)
    report = "".join(traceback.format_exception(error.value, chain=True))
    assert "hunter2" not in str(error.value) and "hunter2" not in report


def test_a_message_shows_the_rest_of_the_url():
    with pytest.raises(PersonaError, match=r"mssql://bob:\*\*\*@host/db"):
        EventStore("mssql://bob:hunter2@host/db")
    with pytest.raises(PersonaError, match="the given postgresql:// URL is not a database URL"):
        EventStore("postgresql://bob:x@host:port/db")
