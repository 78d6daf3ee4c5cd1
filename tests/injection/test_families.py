"""The same promises on every LLM family: scale, place, padding, gradients, batches."""

import pytest
import torch
from torch.nn import functional as F

from persona.injection import PersonalizedLM
from persona.training.data import Collator, Example
from persona.training.questions import Question

ASK = "What does this user buy most?"
LONG = "Please say, in a word or two: which app does this user open most?"


@pytest.fixture
def lm(family_llm, tokenizer, encoder):
    torch.manual_seed(3)
    return PersonalizedLM(family_llm, tokenizer, encoder).eval()


def by_hand(lm, prompt, rows, answer=()):
    """The unpadded input `[1, L, width]` of one prompt, spliced without the library."""
    ids = torch.tensor([[0 if i == lm.template.placeholder_id else i for i in prompt.ids] + list(answer)])
    embeds = lm.llm.get_input_embeddings()(ids).clone()
    for k in range(prompt.count):
        embeds[0, prompt.start + k] = rows[k]
    return embeds


def test_rows_have_the_scale_of_the_embedding_layers_output(family, lm, tokenizer):
    embed = lm.llm.get_input_embeddings()
    with torch.no_grad():
        norm = embed(torch.arange(len(tokenizer))).norm(dim=1).mean()
        raw = embed.weight.norm(dim=1).mean()
        rows = lm.projector(torch.randn(5, 32))
    assert torch.allclose(lm.projector.row_norm, norm, rtol=1e-4)
    assert torch.allclose(norm / raw, torch.tensor(8.0 if "gemma" in family else 1.0), rtol=1e-4)  # sqrt(64)
    assert torch.allclose(rows.norm(dim=1), norm.expand(5), rtol=1e-4)


@torch.no_grad()
def test_soft_rows_land_where_the_template_says(lm):
    prompts = [lm.template.prompt(LONG, 3), lm.template.prompt(ASK, 0), lm.template.prompt(ASK, 2)]
    rows = torch.randn(5, 64)
    embeds = lm.embed(rows, lm.collate(prompts))
    for i, part in enumerate((rows[:3], None, rows[3:])):
        hand = by_hand(lm, prompts[i], part)
        assert torch.equal(embeds[i, -len(prompts[i].ids) :], hand[0])
    stacked = torch.stack([torch.cat([rows[:3], torch.zeros(1, 64)]), torch.ones(4, 64), F.pad(rows[3:], (0, 0, 0, 2))])
    assert torch.equal(lm.embed(stacked, lm.collate(prompts)), embeds)


@torch.no_grad()
def test_the_loss_falls_on_the_answers_alone_and_padding_does_not_matter(lm):
    asked = [(ASK, "garden"), (LONG, "espresso machine"), (ASK, "no")]
    prompts = [lm.template.prompt(p, 3) for p, _ in asked]
    answers = [lm.template.answer(p, a) for p, a in asked]
    assert len({len(p.ids) for p in prompts}) > 1 and len({len(a) for a in answers}) > 1
    rows = lm.projector(torch.randn(3, 4, 32))
    losses = []
    for prompt, answer, row in zip(prompts, answers, rows):
        logits = lm.llm(inputs_embeds=by_hand(lm, prompt, row, answer)).logits[0]
        at = len(prompt.ids)
        losses += [-logits[at + i - 1].log_softmax(-1)[token] for i, token in enumerate(answer)]
    loss = lm.answer_loss(rows, lm.collate(prompts, answers))["loss"]
    assert torch.allclose(loss, torch.stack(losses).mean(), atol=1e-4)


def test_gradients_reach_encoder_and_projector_and_never_the_llm(lm, shop_histories):
    lm.train()
    assert not lm.llm.training and lm.encoder.training
    before = {name: p.clone() for name, p in lm.llm.named_parameters()}
    examples = [Example(h, (Question("t", ASK, "garden", ("garden",)),)) for h in shop_histories]
    torch.manual_seed(0)
    out = lm(**Collator(lm)(examples))
    out["loss"].backward()
    assert all(p.grad is None for p in lm.llm.parameters())
    for part in (lm.projector, lm.encoder.head, lm.encoder.backbone, lm.encoder.events.text):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    torch.optim.SGD([p for p in lm.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(before[name], p) for name, p in lm.llm.named_parameters())


def test_a_mixed_batch_equals_one_by_one_and_the_plain_llm(lm, tokenizer, shop_histories):
    states = [*lm.encoder.read(shop_histories), None, None]
    asked = [ASK, LONG, LONG, ASK, LONG]
    together = lm.generate(asked, states, max_new_tokens=8)
    assert together == [lm.generate([m], [s], max_new_tokens=8)[0] for m, s in zip(asked, states)]
    plain = []
    for message in asked[3:]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = lm.llm.generate(**ids, do_sample=False, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
        plain.append(tokenizer.decode(out, skip_special_tokens=True).rstrip("\ufffd").strip())
    assert together[3:] == plain
    assert together[1] != together[4]
