"""Where the user tokens stand, for every shape of chat template."""

import copy

import pytest

from persona.errors import PersonaError
from persona.injection import PLACEHOLDER, PromptTemplate
from persona.injection.soft_prompt import as_messages, last_user_turn

STRINGS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TWICE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }} {{ m.content }}<|end|>{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "What next?"},
]


@pytest.fixture
def make(tokenizer):
    def make(chat_template):
        own = copy.deepcopy(tokenizer)
        own.chat_template = chat_template
        return PromptTemplate(own), own

    return make


def text(template, prompt):
    return template.tokenizer.decode(prompt.ids, skip_special_tokens=False)


@pytest.mark.parametrize("chat_template, between, parts", [(STRINGS, "\n", False), (PARTS, "", True)])
def test_rows_open_the_last_user_turn(make, chat_template, between, parts):
    template, own = make(chat_template)
    assert template.takes_parts is parts
    prompt = template.prompt(CHAT, 3)
    before = "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi<|end|><|user|>"
    after = f"{between}What next?<|end|><|assistant|>"
    assert text(template, prompt) == before + PLACEHOLDER * 3 + after
    assert (prompt.start, prompt.count) == (len(own.encode(before)), 3)
    assert [i for i, token in enumerate(prompt.is_token) if not token] == [prompt.start + k for k in range(3)]
    assert prompt.ids[: prompt.start] == own.encode(before) and prompt.ids[prompt.start + 3 :] == own.encode(after)


@pytest.mark.parametrize("chat_template", [STRINGS, PARTS])
@pytest.mark.parametrize("messages", [CHAT, CHAT[:2], CHAT[1:2]])
def test_a_plain_prompt_is_what_the_tokenizer_makes(make, chat_template, messages):
    template, own = make(chat_template)
    ids = own.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt = template.prompt(messages)
    assert (prompt.ids, prompt.start, prompt.count) == (ids, 0, 0) and all(prompt.is_token)


def test_a_string_is_one_user_turn(make):
    template, _ = make(STRINGS)
    assert template.prompt("Hello", 2) == template.prompt([{"role": "user", "content": "Hello"}], 2)


def test_a_shared_system_prompt_comes_before_any_user_row(make):
    template, _ = make(STRINGS)
    one, two = template.prompt(CHAT[:2], 2), template.prompt([CHAT[0], CHAT[3]], 2)
    assert one.ids[: one.start] == two.ids[: two.start] and one.start > 4


def test_without_a_chat_template(make):
    template, own = make(None)
    assert text(template, template.prompt("Hello", 2)) == f"{PLACEHOLDER}{PLACEHOLDER}\nHello\n"
    assert own.chat_template is None and PLACEHOLDER not in own.get_vocab()
    assert template.answer("Hello", "yes") == [*own.encode("yes\n"), own.eos_token_id]
    assert template.option("Hello", "yes") == own.encode("yes")


def test_the_tokenizer_given_is_not_changed(make):
    template, own = make(STRINGS)
    assert PLACEHOLDER not in own.get_vocab() and template.placeholder_id == len(own)


def test_a_template_that_repeats_the_turn_is_refused(make):
    template, _ = make(TWICE)
    assert template.prompt("Hello").count == 0
    with pytest.raises(PersonaError, match="writes the user's turn 2 times"):
        template.prompt("Hello", 2)


@pytest.mark.parametrize("count", [0, 2])
def test_the_placeholder_is_reserved(make, count):
    template, _ = make(STRINGS)
    for messages in (f"a {PLACEHOLDER}", [{"role": "system", "content": PLACEHOLDER}, *CHAT]):
        with pytest.raises(PersonaError, match="reserved"):
            template.prompt(messages, count)


def test_no_user_turn(make):
    template, _ = make(STRINGS)
    with pytest.raises(PersonaError, match="no user turn"):
        template.prompt(CHAT[:1], 2)
    for messages in (CHAT[:1], []):
        with pytest.raises(PersonaError, match="no user turn"):
            last_user_turn(messages)
    assert last_user_turn(CHAT) == "What next?"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "prompt_embeds", "data": "AAAA"}]},
        {"role": "user", "content": None},
        {"role": "user"},
        {"content": "x"},
        {"role": 1, "content": "x"},
        "x",
        None,
    ],
)
def test_only_string_contents(message):
    with pytest.raises(PersonaError, match=r"messages\[1\] needs a string"):
        as_messages([CHAT[0], message])


def test_answers_are_what_the_template_writes_after_the_prompt(make):
    template, own = make(STRINGS)
    assert template.answer(CHAT, "yes") == own.encode("yes<|end|>")
    assert template.option(CHAT, "yes") == own.encode("yes")


def test_the_trained_template_puts_a_space_before_an_answer(tokenizer):
    template = PromptTemplate(tokenizer)
    whole = [*CHAT, {"role": "assistant", "content": "crime novel"}]
    ids = template.prompt(CHAT).ids + template.answer(CHAT, "crime novel")
    assert ids == tokenizer.apply_chat_template(whole, return_dict=False)
    assert template.option(CHAT, "crime novel") == tokenizer.encode(" crime novel")


def test_an_answer_after_a_template_that_rewrites_turns_still_ends(make):
    opened = STRINGS.replace("<|assistant|>{% endif %}", "<|assistant|>think {% endif %}")
    template, own = make(opened)
    assert template.answer("Hello", "yes") == own.encode("yes<|end|>")
