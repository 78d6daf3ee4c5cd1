"""What an integration says when the tool that it is for is not installed."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("name", "missing"), [("litellm", "litellm"), ("langchain", "langchain_openai")])
def test_a_missing_tool_names_the_extra(name, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import persona.integrations.{name}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "MissingExtraError" in run.stderr and f"pip install 'persona[{name}]'" in run.stderr
