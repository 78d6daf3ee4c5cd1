"""`wrap`: any way to call an LLM, and the same with a user id."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from persona.errors import PersonaError
from persona.history import SourceSpec
from persona.serving.local import Local
from persona.serving.personalizer import CHAT

if TYPE_CHECKING:
    from persona.serving.persona import Persona

MODES = ("auto", "server", "embeds", "text")

T = TypeVar("T")


def wrap(
    target: T,
    persona: Persona | None = None,
    *,
    mode: str = "auto",
    tokens: int | None = None,
    require: bool = False,
    sources: Mapping[str, SourceSpec] | None = None,
) -> T:
    """A twin of `target` that takes `user_id=`; without a user id it does what `target` does. `target` stays as it is.

    - An `openai.OpenAI` or `openai.AsyncOpenAI`: `chat.completions` and `completions` take `user_id` (or OpenAI's own
      `user`), `instruction` and `tokens`; `client.persona` observes and forgets users. See `openai_client`.
    - A `vllm.LLM` started with `enable_prompt_embeds=True`, or a Hugging Face model: see `in_process`.
    - A function (async or not) whose first argument is a prompt or messages: see `wrap_function`.

    `mode` is how the user gets into a request: "server" (the endpoint runs our plug-in and gets the id), "embeds" (a
    plain vLLM gets embeddings), "text" (a short profile in words, for all others), or "auto" (found out at the first
    call that names a user). `tokens` is the default number of user tokens. With `require`, a named user who would be
    answered plainly is a `PersonaError`; otherwise the call is answered without the user, and says so. `sources` are
    a recipe's, whose templates then write the text profiles.

    Raises `PersonaError` for a target, a mode or a persona that do not go together.
    """
    if mode not in MODES:
        raise PersonaError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
    if hasattr(type(target), "_persona_local"):
        raise PersonaError("this is wrapped already; wrap the original")
    if persona is None and mode in ("embeds", "text"):
        raise _missing(f"the mode {mode!r}")
    local = Local(persona, tokens, require, sources)
    if persona is not None:
        local.count(tokens)
    if _is_a(target, "openai", "OpenAI", "AsyncOpenAI"):
        from persona.serving.openai_client import wrap_client

        if mode == "embeds" and persona.personalizer.memory:
            raise PersonaError(
                "this adapter's user tokens are read by cross-attention layers, and a plain endpoint has none: run "
                "`persona serve` with it and wrap a client of that"
            )
        return wrap_client(target, local, mode)
    if _is_a(target, "vllm.entrypoints.llm", "LLM") or _is_a(target, "transformers.modeling_utils", "PreTrainedModel"):
        from persona.serving.in_process import wrap_llm, wrap_model

        _allow(mode, "embeds", persona, "an LLM in this process")
        return (wrap_model if hasattr(target, "get_input_embeddings") else wrap_llm)(target, local)
    if callable(target) and not isinstance(target, type):
        _allow(mode, "text", persona, "a function")
        return wrap_function(target, local)
    raise PersonaError(
        f"{type(target).__name__} cannot be wrapped; wrap takes an OpenAI client, a vllm.LLM, a Hugging Face model or "
        "a function of a prompt"
    )


def wrap_function(function: Callable, local: Local) -> Callable:
    """The function with `user_id` and `instruction`; a profile in words opens the last user turn.

    Its first argument is a text or a list of messages. What it returns is returned as it is. An async function stays
    one, and reads the store in a thread.
    """
    first = _first_parameter(function)

    def edited(args: tuple, kwargs: dict, user: str, instruction: str | None) -> tuple[tuple, dict]:
        given = args[0] if args else kwargs.get(first)
        key = "prompt" if isinstance(given, str) else "messages"
        if not isinstance(given, (str, list, tuple)):
            raise PersonaError(f"{_name(function)} needs a text or a list of messages as its first argument")
        body = {key: given if key == "prompt" else list(given)}
        body, _ = local.edit("text", "/completions" if key == "prompt" else CHAT, body, user, instruction)
        return ((body[key], *args[1:]), kwargs) if args else (args, {**kwargs, first: body[key]})

    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        import anyio

        @functools.wraps(function)
        async def personal(*args, user_id: str | None = None, instruction: str | None = None, **kwargs) -> Any:
            if user_id is not None:
                args, kwargs = await anyio.to_thread.run_sync(
                    edited, args, kwargs, user_id, instruction, abandon_on_cancel=True
                )
            return await function(*args, **kwargs)

        return personal

    @functools.wraps(function)
    def personal(*args, user_id: str | None = None, instruction: str | None = None, **kwargs) -> Any:
        if user_id is not None:
            args, kwargs = edited(args, kwargs, user_id, instruction)
        return function(*args, **kwargs)

    return personal


def _first_parameter(function: Callable) -> str:
    try:
        return next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):  # a built-in that does not say
        return ""


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _is_a(target: object, module: str, *classes: str) -> bool:
    """Whether `target` is of one of the classes, without importing them: an instance's module is there already."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(target, tuple(getattr(loaded, name) for name in classes))


def _allow(mode: str, only: str, persona: Persona | None, what: str) -> None:
    if persona is None:
        raise _missing(f"wrapping {what}")
    if mode not in ("auto", only):
        raise PersonaError(f"{what} is personalised in the mode {only!r}, not {mode!r}")


def _missing(what: str) -> PersonaError:
    return PersonaError(f"{what} needs a persona: wrap(target, Persona.from_pretrained(adapter, engine=None))")
