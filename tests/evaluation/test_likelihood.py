"""Option scores against a forward pass of each option alone."""

import numpy as np
import pytest
import torch

from persona.evaluation.likelihood import Request, option_scores

OPTIONS = ("garden", "music", "a rather long answer", "garden tools")
STARS = ("3", "3.5", "4", "4.5", "5")


def whole_likelihood(model, request, option):
    """Log-likelihood of an option, unpadded and without any of the code under test; with its end if any is long."""
    count = 0 if request.rows is None else len(request.rows)
    prompt = model.template.prompt(request.messages, count)
    long = any(len(model.template.option("?", o)) > 1 for o in request.options)
    answer = model.template.answer("?", option) if long else model.template.option("?", option)
    ids = torch.tensor([i if t else 0 for i, t in zip(prompt.ids, prompt.is_token)] + answer)
    embeds = model.llm.get_input_embeddings()(ids)
    if count:
        embeds[prompt.start : prompt.start + count] = request.rows
    logp = torch.log_softmax(model.llm(inputs_embeds=embeds[None]).logits[0], -1)
    return sum(logp[len(prompt.ids) + n - 1, token].item() for n, token in enumerate(answer))


@pytest.fixture
def requests(model, shop_histories):
    questions = ["What does this user buy most?", "Which app?", "Will this user buy an oak violin music next?"]
    rows = model.soft_rows(model.encoder.read(shop_histories), questions)
    soft = [Request(q, OPTIONS, r) for q, r in zip(questions, rows)]
    plain = Request(questions[0], OPTIONS)
    return [*soft, plain, Request(questions[2], OPTIONS[:2], rows[0][:2]), Request(questions[1], STARS, rows[2])]


@torch.inference_mode()
def test_the_best_option_is_the_most_likely_one_as_a_whole(model, requests):
    for request, scores in zip(requests, option_scores(model, requests)):
        expected = np.array([whole_likelihood(model, request, o) for o in request.options])
        assert scores.argmax() == expected.argmax()
        assert scores.max() == pytest.approx(expected.max(), abs=1e-4)
        assert (scores >= expected - 1e-4).all()  # a loser may keep an upper bound, never less


@pytest.mark.parametrize("taught", ["3", "3.5", "4.5"])
def test_an_option_and_a_longer_one_that_starts_with_it_can_both_win(model, taught):
    three, half = (model.template.option("?", o) for o in STARS[:2])
    assert half[: len(three)] == three and len(half) > len(three)
    requests = [Request(f"How many stars for film {n}?", STARS) for n in range(4)]
    teach(model, requests[0].messages, taught)
    with torch.inference_mode():
        for request, scores in zip(requests, option_scores(model, requests)):
            expected = np.array([whole_likelihood(model, request, o) for o in STARS])
            assert scores.argmax() == expected.argmax()
            assert scores.max() == pytest.approx(expected.max(), abs=1e-3)
            assert (scores >= expected - 1e-3).all() and (scores == scores.max()).sum() == 1
            assert request is not requests[0] or STARS[scores.argmax()] == taught


def teach(model, messages, answer):
    """A few steps on one answer, so that the random LLM gives it."""
    prompt, labels = model.template.prompt(messages).ids, model.template.answer(messages, answer)
    llm = model.llm.requires_grad_(True)
    optimizer = torch.optim.Adam(llm.parameters(), lr=1e-3)
    for _ in range(30):
        logits = llm(torch.tensor([prompt + labels])).logits[0, len(prompt) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def test_scores_do_not_depend_on_the_batch(model, requests):
    together = option_scores(model, requests)
    alone = [option_scores(model, [r])[0] for r in requests]
    one_row_batches = option_scores(model, requests, tokens_per_batch=1)
    for a, b, c in zip(together, alone, one_row_batches):
        assert np.allclose(a, b, atol=1e-4) and np.allclose(a, c, atol=1e-4)


def test_rows_change_the_scores(model, requests):
    with_user, _, _, plain, *_ = option_scores(model, requests)
    assert not np.allclose(with_user, plain, atol=1e-3)
