"""Who may speak for whom: API keys stand for tenants, signed user tokens for one user of a tenant."""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jwt
import yaml

from persona.errors import PersonaError
from persona.history.event import check_user
from persona.serving.server.config import ServerConfig
from persona.serving.server.errors import Refused

TOKEN_HEADER = "x-persona-user-token"
"""Header of the signed user token: a JWT with the claims sub (the user), aud, exp and, beside API keys, tenant."""
SHORTEST_SECRET = 32


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    tenant: str
    """Tenant that the API key belongs to."""
    user: str | None = None
    """The one user that a signed token names; None where no token is asked for."""

    def speaks_for(self, named: str | None) -> str | None:
        """The user a request is about, which names `named`. Raises `Refused` (403) for another than the token's."""
        if self.user is not None and named is not None and named != self.user:
            raise Refused(403, "wrong_user", "the user token was signed for another user than the request names")
        return self.user if named is None else named


class Authenticator:
    """Checks the API key and, where one is asked for, the user token, of every request."""

    def __init__(self, config: ServerConfig):
        self._tenants = _read_keys(config.keys_file) if config.keys_file else {}
        self._key = _jwt_key(config)
        self._algorithm, self._audience = config.jwt_algorithm, config.jwt_audience

    def accept(self, keys: Iterable[str]) -> None:
        """Takes over the API keys that vLLM itself was started with; they stand for the tenant "default"."""
        if self._tenants:
            raise PersonaError("API keys come from vLLM's --api-key and from PERSONA_KEYS_FILE; keep the latter")
        self._tenants = {_digest(key): "default" for key in keys}

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who sent the request with these headers (names in lower case). Raises `Refused` (401)."""
        tenant = "default"
        if self._tenants:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # Looked up by digest, so that the time taken tells nothing about how much of a key was right.
            found = self._tenants.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
            if found is None:
                raise Refused(401, "invalid_api_key", "no API key, or one that is not known (Authorization: Bearer)")
            tenant = found
        return Caller(tenant, self._token_user(headers.get(TOKEN_HEADER), tenant) if self._key else None)

    def _token_user(self, token: str | None, tenant: str) -> str:
        if not token:
            raise Refused(401, "missing_user_token", f"this server needs a signed user token in {TOKEN_HEADER}")
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[self._algorithm],
                audience=self._audience,
                options={"require": ["exp", "aud", "sub"]},
            )
            user = check_user(claims["sub"])
        except jwt.ExpiredSignatureError:
            raise Refused(401, "expired_user_token", "the user token has expired; sign a new one") from None
        except Exception as error:  # a token is the caller's: PyJWT has raised RecursionError for one, too
            raise Refused(401, "invalid_user_token", f"the user token is not valid: {type(error).__name__}") from None
        if claims.get("tenant", "default") != tenant:
            raise Refused(401, "invalid_user_token", "the user token was signed for another tenant than the API key's")
        return user


def cache_salt(secret: bytes, tenant: str) -> str:
    """The prefix cache's salt of a tenant: without the secret nobody can guess it, and tenants share no block."""
    return urlsafe_b64encode(hmac.digest(secret, tenant.encode(), "sha256")).decode("ascii")


def read_secret(path: Path, what: str) -> bytes:
    """A secret of at least 32 bytes from a file, without the white space around it. Raises `PersonaError`."""
    secret = _read(path, what).strip()
    if len(secret) < SHORTEST_SECRET:
        raise PersonaError(f"{what} {path} holds {len(secret)} bytes; use {SHORTEST_SECRET} or more random ones")
    return secret


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PersonaError(f"{what} {path} cannot be read: {error.strerror}") from None


def _jwt_key(config: ServerConfig) -> bytes | None:
    if config.jwt_key_file and config.jwt_key:
        raise PersonaError("PERSONA_JWT_KEY and PERSONA_JWT_KEY_FILE are both set; keep one")
    if config.jwt_key_file:
        key = _read(config.jwt_key_file, "the key of user tokens").strip()
    elif config.jwt_key:
        key = config.jwt_key.get_secret_value().encode()
    else:
        return None
    if config.jwt_algorithm.startswith("HS") and len(key) < SHORTEST_SECRET:
        raise PersonaError(f"the key of user tokens holds {len(key)} bytes; use {SHORTEST_SECRET} or more")
    try:
        jwt.get_algorithm_by_name(config.jwt_algorithm).prepare_key(key)
    except (jwt.PyJWTError, ValueError, TypeError, NotImplementedError) as error:
        raise PersonaError(f"the key of user tokens does not fit {config.jwt_algorithm}: {error}") from None
    return key


def _read_keys(path: Path) -> dict[bytes, str]:
    """SHA-256 of each API key, and its tenant."""
    try:
        tenants = yaml.safe_load(_read(path, "the file of API keys"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise PersonaError(f"the file of API keys {path} is not YAML") from None  # no detail: it would quote keys
    if not isinstance(tenants, dict) or not tenants:
        raise PersonaError(f"{path} must map tenants to API keys, such as `shop: [key-1, key-2]`")
    found: dict[bytes, str] = {}
    for tenant, keys in tenants.items():
        keys = [keys] if isinstance(keys, str) else keys
        if not isinstance(tenant, str) or not isinstance(keys, list) or not keys:
            raise PersonaError(f"{path}: the tenant {tenant!r} needs a name and at least one key")
        check_user(tenant)
        for key in keys:
            if not isinstance(key, str) or len(key) < 8:
                raise PersonaError(f"{path}: a key of tenant {tenant!r} is not a text of 8 or more characters")
            if found.setdefault(_digest(key), tenant) != tenant:
                raise PersonaError(f"{path}: tenants {found[_digest(key)]!r} and {tenant!r} share a key")
    return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
