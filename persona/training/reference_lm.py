"""A small Llama trained from scratch on a domain's own text: the LLM where no hub model can be downloaded.

A training row is packed: one history, then as many question-and-answer blocks as fit. Blocks see the history and
themselves but not each other (4D mask, restarted positions), so one history pays for a dozen answers. Loss falls on the
answers, and lightly on the history's text. Nothing of validation or test users is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from cachetools import LRUCache
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from persona.errors import PersonaError, RecipeError
from persona.history.render import render_event, render_history
from persona.training.configs import LMConfig
from persona.training.hardware import precision
from persona.training.processes import check_one_process
from persona.training.recipe import Domain
from persona.training.trained_on import write_trained_on

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ ' ' if m.role == 'assistant' else '' }}{{ m.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = Regex(r" ?[\p{L}\p{M}'\-]+| ?\d+| ?[^\s\p{L}\p{M}\d]+|\s")
"""What a token may span: a word with its hyphens and apostrophes, so that answers such as Sci-Fi become one token."""
IGNORE = -100


@dataclass(frozen=True)
class Reading:
    """What a packed row is made of: the text of one history, and questions about it."""

    history: Sequence[str]
    """The text in pieces that no token crosses, such as lines and line breaks; they are joined as they are."""
    glue: str
    """Stands between the history and each question; there is none without a history."""
    questions: Sequence[tuple[str, str]]
    """(question, answer)."""


Draw = Callable[[np.random.Generator], Reading]
COPIED = 8
"""Words that an exercise in copying asks for."""


def build_reference_lm(
    domain: Domain,
    out: str | Path,
    *,
    steps: int | None = None,
    overwrite: bool = False,
    report_to: str = "none",
) -> Path:
    """Trains tokenizer and model by `domain.recipe.lm` and saves them to `out` as a Hugging Face checkpoint.

    Raises `PersonaError` if an LLM lies there, unless `overwrite` says that it is to be replaced.
    """
    check_free(out, overwrite)
    config = domain.recipe.lm
    set_seed(config.seed)
    tokenizer = train_tokenizer(domain_lines(domain), config)
    train_lm(domain_readings(domain), tokenizer, config, out, steps=steps, report_to=report_to)
    write_trained_on(domain.fingerprints(domain.train), out)
    return Path(out)


def check_free(out: str | Path, overwrite: bool) -> None:
    """Raises `PersonaError` if an LLM lies in `out` and is not to be replaced."""
    if (Path(out) / "config.json").exists() and not overwrite:
        raise PersonaError(f"{out} holds an LLM already; give another --out, or --overwrite")


def train_lm(
    draw: Draw,
    tokenizer: PreTrainedTokenizerFast,
    config: LMConfig,
    out: str | Path,
    *,
    steps: int | None = None,
    start: LlamaForCausalLM | None = None,
    report_to: str = "none",
) -> None:
    """Trains a Llama on packed rows of what `draw` gives and saves it with its tokenizer to `out`.

    It goes on from `start`, whose tokenizer this must be, or begins anew by `config`. Raises `PersonaError` where
    several processes were started.
    """
    check_one_process("building a reference LM")
    set_seed(config.seed)
    model = start or LlamaForCausalLM(_llama_config(config, tokenizer))
    steps = steps or config.steps
    trainer = PackedTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(out) / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=config.rows_per_step,
            learning_rate=config.learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": round(0.7 * steps), "decay_type": "linear"},
            warmup_steps=min(100, steps // 10),
            weight_decay=0.05,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            **precision(),
            save_strategy="no",
            logging_steps=50,
            report_to=report_to,
            seed=config.seed,
            remove_unused_columns=False,
            dataloader_num_workers=0,
        ),
        train_dataset=PackedRows(draw, tokenizer, config, size=steps * config.rows_per_step),
        data_collator=collate_rows,
    )
    trainer.history_weight = config.history_weight
    trainer.train()
    model.eval().to(torch.float32).save_pretrained(out)
    tokenizer.save_pretrained(out)


def domain_lines(domain: Domain) -> list[str]:
    """Text that a tokenizer for `domain` is fitted on: events of training users, and questions with answers."""
    rng = np.random.default_rng(domain.recipe.lm.seed)
    sources = domain.recipe.sources
    lines = [render_event(e, sources[e.source]) for u in domain.train for e in domain.histories[u].events]
    for _ in range(1000):
        for q in domain.questions(domain.training_cut(rng), rng, training=True):
            lines.append(f"{q.prompt} {q.answer}")
    for answers in domain.catalogue.answers.values():
        lines += [f" {a}" for a in answers] * 1000
    return lines


def domain_readings(domain: Domain) -> Draw:
    """Draws a training user at a random time: the history in lines, and one round of questions in random order."""

    def draw(rng: np.random.Generator) -> Reading:
        cut = domain.training_cut(rng)
        questions = domain.questions(cut, rng, training=True)
        pieces: list[str] = []
        for line in render_history(cut.history, domain.recipe.sources).split("\n"):
            pieces += ["\n", line] if pieces else [line]
        picked = [questions[i] for i in rng.permutation(len(questions))]
        return Reading(pieces, "\n", [(q.prompt, q.answer) for q in picked])

    return draw


def copying(question: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """An exercise on a question's own text: two words of it, and the answer is those that follow.

    The two stand in it once. None if the text is too short, or no such words are there.
    """
    words = question.split()
    pairs = list(pairwise(words))
    if len(words) < 2 + 2 * COPIED:
        return None
    places = [i for i in range(len(words) - COPIED - 1) if pairs.count(pairs[i]) == 1]
    if not places:
        return None
    at = places[rng.integers(len(places))]
    return f'{question}\nWhat follows "{" ".join(pairs[at])}"?', " ".join(words[at + 2 : at + 2 + COPIED])


def train_tokenizer(lines: Iterable[str], config: LMConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `config.vocab_size` tokens fitted on `lines`, with the chat template of the reference LMs."""
    bpe = Tokenizer(models.BPE())
    if config.lowercase:
        bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [END, SYSTEM, USER, ASSISTANT]
    bpe.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def _llama_config(config: LMConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.hidden_size // config.head_dim,
        head_dim=config.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class PackedRows(Dataset):
    """Row `i` is drawn from its own seed, so a run can be repeated; there are `size` of them."""

    def __init__(self, draw: Draw, tokenizer: PreTrainedTokenizerFast, config: LMConfig, size: int):
        self.draw, self.tokenizer, self.config, self.size = draw, tokenizer, config, size
        self._ids: LRUCache[str, list[int]] = LRUCache(20_000)

    def __len__(self) -> int:
        return self.size

    @cached_property
    def _open(self) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(USER)]

    def _encode(self, text: str) -> list[int]:
        ids = self._ids.get(text)
        if ids is None:
            ids = self._ids[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row of length `context`: `input_ids`, `positions`, `segments`, `parents`, `labels`, `history_labels`."""
        rng = np.random.default_rng([self.config.seed, index])
        size = self.config.context
        row = {name: np.zeros(size, np.int64) for name in ("input_ids", "positions")}
        row |= {name: np.full(size, IGNORE) for name in ("labels", "history_labels", "segments", "parents")}
        used, segment, misses = 0, 0, 0
        while True:
            plain = rng.random() < self.config.plain_share
            reading = self.draw(rng)
            plain = plain or not reading.history
            prefix = [] if plain else self._prefix(reading)
            blocks = [self._block("" if plain else reading.glue, *self._asked(*q, rng)) for q in reading.questions]
            if not blocks or used + len(prefix) + len(blocks[0][0]) > size:
                if used:
                    return row
                misses += 1
                if misses == 1000:
                    raise RecipeError(f"lm.context: {size} tokens hold no history with a question; make it larger")
                continue
            here = slice(used, used + len(prefix))
            row["input_ids"][here], row["positions"][here] = prefix, range(len(prefix))
            row["segments"][here] = row["parents"][here] = home = segment
            self._score(row, rng, used, prefix)
            used, segment = used + len(prefix), segment + 1
            for ids, start in blocks:
                if used + len(ids) > size:
                    return row
                here = slice(used, used + len(ids))
                row["input_ids"][here] = ids
                row["positions"][here] = range(len(prefix), len(prefix) + len(ids))
                row["segments"][here], row["parents"][here] = segment, home
                row["labels"][used + start : here.stop] = ids[start:]
                if self.config.reads_questions:
                    self._score(row, rng, used, ids[:start])
                used, segment = here.stop, segment + 1

    def _score(self, row: dict[str, np.ndarray], rng: np.random.Generator, at: int, ids: list[int]) -> None:
        """Gives some of the tokens `ids`, which stand at `at`, the loss of text that is read."""
        scored = np.flatnonzero(rng.random(len(ids)) < self.config.text_share)
        scored = scored[scored > 0]
        row["history_labels"][at + scored] = np.array(ids, np.int64)[scored]

    def _asked(self, question: str, answer: str, rng: np.random.Generator) -> tuple[str, str]:
        """The question, or an exercise in copying in its place."""
        share = self.config.copy_share
        return (copying(question, rng) if share and rng.random() < share else None) or (question, answer)

    def _prefix(self, reading: Reading) -> list[int]:
        """Token ids of the user's turn up to the end of the history."""
        return [*self._open, *(i for piece in reading.history for i in self._encode(piece))]

    def _block(self, glue: str, question: str, answer: str) -> tuple[list[int], int]:
        """Token ids of one question with its answer, and where the answer starts; without `glue` it opens the turn."""
        ids = [*([] if glue else self._open), *self._encode(glue + question), self.tokenizer.eos_token_id]
        ids.append(self.tokenizer.convert_tokens_to_ids(ASSISTANT))
        return [*ids, *self._encode(f" {answer}"), self.tokenizer.eos_token_id], len(ids)


def collate_rows(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stacks rows and adds the block mask `[B, 1, L, L]`: causal, within a segment and to its history."""
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    segments, parents = batch.pop("segments"), batch.pop("parents")
    same = segments[:, :, None] == segments[:, None, :]
    history = parents[:, :, None] == segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    batch["attention_mask"] = ((same | history) & causal)[:, None]
    return batch


def packed_loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], history_weight: float) -> torch.Tensor:
    """Answer loss + `history_weight` x history loss; the LM head runs only where a label stands."""
    hidden = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["positions"],
    ).last_hidden_state
    loss = hidden.new_zeros((), dtype=torch.float32)
    for labels, weight in ((batch["labels"], 1.0), (batch["history_labels"], history_weight)):
        labels = labels[:, 1:]
        at = labels != IGNORE
        if at.any():
            loss = loss + weight * F.cross_entropy(model.lm_head(hidden[:, :-1][at]).float(), labels[at])
    return loss


class PackedTrainer(Trainer):
    """`packed_loss` in the precision of the run. accelerate sets that for a model's `forward`, which is not called."""

    history_weight = 0.2

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():
            loss = packed_loss(model, inputs, self.history_weight)
        return (loss, {}) if return_outputs else loss
