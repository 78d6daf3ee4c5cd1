import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona import UserEncoder
from persona.encoders import EncoderConfig, llm_trunk, make_encoder
from persona.encoders.llm_encoder import LLMUserEncoder
from persona.encoders.llm_trunk import LLMTrunk
from persona.errors import CheckpointError, EventError, RecipeError
from persona.history import Event, History
from persona.injection import PersonalizedLM, load_llm

ASK = "What does this user buy most?"
QUESTIONS = (ASK, "", "Will this user buy oak violin music next? שלום 👋")


@pytest.fixture(scope="module")
def config(llm_path):
    return EncoderConfig(
        backbone="llm",
        llm=str(llm_path),
        width=64,
        heads=2,
        tokens=4,
        max_events=64,
        lora_rank=4,
        source_adapters=True,
        mentions=True,
        dropout=0.0,
    )


@pytest.fixture
def encoder(config, vocabulary, text_encoder):
    torch.manual_seed(1)
    encoder = make_encoder(config, vocabulary, text_encoder).eval()
    with torch.no_grad():  # a LoRA begins at zero, and so would change nothing
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return encoder


def close(a, b):
    return torch.allclose(a, b, atol=2e-4)


def test_a_batch_equals_one_by_one_and_training_equals_serving(encoder, shop_histories):
    assert isinstance(encoder, LLMUserEncoder)
    histories = [*shop_histories, History("nobody")]
    owner = torch.tensor([0, 3, 2, 1, 0])
    asked = [QUESTIONS[i] for i in (0, 0, 1, 2, 1)]
    states = encoder.read(histories)
    together = encoder.tokens([states[i] for i in owner], asked)
    with torch.no_grad():
        trained, seen = encoder(encoder.batch(histories), asked, owner)
    for i, (own, question) in enumerate(zip(owner, asked)):
        (alone,) = encoder.tokens(encoder.read([histories[own]]), [question])
        assert alone.tokens.shape == (4, 64)
        assert close(together[i].tokens, alone.tokens) and close(trained[i], alone.tokens)
    assert close(seen[0, : len(states[0].states)], states[0].states)


def test_every_prefix_is_what_a_smaller_k_makes(config, encoder, vocabulary, text_encoder, shop_histories):
    smaller = make_encoder(replace(config, tokens=2), vocabulary, text_encoder).eval()
    weights = {n: v[:2] if n == "head.positions" else v for n, v in encoder.state_dict().items()}
    smaller.load_state_dict(weights)
    whole, part = (e.tokens(e.read(shop_histories), [ASK] * 3) for e in (encoder, smaller))
    assert all(close(a.tokens[:2], b.tokens) for a, b in zip(whole, part))


def test_events_are_appended_for_their_own_price(encoder, shop_histories):
    history = shop_histories[0]
    newest = history.timed[-3:]
    state = encoder.read([history.of(e for e in history.events if e not in newest)])[0]
    for event in newest:
        state = encoder.extend(state, [event])
    whole = encoder.read([history])[0]
    assert close(state.states, whole.states) and close(state.memory, whole.memory) and state.events == whole.events
    assert close(encoder.tokens([state], [ASK])[0].tokens, encoder.tokens([whole], [ASK])[0].tokens)


def test_the_instruction_and_the_order_matter_and_sources_may_be_missing(encoder, shop_histories):
    history = shop_histories[0]
    right, other = encoder.tokens(encoder.read([history]) * 2, [ASK, "Which app?"])
    assert not close(right.tokens, other.tokens)
    times = [e.timestamp for e in history.timed]
    turned = history.of(replace(e, timestamp=t) for e, t in zip(history.timed, reversed(times)))
    alone = [history.of(e for e in history.events if e.source == s) for s in encoder.vocabulary.sources]
    for changed in [turned, *alone, history.of([Event("unheard of", 1.0, text="x")])]:
        tokens = encoder.tokens(encoder.read([changed]), [ASK])[0].tokens
        assert tokens.isfinite().all() and not close(tokens, right.tokens)


def test_each_source_has_its_own_adapter(encoder):
    texts = encoder.text_encoder.vectors(["garden"] * 2)
    of_visit, of_search = encoder.events.text(texts, torch.tensor([2, 5]))
    assert not close(of_visit, of_search)
    assert close(encoder.events.text(texts[0]), encoder.events.text(texts, torch.tensor([0, 5]))[0])


def test_an_item_that_the_instruction_names_is_seen(encoder, config, vocabulary, text_encoder, shop_histories):
    blind = make_encoder(replace(config, mentions=False), vocabulary, text_encoder).eval()
    blind.load_state_dict(encoder.state_dict())
    known = vocabulary.item_texts[0]
    for question, same in ((f"Will this user buy {known} next?", False), (ASK, True)):
        a, b = (e.tokens(e.read(shop_histories[:1]), [question])[0].tokens for e in (encoder, blind))
        assert close(a, b) is same


def test_only_what_is_trained_is_saved(encoder, llm_path, tmp_path, shop_histories, text_encoder):
    here = tmp_path / "here"
    shutil.copytree(llm_path, here / "llm")
    encoder.config = replace(encoder.config, llm=str(here / "llm"))
    saved = encoder.save_pretrained(here / "encoder")
    assert json.loads((saved / "config.json").read_text())["llm"] == "../llm"
    size = (saved / "model.safetensors").stat().st_size
    assert size < 1.1 * sum(4 * p.numel() for p in encoder.parameters() if p.requires_grad) + 10_000
    before = encoder.tokens(encoder.read(shop_histories), QUESTIONS)
    here.rename(tmp_path / "there")  # both moved together
    loaded = UserEncoder.from_pretrained(tmp_path / "there" / "encoder", text_encoder)
    assert isinstance(loaded, LLMUserEncoder) and not loaded.training
    after = loaded.tokens(loaded.read(shop_histories), QUESTIONS)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(before, after))


def test_what_is_trained(config, vocabulary, text_encoder, shop_histories):
    for rank, word in ((4, "lora"), (0, "layers")):
        encoder = make_encoder(replace(config, lora_rank=rank), vocabulary, text_encoder)
        tokens, _ = encoder(encoder.batch(shop_histories), QUESTIONS, torch.arange(3))
        tokens.square().sum().backward()
        learns = {n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        trunk = {n for n in learns if n.startswith("backbone.")}
        assert trunk and all(word in n or n == "backbone.llm.norm.weight" for n in trunk)
        assert {"head.positions", "start"} <= learns and "backbone.llm.embed_tokens.weight" not in learns
    encoder.freeze()
    assert [n for n, p in encoder.named_parameters() if p.requires_grad] == ["head.positions"]
    encoder.freeze(False)
    assert not encoder.backbone.llm.embed_tokens.weight.requires_grad and encoder.start.requires_grad


def test_answers_have_embeddings_of_their_own(encoder):
    texts = ["garden", "oak violin", "", "garden"]
    vectors = encoder.encode_answers(texts)
    assert vectors.shape == (4, 64) and (vectors[0] == vectors[3]).all()
    assert abs(vectors[0] @ vectors[1]) < 0.9999
    assert all(abs(encoder.encode_answers([t])[0] - v).max() < 1e-5 for t, v in zip(texts, vectors))


def test_bad_configs_say_what_to_do(config, vocabulary, text_encoder, tmp_path):
    for changes, error, message in (
        ({"llm": ""}, RecipeError, "encoder.llm"),
        ({"llm": str(tmp_path)}, CheckpointError, "cannot be loaded"),
        ({"width": 32}, RecipeError, "set it to 64"),
    ):
        with pytest.raises(error, match=message):
            make_encoder(replace(config, **changes), vocabulary, text_encoder)
    with pytest.raises(ValueError, match="lora_rank"):
        replace(config, lora_rank=-1)


def test_bad_extensions_are_refused(encoder, shop_histories):
    (state,) = encoder.read(shop_histories[:1])
    with pytest.raises(EventError, match="older"):
        encoder.extend(state, [Event("search", 1.0, text="x")])
    with pytest.raises(EventError, match="1 to 4 tokens"):
        encoder.tokens([state], [ASK], 5)


def test_the_lm_reads_the_words_of_events(encoder, text_encoder):
    """Two texts of the same words are alike in what is added to the adapters' output; the empty text adds nothing.

    A text is read as within a sentence, behind a space: "music" alone is other tokens.
    """
    texts = encoder.text_encoder
    assert texts.dim == text_encoder.dim + 64 == texts.vectors(["x"]).shape[1]
    one, other, empty, again = texts.vectors(["garden music", "music", "", "garden music"])[:, -64:]
    assert torch.equal(one, again) and not empty.any() and not close(one, other)
    assert one.square().mean() == pytest.approx(1, abs=1e-4)
    (within,), (first,) = (encoder.backbone.words([text]) for text in (" music", "music"))
    assert len(within) == 1 < len(first)
    words = within.mean(0)
    assert torch.nn.functional.cosine_similarity(words, other, dim=0) == pytest.approx(1, abs=1e-5)
    texts.forget(["music"])
    assert torch.equal(texts.vectors(["music"])[0, -64:], other) and texts.vectors([]).shape == (0, texts.dim)


def test_a_columns_value_is_read_alone(encoder, vocabulary):
    """The answer Ghent would be a third of the mean of "city: Ghent"; the column's vector says what it is of."""
    assert vocabulary.columns["profile/city"]
    profile = History("u", (Event("profile", attributes={"city": "Ghent"}),))
    words = encoder.batch([profile]).text[0, 0, -64:]
    assert torch.equal(words, encoder.text_encoder.vectors(["Ghent"])[0, -64:])


def test_the_instruction_stands_in_the_lms_chat_template(encoder, config, vocabulary, text_encoder, tmp_path):
    before, after = (len(part) for part in encoder.backbone.frame)
    rendered = encoder.backbone.tokenizer.apply_chat_template(
        [{"role": "user", "content": ASK}], add_generation_prompt=True, return_dict=False
    )
    _, seen = encoder._asked([ASK, "Which app does this user open most of all the apps?"])
    assert before + int(seen[0].sum()) == len(rendered) + config.tokens and after > 0
    assert not seen[0, 0] and seen[:, -1].all()
    plain = tmp_path / "plain"
    shutil.copytree(config.llm, plain)
    (plain / "chat_template.jinja").unlink()
    bare = make_encoder(replace(config, llm=str(plain)), vocabulary, text_encoder)
    assert [len(part) for part in bare.backbone.frame] == [0, 0]
    assert bare.tokens(bare.read([History("u")]), [ASK])[0].tokens.isfinite().all()


def test_a_trunk_of_any_family_is_the_lm_itself(family, family_llm, tokenizer, tmp_path):
    """Longer than the sliding windows of Mistral and Gemma 3, in one go and in two."""
    family_llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    trunk = LLMTrunk(tmp_path, 0).eval()
    ids = torch.arange(50)[None] + 10
    words = trunk.llm.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = family_llm.model(input_ids=ids).last_hidden_state
        whole, _ = trunk(words)
        first, cache = trunk(words[:, :41])
        rest, _ = trunk(words[:, 41:], cache=cache)
    scale = expected.abs().max()
    assert (whole - expected).abs().max() < 1e-4 * scale
    assert (torch.cat([first, rest], 1) - expected).abs().max() < 1e-4 * scale


def test_mixed_precision(config, vocabulary, text_encoder, shop_histories):
    encoder = make_encoder(config, vocabulary, text_encoder)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, states = encoder(encoder.batch(shop_histories), QUESTIONS, torch.arange(3))
        answers = encoder.answer_vectors(["garden"])
    (tokens.float().sum() + states.float().sum() + answers.float().sum()).backward()
    assert encoder.start.grad.isfinite().all() and tokens.isfinite().all()


def test_another_lm_in_its_place_is_refused(encoder, llm_path, tmp_path, text_encoder):
    shutil.copytree(llm_path, tmp_path / "llm")
    encoder.config = replace(encoder.config, llm=str(tmp_path / "llm"))
    saved = encoder.save_pretrained(tmp_path / "encoder")
    weights = load_file(tmp_path / "llm" / "model.safetensors")
    weights["model.embed_tokens.weight"] += 0.01
    save_file(weights, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not the LM that this encoder was trained with"):
        UserEncoder.from_pretrained(saved, text_encoder)
    with pytest.raises(CheckpointError, match="upload that first"):
        encoder.push_to_hub("someone/encoder")
    shutil.rmtree(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="not there: name it as `llm`"):
        UserEncoder.from_pretrained(saved, text_encoder)
    assert isinstance(UserEncoder.from_pretrained(saved, text_encoder, llm_path), LLMUserEncoder)


def test_an_adapter_follows_its_llm(encoder, llm_path, tmp_path, text_encoder, shop_histories):
    """The trunk is the LLM: where that is named anew, the encoder finds it too. Weights are taken back by a parent."""
    llm, tokenizer = load_llm(llm_path)
    model = PersonalizedLM(llm, tokenizer, encoder, base_model=str(llm_path)).eval()
    folder = model.save_pretrained(tmp_path / "deep" / "down" / "adapter")
    moved = folder.rename(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        PersonalizedLM.from_pretrained(moved, text_encoder=text_encoder)
    loaded = PersonalizedLM.from_pretrained(moved, llm_path, text_encoder=text_encoder)
    assert loaded.generate([ASK], loaded.encoder.read(shop_histories[:1])) == model.generate(
        [ASK], model.encoder.read(shop_histories[:1])
    )
    loaded.load_state_dict(model.state_dict())


def test_an_encoder_of_a_version_that_read_texts_otherwise_is_refused(encoder, tmp_path, text_encoder, monkeypatch):
    encoder.save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr(llm_trunk, "READING", b"otherwise")
    with pytest.raises(CheckpointError, match="another version of persona"):
        UserEncoder.from_pretrained(tmp_path / "encoder", text_encoder)
