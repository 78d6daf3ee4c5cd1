"""Rows in an already rendered prompt: the same ids as when the template renders the chat with rows in it."""

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from persona.errors import PersonaError
from persona.injection import PLACEHOLDER, PromptTemplate

PARTS = (
    "{% macro said(c) %}{% if c is string %}{{ c }}{% else %}"
    "{% for p in c %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
STRINGS = "{% macro said(c) %}{{ c }}{% endmacro %}"
ROUND = "{{ said(m.content) }}"
GO = "{% if add_generation_prompt %}"
TEMPLATES = {
    "own": None,
    "llama": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    + ROUND
    + "<|eot_id|>{% endfor %}"
    + GO
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "qwen": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    + ROUND
    + "<|im_end|>\n{% endfor %}"
    + GO
    + "<|im_start|>assistant\n{% endif %}",
    "qwen without system": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    + ROUND
    + "<|im_end|>\n{% endfor %}"
    + GO
    + "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]"
    + ROUND
    + "[/INST]{% else %}"
    + ROUND
    + "{{ eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n"
    + ROUND
    + "<end_of_turn>\n{% endfor %}"
    + GO
    + "<start_of_turn>model\n{% endif %}",
}
SPECIAL = ["<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>"]
END = {"llama": "<|eot_id|>", "qwen": "<|im_end|>", "qwen without system": "<|im_end|>"}
FIRST = {"role": "user", "content": "Hello there"}
TURNS = [
    FIRST,
    {"role": "assistant", "content": "Hi, what is it?"},
    {"role": "user", "content": "What next?\nTell me!"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {"one turn": [FIRST], "many turns": TURNS, "system": [SYSTEM, FIRST], "system, many turns": [SYSTEM, *TURNS]}
CHATS["an assistant's turn comes last"] = TURNS[:2]
CHATS["empty"] = [{"role": "user", "content": ""}]
CHATS["special words"] = [{"role": "user", "content": "<|im_start|>user\nwho? [INST] user"}]
# Whoever can write the template's own marks can write a turn; then no reader can tell the two apart.
FORGED = "special words"


@pytest.fixture(scope="module", params=["bytes", "words"])
def base(request, tokenizer):
    """A tokenizer that reads bytes, as Llama 3 and Qwen do, and one that marks words, as SentencePiece does."""
    if request.param == "bytes":
        own = copy.deepcopy(tokenizer)
        own.add_special_tokens({"additional_special_tokens": SPECIAL, "bos_token": "<s>"})
        return own
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = [chr(i) for i in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], initial_alphabet=letters)
    words.train_from_iterator([" ".join(m["content"] for m in TURNS), "user assistant system model"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL
    )


def adds_bos(tokenizer):
    """The same tokenizer, which begins each text with the beginning-of-sequence token."""
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
    )
    return own


@pytest.fixture
def make(base):
    def make(name, parts=False):
        own = copy.deepcopy(base)
        if name in END:
            own.eos_token = END[name]
        if TEMPLATES.get(name):
            own.chat_template = (PARTS if parts else STRINGS) + TEMPLATES[name]
        return PromptTemplate(own), own

    return make


@pytest.mark.parametrize("chat", [name for name in CHATS if name != FORGED])
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "own"])
def test_a_rendered_chat_gets_the_chat_routes_ids(make, name, parts, chat):
    template, own = make(name, parts)
    assert template.takes_parts is parts
    messages = CHATS[chat]
    text = own.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = template.prompt(messages, 3)
    assert template.place(text, 3, add_special_tokens=False) == expected
    assert template.place(own.encode(text, add_special_tokens=False), 3) == expected
    last = [m["content"] for m in messages if m["role"] == "user"][-1]
    assert template.instruction(text) == last
    assert template.instruction(own.encode(text, add_special_tokens=False)) == last


@pytest.mark.parametrize("chat", ["one turn", "many turns", "empty"])
def test_every_familys_own_template(tokenizer, chat):
    template, messages = PromptTemplate(tokenizer), CHATS[chat]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = template.prompt(messages, 4)
    assert template.place(text, 4) == expected
    assert template.place(tokenizer.encode(text, add_special_tokens=False), 4) == expected
    assert template.instruction(text) == messages[-1]["content"]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_as_many_rows_as_asked_for(make, count):
    template, own = make("llama")
    text = own.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    for prompt in (text, own.encode(text, add_special_tokens=False)):
        placed = template.place(prompt, count, add_special_tokens=False)
        at = [i for i, token in enumerate(placed.is_token) if not token]
        assert at == list(range(placed.start, placed.start + count)) and placed.count == count
        assert placed.ids.count(template.placeholder_id) == count


@pytest.mark.parametrize("name", ["llama", "qwen", None])
@pytest.mark.parametrize("text", ["Once upon a time", "", " a leading space", "a\nb\n"])
def test_a_text_that_is_no_chat_gets_its_rows_first(make, name, text):
    template, own = make(name)
    joint = "" if template.takes_parts else "\n"
    after = own.encode(f"{PLACEHOLDER}{joint}{text}", add_special_tokens=False)
    placed = template.place(text, 2)
    assert (placed.start, placed.count) == (0, 2) and template.instruction(text) == text
    assert placed.ids[2:] == template.tokenizer.encode(f"{PLACEHOLDER}{joint}{text}", add_special_tokens=False)[1:]
    ids = own.encode(text, add_special_tokens=False)
    by_ids = template.place(ids, 2)
    assert by_ids.start == 0 and by_ids.ids[len(by_ids.ids) - len(ids) :] == ids and after is not None


def test_rows_come_after_the_beginning_of_the_sequence(base):
    own = adds_bos(base)
    template = PromptTemplate(own)
    bos = own.bos_token_id
    for prompt in ("Once upon a time", own.encode("Once upon a time")):
        placed = template.place(prompt, 2)
        assert placed.ids[:3] == [bos, template.placeholder_id, template.placeholder_id] and placed.start == 1
        assert placed.ids.count(bos) == 1
    placed = template.place("<s>Once upon a time", 2, add_special_tokens=False)
    assert placed.ids[0] == bos and placed.start == 1
    assert template.place("Once upon a time", 2, add_special_tokens=False).start == 0


def test_a_base_model_without_a_chat_template(base):
    own = copy.deepcopy(base)
    own.chat_template = None
    template = PromptTemplate(own)
    assert template.place("Hello there\n", 2, add_special_tokens=False).ids == [
        i for i in template.prompt("Hello there", 2).ids if i != own.bos_token_id
    ]
    assert template.instruction("Hello there\n") == "Hello there\n"


@pytest.mark.parametrize("name", ["llama", None])
def test_the_placeholder_is_reserved(make, name):
    template, _ = make(name)
    for prompt in (f"ignore {PLACEHOLDER}", [1, template.placeholder_id, 2]):
        with pytest.raises(PersonaError, match="reserved"):
            template.place(prompt, 2)


def test_the_prompt_given_is_not_changed(make):
    template, own = make("llama")
    ids = own.encode("<|start_header_id|>user<|end_header_id|>\n\nHello", add_special_tokens=False)
    before = list(ids)
    template.place(ids, 2)
    assert ids == before


def test_no_tokens_at_all(make):
    template, _ = make("llama")
    assert template.place([], 2).ids[:2] == [template.placeholder_id] * 2 and template.instruction([]) == ""
