"""vLLM and Hugging Face agree on every LLM family, with and without prefix cache; one engine in one process each."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from persona.injection import PersonalizedLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SERVE = """
import json, sys
from safetensors.torch import load_file
from persona.injection import Prompt
from persona.serving import VLLMEngine

folder, prefix_cache = sys.argv[1], sys.argv[2] == "True"
engine = VLLMEngine(
    folder + "/llm",
    max_model_len=512,
    max_num_seqs=8,
    enable_prefix_caching=prefix_cache,
    kv_cache_memory_bytes=64 * 2**20,
)
prompts = [Prompt(**p) for p in json.load(open(folder + "/prompts.json"))]
rows = load_file(folder + "/rows.safetensors")["rows"]
sampling = engine._sampling(temperature=0.0, max_tokens=12)
passes = [engine.engine.generate(engine.inputs(prompts, rows), sampling, use_tqdm=False) for _ in range(2)]
result = {
    "ids": [[list(out.outputs[0].token_ids) for out in outputs] for outputs in passes],
    "cached": max(out.num_cached_tokens or 0 for out in passes[1]),
}
json.dump(result, open(folder + "/result.json", "w"))
"""


def serve(folder, prefix_cache=True):
    """Both passes of a fresh engine in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVE, str(folder), str(prefix_cache)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def asked(encoder, tokenizer, shop_histories, tmp_path):
    """Writes an LLM with prompts and rows to a folder; returns the folder and Hugging Face's answers."""

    def write(llm):
        torch.manual_seed(2)
        lm = PersonalizedLM(llm, tokenizer, encoder).eval()
        states = encoder.read(shop_histories)
        system = {"role": "system", "content": "You answer questions of a shop about its users. " * 3}
        question = "What does this user buy most?"
        prompts = [lm.template.prompt([system, {"role": "user", "content": question}], 4) for _ in states]
        prompts.append(lm.template.prompt("Which app does this user open most?"))
        rows = lm.soft_rows(states, [question] * 3)
        ids = []
        for i, prompt in enumerate(prompts):
            batch = lm.collate([prompt])
            with torch.inference_mode():
                embeds = lm.embed(rows[i] if prompt.count else None, batch)
                out = llm.generate(
                    inputs_embeds=embeds, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=12
                )
            ids.append(out[0].tolist())
        llm.save_pretrained(tmp_path / "llm")
        tokenizer.save_pretrained(tmp_path / "llm")
        fields = [{"ids": p.ids, "start": p.start, "count": p.count} for p in prompts]
        (tmp_path / "prompts.json").write_text(json.dumps(fields))
        save_file({"rows": rows.flatten(0, 1).contiguous()}, tmp_path / "rows.safetensors")
        return tmp_path, ids

    return write


def test_every_family_token_by_token(family, family_llm, asked):
    folder, expected = asked(family_llm)
    assert len({tuple(ids) for ids in expected}) == len(expected)
    found = serve(folder)
    assert found["ids"] == [expected, expected]
    assert found["cached"] >= 32


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_without_prefix_cache(family_llm, asked):
    folder, expected = asked(family_llm)
    assert serve(folder, prefix_cache=False) == {"ids": [expected, expected], "cached": 0}
