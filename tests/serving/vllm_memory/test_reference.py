"""The reference of these tests against the Hugging Face implementation that trains the layers."""

import pytest
import torch


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_equals_the_layers_in_hugging_face(deploy, prompts, family):
    changes = {"hidden_size": 128} if family == "qwen2" else {}
    d = deploy(family, tokens=4, every=2, **changes)
    for ids in prompts(1, 30):
        for memory in (d.user(0), d.user(1), torch.zeros(4, d.width)):
            with torch.inference_mode(), d.cross.reading(memory[None]):
                expected = d.llm(torch.tensor([ids])).logits[0]
            found = d.reference.logits(ids, memory)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            alone = d.reference.logits(ids, None)
            assert torch.equal(alone, found) == (not memory.any())
