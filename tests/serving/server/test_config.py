"""Settings come from the environment; what is wrong with one is said with its name."""

import pytest

from persona.errors import PersonaError
from persona.serving.server.config import ServerConfig


def test_settings_are_read_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PERSONA_ADAPTER", "folder")
    monkeypatch.setenv("PERSONA_BUDGET_MS", "12.5")
    monkeypatch.setenv("PERSONA_REQUIRE_PERSONALIZATION", "true")
    monkeypatch.setenv("PERSONA_KEYS_FILE", str(tmp_path))
    monkeypatch.setenv("PERSONA_JWT_KEY", "a secret that nobody should see")
    config = ServerConfig.load(llm=None, store="sqlite:///x.db")
    assert (config.adapter, config.budget_ms, config.require_personalization) == ("folder", 12.5, True)
    assert (config.store, config.keys_file, config.llm) == ("sqlite:///x.db", tmp_path, None)
    assert "nobody should see" not in repr(config)
    assert ServerConfig.load(budget_ms=7).budget_ms == 7


@pytest.mark.parametrize(
    "name, value",
    [
        ("budget_ms", "0"),
        ("budget_ms", "soon"),
        ("encode_threads", "0"),
        ("max_pending", "0"),
        ("max_body", "10"),
        ("cache_mib", "-1"),
        ("jwt_algorithm", "none"),
        ("jwt_algorithm", "HS257"),
        ("require_personalization", "perhaps"),
    ],
)
def test_an_error_names_the_variable(monkeypatch, name, value):
    monkeypatch.setenv(f"PERSONA_{name.upper()}", value)
    with pytest.raises(PersonaError, match=f"^PERSONA_{name.upper()}: "):
        ServerConfig.load(adapter="folder")


def test_the_adapter_is_needed(monkeypatch):
    monkeypatch.delenv("PERSONA_ADAPTER", raising=False)
    with pytest.raises(PersonaError, match=r"^PERSONA_ADAPTER: field required"):
        ServerConfig.load()
