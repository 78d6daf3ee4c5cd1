"""PPlug (Liu et al. 2024, arXiv 2409.11901), the published baseline: two soft rows, instruction and person.

A frozen sentence encoder makes vectors h of a user's items; a trained copy of it makes x of the input; the person is
the sum of w_i Proj(h_i) with w = softmax(x . h); the instruction is one learned vector. Written from the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import normalize

from persona.encoders import TextEncoder
from persona.evaluation.lamp.domain import PROFILE
from persona.evaluation.lamp.recipe import LampRecipe
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS
from persona.injection import SoftPromptLM
from persona.injection.projector import mean_row_norm
from persona.injection.soft_prompt_lm import SoftPromptBatch
from persona.training.trainer import AdapterTrainer


class PPlug(SoftPromptLM):
    """The frozen LLM behind PPlug's two rows; `recipe.pplug` and `recipe.labels` switch its deviations."""

    soft = 2

    def __init__(self, llm, tokenizer, text_encoder: TextEncoder, recipe: LampRecipe):
        super().__init__(llm, tokenizer)
        self.recipe, self.task = recipe, TASKS[recipe.task]
        object.__setattr__(self, "text_encoder", text_encoder)  # frozen, shared, never saved
        width, dim = llm.get_input_embeddings().weight.shape[1], text_encoder.dim
        self.input_encoder = copy.deepcopy(text_encoder.model).requires_grad_(recipe.pplug.trained_input)
        self.input_encoder.max_seq_length = recipe.pplug.input_tokens
        self.person = _projector(dim, width)
        self.instruction = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.instruction_projector = _projector(dim, width)
        self.register_buffer("row_norm", torch.tensor(mean_row_norm(llm)))

    def train(self, mode: bool = True):
        """As ever; an input encoder that is not trained has no dropout, which would be noise in the attention."""
        super().train(mode)
        self.input_encoder.train(mode and self.recipe.pplug.trained_input)
        return self

    def forward(self, vectors: torch.Tensor, mask: torch.Tensor, payloads: Sequence[str], batch: SoftPromptBatch):
        """The answer loss and logits of profiles `vectors` `[B, N, dim]`, `mask` `[B, N]`, and what each asks about."""
        return self.answer_loss(self.embed_user(vectors, mask, payloads), batch)

    def embed_user(self, vectors: torch.Tensor, mask: torch.Tensor, payloads: Sequence[str]) -> torch.Tensor:
        """Instruction and person as rows `[B, 2, llm_width]`; nobody's person is zero."""
        features = self.input_encoder.preprocess(list(payloads))
        features = {k: v.to(vectors.device) if torch.is_tensor(v) else v for k, v in features.items()}
        x = normalize(self.input_encoder(features)["sentence_embedding"], dim=-1)  # [B, dim]
        scores = torch.einsum("bd,bnd->bn", x, vectors) / self.recipe.pplug.temperature
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()  # [B, N]; no history, no weights
        person = (weights[..., None] * self.person(vectors)).sum(1)
        instruction = self.instruction_projector(self.instruction).expand_as(person)
        rows = torch.stack([instruction, person], dim=1).float()
        return normalize(rows, dim=-1) * self.row_norm if self.recipe.pplug.scaled else rows

    def condition(self, samples: Sequence[Sample]) -> dict:
        """Vectors of the profiles and the payloads of the inputs; see `forward`."""
        texts = [[self._text(item) for item in sample.profile.events[-PROFILE:]] for sample in samples]
        self.text_encoder.vectors([text for each in texts for text in each])  # all of them in one go
        vectors = [self.text_encoder.vectors(each) for each in texts]
        padded = nn.utils.rnn.pad_sequence(vectors, batch_first=True)
        sizes = torch.tensor([len(each) for each in texts])
        device = self.row_norm.device
        return {
            "vectors": padded.to(device),
            "mask": (torch.arange(padded.shape[1])[None] < sizes[:, None]).to(device),
            "payloads": [self.task.query(sample.input) for sample in samples],
        }

    @torch.inference_mode()
    def rows(self, samples: Sequence[Sample]) -> torch.Tensor:
        """`[B, 2, llm_width]`."""
        return self.embed_user(**self.condition(samples))

    def _text(self, item) -> str:
        return self.task.labelled(item.attributes) if self.recipe.labels else item.attributes[self.task.long]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes all but the LLM and the frozen encoder to `folder`/pplug.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        own = {name: v.contiguous() for name, v in self.state_dict().items() if not name.startswith("llm.")}
        save_file(own, Path(folder) / "pplug.safetensors")

    def load_trained(self, folder: Path) -> None:
        """Takes back what `save_pretrained` wrote."""
        missing, unknown = self.load_state_dict(load_file(folder / "pplug.safetensors"), strict=False)
        assert not unknown and all(name.startswith("llm.") for name in missing), (missing, unknown)


class PPlugTrainer(AdapterTrainer):
    """Gives the input's encoder, which is pre-trained, a rate of its own."""

    def create_optimizer(self, model=None):
        """AdamW with two groups; the schedule of the Trainer scales both."""
        own = model or self.model
        inner = {id(p) for p in own.input_encoder.parameters()}
        trained = [p for p in own.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in inner], "lr": self.args.learning_rate},
            {"params": [p for p in trained if id(p) in inner], "lr": own.recipe.pplug.input_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            weight_decay=self.args.weight_decay,
        )
        return self.optimizer


def _projector(dim: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))
