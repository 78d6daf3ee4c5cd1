"""One family of errors, which name what to install or to change."""

import inspect
import sys

import pytest

from persona import errors
from persona.errors import MissingExtraError, PersonaError
from persona.injection import PersonalizedLM
from persona.serving.vllm_offline import import_vllm


def test_all_are_persona_errors_and_value_errors():
    found = [e for _, e in inspect.getmembers(errors, inspect.isclass)]
    assert len(found) >= 6 and all(issubclass(e, PersonaError) and issubclass(e, ValueError) for e in found)
    assert issubclass(MissingExtraError, ImportError)


def test_vllm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"persona\[vllm\]"):
        import_vllm()


def test_peft_is_missing(monkeypatch, model, tmp_path):
    model.add_lora(2)
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"persona\[train\]"):
        PersonalizedLM.from_pretrained(tmp_path)
    with pytest.raises(MissingExtraError, match=r"persona\[train\]"):
        model.add_lora(2)


@pytest.mark.vllm
@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0"])
def test_vllm_of_a_version_that_was_not_tested(monkeypatch, version):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(PersonaError, match=rf"vLLM {version} is not tested; install .* 0\.32"):
        import_vllm()
