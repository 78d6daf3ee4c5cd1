"""What is refused, on namespaces that vLLM's own parser made."""

from argparse import Namespace

import pytest

from persona.errors import PersonaError
from persona.serving.server.flags import _REFUSED, MIDDLEWARE, check_vllm_args
from persona.serving.vllm_offline import import_vllm

LORA = ("--enable-lora", "--lora-target-modules", "qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def parser():
    import_vllm()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


@pytest.fixture
def check(parser):
    """Checks vLLM arguments, embeddings being on, in an environment."""

    def check(*arguments, **environment):
        check_vllm_args(parser.parse_args(["--model", "llm", "--enable-prompt-embeds", *arguments]), environment)

    return check


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--no-enable-prompt-embeds", "only with --enable-prompt-embeds"),
        ("--headless", "--headless .* would not pass through persona"),
        ("--grpc", "--grpc .* would not pass through persona"),
        ("--grpc-port 9000", "--grpc-port .* would not pass through persona"),
        ("--tokens-only", "no chat and completion routes"),
        ("--runner pooling", "--runner pooling .* LLMs that generate"),
        ("--convert embed", "--convert embed .* LLMs that generate"),
        ("--mm-encoder-only", "loads no LLM"),
        ("--skip-tokenizer-init", "no chats"),
        ("--tokenizer-mode mistral", "only Hugging Face tokenizers"),
        ("--tokenizer other", "--tokenizer other .* as --llm"),
        ("--revision v2", "--revision .* as --llm"),
        ("--tokenizer-revision v2", "--tokenizer-revision .* as --llm"),
        ("--chat-template-content-format string", "leave it at auto"),
        ("--trust-request-chat-template", "move or repeat the user tokens"),
        ('--kv-transfer-config {"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}', "another's prompt"),
        ("--kv-transfer-config.kv_connector OffloadingConnector --kv-transfer-config.kv_role kv_both", "another's"),
        ("--kv-offloading-size 4", "--kv-offloading-size .* another's prompt"),
        ('--ec-transfer-config {"ec_connector":"ECExampleConnector","ec_role":"ec_both"}', "another's prompt"),
        ('--kv-events-config {"enable_kv_cache_events":true}', "token ids and the tenants' cache salts"),
        ("--prefix-caching-hash-algo xxhash", "use sha256"),
        ('--speculative-config {"method":"ngram","num_speculative_tokens":2}', "--speculative-config .* diverges"),
        ("--spec-method ngram", "--spec-method .* diverges"),
        ("--spec-model draft", "--spec-model .* diverges"),
        ("--spec-tokens 2", "--spec-tokens .* diverges"),
        ("--enable-log-outputs", "answers to users into the log"),
        ("--enable_log_requests", "users' requests into the log"),
        ("--log-error-stack", "quote users' texts"),
        ("--enable-scale-out", "cache salts of the caller's own"),
        ("--enable-lora", "add --lora-target-modules qkv_proj"),
        ("--lora-modules sql=/lora", "add --lora-target-modules qkv_proj"),
        ("--enable-lora --lora-target-modules qkv_proj embed_tokens", "leaves the LLM's embeddings alone"),
        ("--enable-lora --lora-target-modules qkv_proj lm_head", "leaves the LLM's embeddings alone"),
        (f"--middleware {MIDDLEWARE} --middleware {MIDDLEWARE}", "twice"),
    ],
)
def test_wrong_flags_are_refused_with_the_reason(check, arguments, why):
    with pytest.raises(PersonaError, match=why):
        check(*arguments.split())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("VLLM_USE_RUST_FRONTEND", "would not pass through persona"),
        ("VLLM_SERVER_DEV_MODE", "control the engine"),
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "could load a LoRA"),
        ("VLLM_DEBUG_LOG_API_SERVER_RESPONSE", "answers to users"),
    ],
)
def test_wrong_variables_are_refused_only_when_they_are_on(check, name, why):
    for off in ("0", "False", ""):
        check(**{name: off})
    for on in ("1", "true"):
        with pytest.raises(PersonaError, match=f"{name} is on: .*{why}"):
            check(**{name: on})


@pytest.mark.parametrize("given", [{"arguments": ["--api-key", "a-key-of-vllm"]}, {"VLLM_API_KEY": "a-key-of-vllm"}])
def test_vllms_keys_are_refused_only_beside_ours(check, given):
    arguments, environment = given.get("arguments", []), {k: v for k, v in given.items() if k != "arguments"}
    check(*arguments, **environment)
    with pytest.raises(PersonaError, match="use --keys") as error:
        check(*arguments, **environment, PERSONA_KEYS_FILE="keys.yaml")
    assert "a-key-of-vllm" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        " ".join(LORA),
        f"--middleware some.Other --middleware {MIDDLEWARE}",
        '--kv-events-config {"enable_kv_cache_events":false}',
        "--tokenizer llm --tokenizer-mode hf --runner generate",
        "--data-parallel-size 2 --tensor-parallel-size 2 --pipeline-parallel-size 2",
        "--prefix-caching-hash-algo sha256_cbor --chat-template-content-format auto --cpu-offload-gb 2",
    ],
)
def test_what_works_is_not_refused(check, arguments):
    check(*arguments.split())


def test_every_refused_flag_is_one_of_vllms(parser):
    known = {action.dest for action in parser._actions}
    assert {refusal.name for refusal in _REFUSED} <= known
    for refusal in _REFUSED:  # a value that vLLM no longer knows would never be met
        choices = next(action.choices for action in parser._actions if action.dest == refusal.name)
        if refusal.values and choices:
            assert set(refusal.values) <= set(choices)


def test_a_namespace_of_another_server_needs_embeddings_and_nothing_else():
    check_vllm_args(Namespace(enable_prompt_embeds=True), {})
    with pytest.raises(PersonaError, match="--enable-prompt-embeds"):
        check_vllm_args(Namespace(), {})
