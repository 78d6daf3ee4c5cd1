"""A hook of the LiteLLM proxy: our server personalises for the caller whom the proxy has authenticated.

Without it LiteLLM drops OpenAI's field `user` before every model that is not OpenAI's own, and passes on whomever a
caller names in `extra_body`. The hook acts on deployments with `persona: true` in their `model_info`, in chats and
completions (and what LiteLLM makes these of); all else passes as it is. It needs `persona serve` behind the deployment
(our server or gateway): nothing is encoded in the proxy, so a plain vLLM would not know the user.

Whose request it is:

1. The key's user (`user_id` of a virtual key or of a verified JWT), if it has one. A request that names anybody else,
   in whatever field or header LiteLLM reads a user or customer from, is refused (403).
2. Otherwise (the master key, a service account's key, a proxy without keys) the one whom the request names: `user`, or
   the customer LiteLLM found (its customer headers, `user_header_mappings`, `metadata.user_id`, a JWT's claim).
   Two different names are refused (400).

The binding is done on the deployment that LiteLLM has chosen, so that fallbacks and aliases do not lead around it.
Answers for our models are neither read from LiteLLM's response cache nor written to it: an answer belongs to one user
and to what is known of that user now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from persona.errors import MissingExtraError, PersonaError
from persona.history.event import check_user
from persona.integrations.headers import COUNT_HEADER, INSTRUCTION_HEADER, USER_TOKEN_HEADER, request_headers

try:
    from fastapi import HTTPException
    from litellm.constants import LITELLM_PROXY_ADMIN_NAME
    from litellm.integrations.custom_logger import CustomLogger
    from litellm.proxy._types import UserAPIKeyAuth
except ImportError as error:
    raise MissingExtraError(
        f"the LiteLLM hook needs LiteLLM's proxy ({error}): pip install 'persona[litellm]'"
    ) from error

CALLS = ("completion", "acompletion", "text_completion", "atext_completion")
"""LiteLLM's names of chats and completions."""
UNCACHED = {"no-cache": True, "no-store": True}
"""LiteLLM's words for an answer that is neither read from its cache nor kept there."""
_OUTCOME = "llm_provider-x-persona"
"""What LiteLLM calls our server's answer headers."""


class PersonaHook(CustomLogger):
    """Loaded by `callbacks: persona.integrations.litellm.hook`; see the module for what it does."""

    async def async_pre_call_hook(self, user_api_key_dict: Any, cache: Any, data: dict, call_type: str) -> None:
        """Refuses a bad request for one of our models at once, before it could count as the deployment's failure."""
        if call_type in CALLS and _is_ours(data.get("model")):
            _bound(data, user_api_key_dict)

    async def async_pre_call_deployment_hook(self, kwargs: dict, call_type: Any) -> dict | None:
        """The request with its user and our headers in it, if it goes to a deployment of ours."""
        if not _is_marked(kwargs):
            return None
        if call_type not in CALLS:  # LiteLLM makes a chat of some, and comes here again; it would cache them out here
            return {**kwargs, "cache": UNCACHED}
        caller = _metadata(kwargs).get("user_api_key_auth")
        if not isinstance(caller, UserAPIKeyAuth):  # a fallback in the request may bring metadata of its own, in JSON
            caller = None
        return {**_bound(kwargs, caller), "cache": UNCACHED}

    async def async_post_call_response_headers_hook(
        self, data: dict, user_api_key_dict: Any, response: Any, request_headers: Any = None
    ) -> dict[str, str]:
        """What became of the user, under our server's own names."""
        found = (getattr(response, "_hidden_params", None) or {}).get("additional_headers") or {}
        return {name.removeprefix("llm_provider-"): found[name] for name in found if name.startswith(_OUTCOME)}


hook = PersonaHook()
"""The instance for the proxy's `callbacks`."""


def _is_ours(model: object) -> bool:
    """Whether a deployment of this model group, as the caller calls it, is marked."""
    from litellm.proxy.proxy_server import llm_router

    found = llm_router.get_model_list(model_name=model) if llm_router and isinstance(model, str) else None
    return any(_is_marked(deployment) for deployment in found or [])


def _is_marked(deployment: Mapping) -> bool:
    return (deployment.get("model_info") or {}).get("persona") is True


def _bound(request: dict, caller: Any) -> dict:
    """The request for our server. Raises `HTTPException` (400, 403); see the module."""
    body, given = request.get("extra_body") or {}, request.get("extra_headers") or {}
    if not isinstance(body, Mapping) or not isinstance(given, Mapping):
        raise _refused(400, "extra_body and extra_headers must be objects")
    user, headers = _user(request, body, caller), _headers(request)
    kept = {name: value for name, value in given.items() if name.lower() not in headers}
    bound = {**request, "extra_headers": {**kept, **headers}}
    if user is not None:  # in extra_body, as LiteLLM takes the field itself for OpenAI's models only
        bound |= {"user": user, "extra_body": {**body, "user": user}}
    return bound


def _user(request: Mapping, body: Mapping, caller: Any) -> str | None:
    """The user whom the request is about."""
    customer = getattr(caller, "end_user_id", None)
    named = [name for name in (request.get("user"), body.get("user"), customer) if name is not None]
    if caller is None and named:  # a call of LiteLLM's own, such as a health check, names nobody
        raise _refused(403, "the caller of this request is not known, so it cannot name a user")
    own = getattr(caller, "user_id", None)
    if own == LITELLM_PROXY_ADMIN_NAME:  # the master key's, which stands for nobody
        own = None
    if own is not None and any(name != own for name in named):
        raise _refused(
            403,
            "the key belongs to one user and the request names another (user, extra_body.user, a customer header, "
            "metadata.user_id or safety_identifier); leave the name out, or use a service account's key, which has "
            "no user of its own",
        )
    if any(name != named[0] for name in named):
        raise _refused(400, "the request names two users (user, extra_body.user, a customer header); name one")
    user = own if own is not None else next(iter(named), None)
    try:
        return user if user is None else check_user(user)
    except PersonaError as error:
        raise _refused(400, str(error)) from None


def _headers(request: Mapping) -> dict[str, str]:
    """Our headers, as the caller sent them to the proxy or said in the request's metadata."""
    sent = (request.get("secret_fields") or {}).get("raw_headers") or {}
    headers = {n: sent[n] for n in (INSTRUCTION_HEADER, COUNT_HEADER, USER_TOKEN_HEADER) if sent.get(n)}
    metadata = _metadata(request)
    try:
        said = request_headers(metadata.get("persona_instruction"), metadata.get("persona_tokens"))
    except PersonaError as error:
        raise _refused(400, f"metadata: {error}") from None
    for name, value in said.items():
        if headers.setdefault(name, value) != value:
            raise _refused(400, f"the header {name} and the metadata say different things; keep one")
    return headers


def _metadata(request: Mapping) -> Mapping:
    """The caller's metadata with what the proxy adds; LiteLLM has two names for it."""
    return {**(request.get("litellm_metadata") or {}), **(request.get("metadata") or {})}


def _refused(status: int, message: str) -> HTTPException:
    return HTTPException(status, {"error": f"persona: {message}"})
