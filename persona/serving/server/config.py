"""`ServerConfig`: all settings of the server plug-in, read from environment variables that begin with PERSONA_."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from persona.errors import PersonaError


class ServerConfig(BaseSettings):
    """Settings of the plug-in and the gateway; the field `budget_ms` is the variable PERSONA_BUDGET_MS.

    Read it with `ServerConfig.load()`, whose errors name the variable.
    """

    model_config = SettingsConfigDict(env_prefix="PERSONA_", extra="forbid", frozen=True)

    adapter: str
    """Folder or hub name of the adapter."""
    llm: str | None = None
    """Folder or hub name of the LLM that is served; the adapter's own by default. Only its tokenizer, configuration
    and input embeddings are read."""
    store: str = "sqlite:///persona.db"
    """Database URL of the event store."""
    keys_file: Path | None = None
    """YAML file that maps each tenant to its API keys; None lets every caller in, all of one tenant."""
    secret_file: Path | None = None
    """File of the secret that tenants' cache salts are made from; by default a new one at every start."""
    jwt_key_file: Path | None = None
    """File of the key that checks user tokens: a PEM public key, or a shared secret of 32 bytes or more."""
    jwt_key: SecretStr | None = None
    """The same key itself, where a file is not at hand. With either, every call needs a token."""
    jwt_algorithm: Literal["HS256", "HS384", "HS512", "RS256", "ES256", "EdDSA"] = "HS256"
    """The one signature algorithm that is accepted."""
    jwt_audience: str = "persona"
    """The audience (`aud`) that user tokens must be made out to."""
    require_personalization: bool = False
    """Answer 503 instead of plainly when a named user's tokens cannot be had; 400 where the request is the reason."""
    budget_ms: float = Field(1000.0, gt=0)
    """Milliseconds that encoding may take before the call is answered plainly."""
    encode_threads: int = Field(8, ge=1)
    """Threads that read the store and encode users; those of concurrent requests share forward passes."""
    max_pending: int = Field(256, ge=1)
    """Requests that may wait for these threads; further ones are answered plainly."""
    max_body: int = Field(2 * 2**20, ge=1024)
    """Bytes; a longer request body is refused with 413."""
    cache_mib: float = Field(256.0, gt=0)
    """Memory for the states of users and for the events behind them, in MiB; those that were not asked for for the
    longest time go first."""
    cache_url: str | None = None
    """Where servers share the states of users: a URL as redis://host:6379/0, or `store`, which is the event store's
    database; None leaves each server with its own memory."""
    cache_ttl: float = Field(7 * 86400.0, ge=1)
    """Seconds for which Redis keeps a state after it was last made."""
    device: str = "cpu"
    """Where the user encoder runs; the GPU is the LLM's."""
    upstream: str | None = None
    """URL of a vLLM on another host; with it the application is a gateway in front of that server."""
    upstream_key: SecretStr | None = None
    """API key that the gateway shows to the upstream server, in place of the caller's."""

    @classmethod
    def load(cls, **given) -> ServerConfig:
        """Settings from the environment, `given` ones first. Raises `PersonaError` that names the bad variable."""
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            name = "_".join(str(part) for part in first["loc"]).upper()
            raise PersonaError(f"PERSONA_{name}: {first['msg'].lower()}; see persona serve --help") from None
