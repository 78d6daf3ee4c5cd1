"""Keys, tokens, tenants: who may speak for whom."""

import base64
import hmac
import json
import time

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from persona.errors import PersonaError
from persona.serving.server.auth import Authenticator, cache_salt, read_secret
from persona.serving.server.config import ServerConfig
from persona.serving.server.errors import Refused

CHAT = "/v1/chat/completions"
KEY = "k" * 32
ROUTES = [CHAT, "/v1/completions", "/v1/models", "/tokenize", "/v1/embeddings", "/persona/v1/events", "/persona/docs"]


def token(sub="ana", key=KEY, algorithm="HS256", **claims):
    claims = {"sub": sub, "aud": "persona", "exp": time.time() + 60, **claims}
    return jwt.encode({k: v for k, v in claims.items() if v is not None}, key, algorithm)


def asked(user=None):
    return {"messages": [{"role": "user", "content": "What next?"}], **({"user": user} if user else {})}


@pytest.fixture(scope="module")
def pair():
    """An RSA key, private and public, as PEM."""
    private = rsa.generate_private_key(65537, 2048)
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return private.private_bytes(serialization.Encoding.PEM, *form), public


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong-key", "Basic shop-key-1", "shop-key-1", "Bearer schlüssel"]
)
def test_without_a_known_key_nothing_is_read(make, call, vllm, faulty, keys, path, header):
    app = make(keys_file=keys)
    reply = call(app, "POST", path, b"x" * 100, {} if header is None else {"authorization": header})
    assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer" and reply.json["error"]["type"] == "authentication_error"
    assert (reply.taken, faulty.calls, app.service.encoding.states.misses, vllm.requests) == (0, 0, 0, [])


def test_refusals_are_counted(make, call, keys, counted):
    app = make(keys_file=keys)
    call(app, "POST", CHAT, asked())
    assert counted(app, "persona_requests_total", route=CHAT, outcome="refused", reason="invalid_api_key") == 1


@pytest.mark.parametrize(
    "path", ["/health", "/ping", "/metrics", "/persona/v1/health", "/persona/v1/ready", "/persona/metrics"]
)
def test_probes_need_no_key(make, call, keys, path):
    assert call(make(keys_file=keys), "GET", path, b"").status == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_stands_for_its_tenant(make, call, store, keys, scheme):
    app = make(keys_file=keys)
    store.append("ana", [{"source": "search", "timestamp": 1, "text": "tea"}], tenant="shop")
    for key, outcome in (("shop-key-1", "personalized"), ("shop-key-2", "personalized"), ("cinema-key", "plain")):
        headers = {"authorization": f"{scheme} {key}"}
        assert call(app, "POST", CHAT, asked("ana"), headers).outcome[0] == outcome
        history = call(app, "POST", "/persona/v1/history", {"user": "ana"}, headers).json
        assert history["count"] == (1 if outcome == "personalized" else 0)
    erased = call(app, "POST", "/persona/v1/forget", {"user": "ana"}, {"authorization": "Bearer cinema-key"}).json
    assert erased == {"erased": 0} and store.count("ana", tenant="shop") == 1


def test_a_token_names_the_user(make, call, ana):
    app = make(jwt_key=KEY)
    headers = {"x-persona-user-token": token()}
    assert call(app, "POST", CHAT, asked(), headers).outcome == ("personalized", None)
    assert call(app, "POST", CHAT, asked("ana"), headers).outcome == ("personalized", None)
    assert call(app, "POST", "/persona/v1/history", {}, headers).json["count"] == 2


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/completions", *(f"/persona/v1/{n}" for n in ("history", "export", "forget"))]
)
def test_nobody_speaks_for_another_user(make, call, vllm, ana, store, path):
    app = make(jwt_key=KEY)
    body = {"user": "ana", **({"messages": [], "prompt": "x"} if path.startswith("/v1") else {})}
    reply = call(app, "POST", path, body, {"x-persona-user-token": token("eve")})
    assert (reply.status, reply.json["error"]["code"]) == (403, "wrong_user")
    assert "ana" not in reply.json["error"]["message"] and not vllm.requests and store.count("ana") == 2


def forged():
    claims = json.dumps({"sub": "ana", "aud": "persona", "exp": time.time() + 60}).encode()

    def forge(header, signature=b"x"):
        return ".".join(base64.urlsafe_b64encode(p).rstrip(b"=").decode() for p in (header, claims, signature))

    return {
        "nothing": None,
        "empty": "",
        "no token": "abc",
        "not ascii": "ä.ö.ü",
        "another key": token(key="x" * 32),
        "expired": token(exp=time.time() - 1),
        "no expiry": token(exp=None),
        "no audience": token(aud=None),
        "another audience": token(aud="billing"),
        "no user": token(sub=None),
        "empty user": token(sub=""),
        "long user": token(sub="x" * 257),
        "not yet": token(nbf=time.time() + 60),
        "another tenant": token(tenant="cinema"),
        "tenant of another type": token(tenant=["default"]),
        "another algorithm": token(key="k" * 64, algorithm="HS512"),
        "alg none": jwt.encode({"sub": "ana", "aud": "persona", "exp": time.time() + 60}, None, "none"),
        "alg None without signature": forge(b'{"alg": "None"}', b""),
        "no signature": token().rpartition(".")[0] + ".",
        "changed": token()[:-4] + "AAAA",
        "header of lists": forge(b"[" * 20_000),
        "header of objects": forge(b'{"a":' * 9000),
        "header without alg": forge(b"{}"),
        "unknown critical": jwt.encode({"sub": "ana"}, KEY, headers={"crit": ["x"]}),
    }


@pytest.mark.parametrize("name", forged())
@pytest.mark.parametrize("path", [CHAT, "/persona/v1/history"])
def test_tokens_that_do_not_hold(make, call, vllm, ana, name, path):
    bad = forged()[name]
    reply = call(make(jwt_key=KEY), "POST", path, asked(), {} if bad is None else {"x-persona-user-token": bad})
    code = {"nothing": "missing_user_token", "empty": "missing_user_token", "expired": "expired_user_token"}
    assert (reply.status, reply.json["error"]["code"]) == (401, code.get(name, "invalid_user_token"))
    assert reply.taken == 0 and not vllm.requests and "ana" not in reply.json["error"]["message"]


def test_keys_and_tokens_together(make, call, store, keys):
    app = make(keys_file=keys, jwt_key=KEY)
    store.append("ana", [{"source": "search", "timestamp": 1, "text": "tea"}], tenant="shop")

    def ask(key, signed):
        headers = {"authorization": f"Bearer {key}", "x-persona-user-token": signed}
        return call(app, "POST", CHAT, asked(), headers)

    assert ask("shop-key-1", token(tenant="shop")).outcome == ("personalized", None)
    assert ask("cinema-key", token(tenant="cinema")).outcome == ("plain", "unknown-user")
    for key, signed in (("cinema-key", token(tenant="shop")), ("shop-key-1", token()), ("wrong", token(tenant="shop"))):
        assert ask(key, signed).status == 401


def test_public_keys_and_confusion(make, call, ana, pair, tmp_path):
    private, public = pair
    file = tmp_path / "public.pem"
    file.write_bytes(public)
    app = make(jwt_key_file=file, jwt_algorithm="RS256")
    good = {"x-persona-user-token": token(key=private, algorithm="RS256")}
    assert call(app, "POST", CHAT, asked(), good).outcome == ("personalized", None)
    header, payload = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (
        {"alg": "HS256", "typ": "JWT"}, {"sub": "ana", "aud": "persona", "exp": time.time() + 60}
    ))  # fmt: skip
    for secret in (public, public.strip()):
        signed = base64.urlsafe_b64encode(hmac.digest(secret, header + b"." + payload, "sha256")).rstrip(b"=")
        confused = b".".join([header, payload, signed]).decode()
        assert call(app, "POST", CHAT, asked(), {"x-persona-user-token": confused}).status == 401
    assert call(app, "POST", CHAT, asked(), {"x-persona-user-token": token()}).status == 401


def config(**settings):
    return ServerConfig(adapter="unused", **settings)


def test_bad_keys_of_tokens(pair, tmp_path):
    file = tmp_path / "key"
    file.write_bytes(pair[1])
    with pytest.raises(PersonaError, match="does not fit HS256"):
        Authenticator(config(jwt_key_file=file))
    with pytest.raises(PersonaError, match="keep one"):
        Authenticator(config(jwt_key_file=file, jwt_key=KEY))
    with pytest.raises(PersonaError, match="31 bytes"):
        Authenticator(config(jwt_key="x" * 31))
    with pytest.raises(PersonaError, match="does not fit RS256"):
        Authenticator(config(jwt_key=KEY, jwt_algorithm="RS256"))
    with pytest.raises(PersonaError, match="cannot be read"):
        Authenticator(config(jwt_key_file=tmp_path / "none"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must map"),
        ("[a, b]", "must map"),
        ("shop: short", "8 or more"),
        ("shop: [12345678]", "8 or more"),
        ("shop: []", "at least one key"),
        ("shop:", "at least one key"),
        ("1: long-enough-key", "needs a name"),
        ("a: same-key-1\nb: same-key-1", "share a key"),
        ("{long-enough-key", "is not YAML"),
        ("'': long-enough-key", "1 to 256"),
    ],
)
def test_bad_files_of_keys(tmp_path, text, message):
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(PersonaError, match=message) as error:
        Authenticator(config(keys_file=file))
    assert "long-enough-key" not in str(error.value) and "same-key" not in str(error.value)


def test_keys_that_vllm_was_started_with(keys):
    auth = Authenticator(config())
    assert auth.caller({}).tenant == "default"
    auth.accept(["vllm-key"])
    assert auth.caller({"authorization": "Bearer vllm-key"}).tenant == "default"
    with pytest.raises(Refused):
        auth.caller({})
    with pytest.raises(PersonaError, match="keep the latter"):
        Authenticator(config(keys_file=keys)).accept(["vllm-key"])


def test_secrets(tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(b" " + b"s" * 31 + b"\n")
    with pytest.raises(PersonaError, match="31 bytes"):
        read_secret(file, "the secret")
    assert len({cache_salt(b"s" * 32, "a"), cache_salt(b"s" * 32, "b"), cache_salt(b"t" * 32, "a")}) == 3
    assert cache_salt(b"s" * 32, "a") == cache_salt(b"s" * 32, "a")
