"""LLMs in this process with a user id: a `vllm.LLM` and a Hugging Face model.

A twin is of the LLM's own class and is the LLM in everything else: both share all their state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from persona.errors import PersonaError
from persona.injection.soft_prompt import Prompt
from persona.serving.local import Local, per_prompt
from persona.serving.memory import check_layers
from persona.serving.personalizer import CHAT, Outcome
from persona.serving.rows import check_rows
from persona.serving.vllm_memory import ROLE
from persona.serving.vllm_offline import vllm_input

LLM = TypeVar("LLM")
Users = str | None | Sequence[str | None]
"""One user for all prompts, or one for each."""


def wrap_llm(llm: LLM, local: Local) -> LLM:
    """A twin of a `vllm.LLM` whose `generate` and `chat` take `user_id`, `instruction` and `tokens`.

    Raises `PersonaError` for one that was started without `enable_prompt_embeds`, or whose width is another.
    """
    config = llm.llm_engine.model_config
    if not config.enable_prompt_embeds:
        raise PersonaError("start this LLM with vllm.LLM(..., enable_prompt_embeds=True)")
    _check_width(local, config.get_hidden_size())
    check_layers(local.persona.personalizer.memory, vars(config.hf_config), config.model)
    return _twin(llm, _PersonalLLM, local)


def wrap_model(model: LLM, local: Local) -> LLM:
    """A twin of a Hugging Face model whose `generate` takes `user_id`, `instruction` and `tokens`.

    Raises `PersonaError` for a model whose width is another than the adapter's LLM's.
    """
    _check_width(local, model.get_input_embeddings().weight.shape[1])
    if local.persona.personalizer.memory:
        raise PersonaError(
            "this adapter's user tokens are read by cross-attention layers, which this model does not have; "
            "PersonalizedLM.from_pretrained(adapter) adds them to its own copy"
        )
    return _twin(model, _PersonalModel, local)


class _PersonalLLM:
    """What a wrapped `vllm.LLM` does differently. Its outputs say in `persona` what became of the user."""

    _persona_local: Local

    def generate(
        self,
        prompts,
        sampling_params=None,
        *,
        user_id: Users = None,
        instruction: str | None = None,
        tokens: int | None = None,
        **kwargs,
    ):
        """As `vllm.LLM.generate`, with one user for all prompts or one for each.

        Prompts are text or token ids; those of other kinds are answered plainly. `instruction` defaults to each
        prompt's last user turn. Raises `PersonaError` for another number of users, and for `prompt_logprobs`.
        """
        memory = self._persona_local.persona.personalizer.memory
        if user_id is None and not memory:
            return super().generate(prompts, sampling_params, **kwargs)
        if memory:
            _check_memory(kwargs)
        _check_sampling(sampling_params)
        listed = _listed(prompts)
        placed = [
            self._persona_input(prompt, user, instruction, tokens)
            for prompt, user in zip(listed, per_prompt(user_id, len(listed)))
        ]
        outputs = super().generate([prompt for prompt, _ in placed], sampling_params, **kwargs)
        return _noted(outputs, [outcome for _, outcome in placed])

    def chat(
        self,
        messages,
        sampling_params=None,
        *args,
        user_id: Users = None,
        instruction: str | None = None,
        tokens: int | None = None,
        **kwargs,
    ):
        """As `vllm.LLM.chat`, with one user for all conversations or one for each; see `generate`."""
        memory = self._persona_local.persona.personalizer.memory
        if user_id is None and not memory:
            return super().chat(messages, sampling_params, *args, **kwargs)
        if memory:
            if args:
                raise PersonaError("name all arguments of chat() but the messages and the sampling parameters")
            _check_memory(kwargs, [messages] if messages and isinstance(messages[0], dict) else messages)
        _check_sampling(sampling_params)
        chats = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        local = self._persona_local
        edited = [
            (local.persona.personalizer.plain(CHAT, {"messages": chat}), Outcome(False, "no-user"))
            if user is None
            else local.edit("embeds", CHAT, {"messages": chat}, user, instruction, tokens)
            for chat, user in zip(chats, per_prompt(user_id, len(chats)))
        ]
        outputs = super().chat([body["messages"] for body, _ in edited], sampling_params, *args, **kwargs)
        return _noted(outputs, [outcome for _, outcome in edited])

    def enqueue(self, *args, **kwargs):
        """As `vllm.LLM.enqueue`. Raises `PersonaError` where the LLM needs user tokens."""
        return self._persona_stock("enqueue", args, kwargs)

    def enqueue_chat(self, *args, **kwargs):
        """As `vllm.LLM.enqueue_chat`. Raises `PersonaError` where the LLM needs user tokens."""
        return self._persona_stock("enqueue_chat", args, kwargs)

    def beam_search(self, *args, **kwargs):
        """As `vllm.LLM.beam_search`. Raises `PersonaError` where the LLM needs user tokens."""
        return self._persona_stock("beam_search", args, kwargs)

    def _persona_stock(self, name: str, args: tuple, kwargs: dict):
        if self._persona_local.persona.personalizer.memory:
            raise PersonaError(f"{name}() brings no user tokens, which this LLM needs; use generate() or chat()")
        return getattr(super(), name)(*args, **kwargs)

    def _persona_input(self, given, user: str | None, instruction: str | None, tokens: int | None):
        """A prompt with the user's rows as vLLM takes it, and the outcome."""
        local, template = self._persona_local, self._persona_local.persona.model.template
        memory, prompt = local.persona.personalizer.memory, _text_or_ids(given)
        if prompt is None:
            if memory:
                raise PersonaError("this LLM takes text or token ids only, as it needs user tokens in front of them")
            return given, Outcome(False, "no-user-turn")
        rows, outcome = local.rows(user, instruction or template.instruction(prompt), tokens)
        if rows is None and not memory:
            return given, outcome
        salt = {"cache_salt": given["cache_salt"]} if isinstance(given, dict) and "cache_salt" in given else {}
        return vllm_input(self, template.place(prompt, 0 if rows is None else len(rows)), rows) | salt, outcome


class _PersonalModel:
    """What a wrapped Hugging Face model does differently."""

    _persona_local: Local

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args,
        user_id: Users = None,
        instruction: str | None = None,
        tokens: int | None = None,
        **kwargs,
    ):
        """As the model's own `generate`, with one user for the whole batch or one for each row.

        `input_ids` `[B, L]` (or `inputs`), padded on either side as `attention_mask` says, become `inputs_embeds` with
        the users' rows in them. So, as ever with `inputs_embeds`, only new tokens `[B, new]` are returned, for rows
        that are answered plainly as well. `instruction` defaults to each row's last user turn.
        """
        if user_id is None:
            return super().generate(inputs, *args, **kwargs)
        ids = kwargs.pop("input_ids", inputs)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or kwargs.get("inputs_embeds") is not None:
            raise PersonaError("with a user id, generate() needs input_ids of shape [B, L]")
        given = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(ids) if given is None else given
        embeds, mask = self._persona_embeds(ids, mask, per_prompt(user_id, len(ids)), instruction, tokens)
        return super().generate(None, *args, inputs_embeds=embeds, attention_mask=mask, **kwargs)

    def _persona_embeds(self, ids, mask, users, instruction, tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[B, L', width]` with the users' rows, left-padded, and their mask `[B, L']`."""
        local, model = self._persona_local, self._persona_local.persona.model
        prompts, rows = [], []
        for row, kept, user in zip(ids, mask, users):
            prompt = row[kept.bool()].tolist()
            own, _ = local.rows(user, instruction or model.template.instruction(prompt), tokens)
            prompts.append(Prompt(prompt, 0, 0) if own is None else model.template.place(prompt, len(own)))
            rows.extend([] if own is None else [own])
        batch = model.collate(prompts)
        embeds = self.get_input_embeddings()(batch.input_ids.to(ids.device))
        if rows:
            soft = torch.cat(rows).to(embeds)  # [S, width], in the dtype in which a small row may become zero
            check_rows(soft, embeds.shape[-1])
            embeds = embeds.masked_scatter(batch.soft.to(ids.device)[..., None], soft)
        return embeds, batch.attention_mask.to(ids.device)


def _twin(original: LLM, mixin: type, local: Local) -> LLM:
    kind = type(original)
    names = {"_persona_local": local, "__module__": kind.__module__, "__doc__": kind.__doc__}
    twin = object.__new__(type(kind.__name__, (mixin, kind), names))
    object.__setattr__(twin, "__dict__", vars(original))
    return twin


def _check_width(local: Local, width: int) -> None:
    adapter = local.persona.model.adapter
    if adapter.llm_width != width:
        raise PersonaError(
            f"the adapter is for an LLM of width {adapter.llm_width} ({adapter.base_model}), not {width}"
        )


def _check_sampling(sampling) -> None:
    for one in sampling if isinstance(sampling, Sequence) else [sampling]:
        if getattr(one, "prompt_logprobs", None) is not None:
            raise PersonaError("prompt_logprobs stops vLLM's engine beside embeddings; leave it or the user id out")


def _check_memory(kwargs: Mapping, chats: Sequence[Sequence[Mapping]] = ()) -> None:
    """Raises `PersonaError` for what could cut off or replace the user tokens in front of a prompt."""
    for name in ("tokenization_kwargs", "chat_template", "chat_template_kwargs"):
        if kwargs.get(name):
            raise PersonaError(f"{name} could move the user tokens that this LLM needs; leave it out")
    if any(message.get("role") == ROLE for chat in chats for message in chat):
        raise PersonaError(f"the role {ROLE} is persona's own; leave such messages out")


def _listed(prompts) -> list:
    """The prompts of a call that may give a single one: a text, token ids, or a dict."""
    if isinstance(prompts, (str, dict)) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _text_or_ids(prompt) -> str | list[int] | None:
    if isinstance(prompt, dict):
        if set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}:
            return None  # embeddings, images
        return prompt.get("prompt_token_ids") or prompt.get("prompt")
    return prompt


def _noted(outputs: list, outcomes: list[Outcome]) -> list:
    for output, outcome in zip(outputs, outcomes):
        output.persona = {"mode": "embeds", "personalized": outcome.personalized, "reason": outcome.reason}
    return outputs
