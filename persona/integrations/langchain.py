"""A middleware of LangChain agents: each model call of a run carries the run's user.

    agent = create_agent(model, tools, middleware=[UserMiddleware()], context_schema=Context)
    agent.invoke({"messages": [...]}, context=Context(user_id="ana"))

The model is a `ChatOpenAI` whose `base_url` is our server. Model calls that other middleware makes by itself, such as
a summary, are not the agent's and name no user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from persona.errors import MissingExtraError, PersonaError
from persona.history.event import check_user
from persona.integrations.headers import request_headers

try:
    from langchain.agents.middleware import AgentMiddleware, ModelRequest
    from langchain_openai.chat_models.base import BaseChatOpenAI
except ImportError as error:
    raise MissingExtraError(
        f"the LangChain middleware needs langchain and langchain-openai ({error}): pip install 'persona[langchain]'"
    ) from error

if TYPE_CHECKING:
    from langgraph.runtime import Runtime


class UserMiddleware(AgentMiddleware):
    """Puts the user's id, and the instruction if there is one, into every model call of an agent.

    Nothing of a user is kept between calls, so one agent serves many users at once. A call raises `PersonaError` when
    it has no user id, or an id, an instruction or a number of tokens that cannot be one, when another user stands in
    the call already, and for a model that is not a `ChatOpenAI`.
    """

    def __init__(
        self,
        user_id: Callable[[Runtime], str] | None = None,
        *,
        instruction: str | Callable[[Runtime], str | None] | None = None,
        tokens: int | None = None,
    ):
        """`user_id` reads the id from the run's `Runtime`; by default it is `user_id` of the run's context.

        `instruction` says what the user tokens are for, the same in each run or read from its `Runtime`; by default
        the server takes the last user turn. `tokens` is the number of user tokens, by default all.
        """
        super().__init__()
        self._user_id, self._instruction, self._tokens = user_id or _context_user, instruction, tokens
        request_headers(None if callable(instruction) else instruction, tokens)

    def wrap_model_call(self, request: ModelRequest, handler: Callable) -> Any:
        """The model call with the user in it."""
        return handler(self._bound(request))

    async def awrap_model_call(self, request: ModelRequest, handler: Callable) -> Any:
        """The model call with the user in it."""
        return await handler(self._bound(request))

    def _bound(self, request: ModelRequest) -> ModelRequest:
        if not isinstance(request.model, BaseChatOpenAI):
            kind = type(request.model).__name__
            raise PersonaError(f"a user id is only sent by a ChatOpenAI that points at our server, not by a {kind}")
        settings, runtime = request.model_settings, request.runtime
        user = self._user_id(runtime)
        if user is None:
            raise PersonaError("the run has no user id: invoke the agent with context=Context(user_id=...)")
        check_user(user)
        bodies = [settings, settings.get("extra_body"), request.model.extra_body]  # the client lets extra_body win
        if any(body.get("user", user) != user for body in bodies if body):
            raise PersonaError("the model call names another user already, in its settings or the model's extra_body")
        instruction = self._instruction(runtime) if callable(self._instruction) else self._instruction
        headers = {**(settings.get("extra_headers") or {}), **request_headers(instruction, self._tokens)}
        more = {"extra_headers": headers} if headers else {}
        return request.override(model_settings={**settings, "user": user, **more})


def _context_user(runtime: Runtime) -> str | None:
    """`user_id` of the run's context, an object or a mapping; None without one."""
    context = runtime.context
    return context.get("user_id") if isinstance(context, Mapping) else getattr(context, "user_id", None)
