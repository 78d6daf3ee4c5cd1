"""Settings of splitting, pre-training, training an adapter, and building a reference LM, as a recipe holds them."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import PositiveInt

from persona.history.source import STRICT
from persona.injection.soft_prompt import Injection


@dataclass(frozen=True)
class SplitConfig:
    """How users are divided. Always by user, never by row."""

    __pydantic_config__ = STRICT

    train: float = 0.8
    """Share of users an adapter and a reference LM learn from."""
    validation: float = 0.1
    """Share used to choose settings; the rest are test users."""
    seed: int = 0
    """Seed of the shuffle."""
    cuts: PositiveInt = 4
    """Points in time at which each validation or test user is asked."""
    min_events: PositiveInt = 10
    """A cut leaves at least so many events before it in evaluation."""

    def __post_init__(self):
        if not (self.train > 0 and self.validation > 0 and self.train + self.validation < 1):
            raise ValueError(
                f"train {self.train:g} and validation {self.validation:g} are shares of the users: both above 0, and "
                "together below 1, so that test users are left"
            )


@dataclass(frozen=True)
class PretrainingConfig:
    """How event encoders and backbone learn to foretell the next item, before any LLM is there."""

    __pydantic_config__ = STRICT

    steps: PositiveInt = 2000
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Stretches of histories in a batch, each as long as the window."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, linear warm-up and cosine decay."""
    warmup_steps: int = 100
    """Steps of warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    negatives: int = 0
    """0: full softmax over the catalogue. Else so many items are drawn for each batch in proportion to their events,
    and the softmax over them is corrected by their log probability (logQ), for catalogues too large for a full one."""
    evaluations: PositiveInt = 10
    """How often the validation ranking is measured; the best state of the encoder is kept."""
    seed: int = 0
    """Seed of everything random in pre-training."""


@dataclass(frozen=True)
class InjectionConfig:
    """How user tokens enter the LLM."""

    __pydantic_config__ = STRICT

    kind: Injection = "soft_prompt"
    """soft_prompt: rows of the prompt. cross_attention: a memory that layers of its own read, for a server of its own.
    both: the same tokens in both ways."""
    every: PositiveInt = 2
    """Cross-attention layers stand after blocks 0, n, 2n... of the LLM."""


@dataclass(frozen=True)
class TrainingConfig:
    """How an adapter is trained."""

    __pydantic_config__ = STRICT

    steps: PositiveInt = 2000
    """Optimizer steps."""
    histories_per_step: PositiveInt = 16
    """Histories in a batch; each is encoded once and asked all its questions."""
    questions_per_history: PositiveInt = 6
    """At most so many questions about one history, drawn at random."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, linear warm-up and cosine decay."""
    warmup_steps: int = 100
    """Steps of warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    answer_weight: float = 1.0
    """Weight of the answer loss, the frozen LLM's with the user tokens before it (autoregressive); 0 turns it off."""
    contrastive_weight: float = 0.0
    """Weight of the contrastive loss between users' embeddings and their answers'; 0 turns it off."""
    contrastive_dims: tuple[int, ...] = ()
    """Dimensions at which the contrastive loss is taken (Matryoshka), beside the full width."""
    contrastive_chunk: int = 0
    """At most so many histories are encoded at once and encoded again for their gradients (gradient caching, Gao et
    al. 2021), so that a batch of any size fits into memory; 0 keeps the whole batch's activations."""
    temperature: float = 0.07
    """Temperature of the contrastive loss."""
    margin: float = 0.1
    """A negative more similar than the pair itself by this much is taken to be false and dropped."""
    next_item_weight: float = 0.2
    """Weight of the next-item loss on the backbone's states beside the answer loss; 0 turns it off."""
    empty_share: float = 0.0
    """Share of instructions that the encoder is not given, so that an empty one makes a general embedding; 1 trains
    embeddings without instructions."""
    drop_sources: float = 0.0
    """Share of training histories that lose one to all but one of their sources, so that missing ones are no harm."""
    foreign_share: float = 0.0
    """Share of training histories into which other users' events of some sources are mixed, up to two for each of their
    own; what is asked then is about the other sources. So an encoder learns to leave out what an instruction is not
    about (InstructUE's denoising). It does nothing where a recipe has one source."""
    short_share: float = 0.25
    """Share of training histories cut down to 1-15 events, so that young users work too."""
    drop_events: float = 0.1
    """Highest share of events dropped at random from a training history."""
    frozen_encoder: bool = False
    """Train only the head and the projector, on top of a pre-trained encoder that stays as it is."""
    lora_rank: int = 0
    """Rank of an optional peft LoRA on the LLM's attention; 0 leaves the LLM as it is."""
    seed: int = 0
    """Seed of everything random in training."""

    def __post_init__(self):
        weights = (self.answer_weight, self.contrastive_weight, self.next_item_weight)
        if min(weights) < 0 or not any(weights):
            raise ValueError(f"answer, contrastive and next-item weights are {weights}: none negative, one above 0")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if not (0 <= self.empty_share <= 1 and 0 <= self.foreign_share <= 1 and 0 <= self.drop_sources < 1):
            raise ValueError("empty_share, foreign_share and drop_sources are shares, the last below 1")
        if min(self.contrastive_dims, default=1) < 1 or self.contrastive_chunk < 0:
            raise ValueError("contrastive_dims must be above 0, and contrastive_chunk not negative")


@dataclass(frozen=True)
class LMConfig:
    """Size and training of the reference LM that stands in for a hub model."""

    __pydantic_config__ = STRICT

    vocab_size: PositiveInt = 3072
    """Byte-level BPE tokens."""
    lowercase: bool = False
    """Whether the LM reads and writes lower case only, so that a word of a text is the same token in its title; for
    tasks whose metric does not count case, such as ROUGE."""
    hidden_size: PositiveInt = 192
    """Width; heads are `head_dim` wide."""
    layers: PositiveInt = 4
    """Decoder layers."""
    head_dim: PositiveInt = 32
    """32 or 64: the vLLM CPU engine takes no less."""
    context: PositiveInt = 1024
    """Tokens of a training row: one history, then as many questions as fit."""
    rows_per_step: PositiveInt = 3
    """Rows in a batch."""
    steps: PositiveInt = 1600
    """Optimizer steps."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW; flat to 30% of the steps, then linear to zero."""
    history_weight: float = 0.2
    """Weight of the next-token loss on a history's own text beside the answer loss."""
    text_share: float = 0.25
    """Share of that text's tokens that take the loss, drawn at random; the LM head is a quarter of so small a model."""
    reads_questions: bool = False
    """Whether the questions' text takes that loss, too: where a question brings a text of its own, like a paper."""
    plain_share: float = 0.1
    """Share of rows without a history."""
    copy_share: float = 0.0
    """Share of questions, of those of 18 words and more, that are made exercises in copying: what follows two words of
    the text? A large LM has learned to copy; one trained on a few million tokens has not."""
    seed: int = 0
    """Seed of everything random in building the LM."""
