"""The OpenAI client for JavaScript, run by node against the real gateway."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

JS = Path(__file__).parent / "js"


@pytest.fixture(scope="session")
def node_folder():
    """A folder outside the tree with the locked packages, kept from run to run."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        if os.environ.get("CI"):
            pytest.fail("node and npm are not installed, and CI is set")
        pytest.skip("node and npm are not installed")
    digest = hashlib.sha256((JS / "package-lock.json").read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "persona-tests" / f"openai-js-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "installed").exists():
        for name in ("package.json", "package-lock.json"):
            shutil.copy(JS / name, folder)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)
        assert run.returncode == 0, run.stderr
        (folder / "installed").touch()
    return folder


def run_node(folder, url):
    script = folder / f"call-{os.getpid()}.mjs"  # modules are looked for beside the script
    shutil.copy(JS / "call.mjs", script)
    try:
        env = {**os.environ, "PERSONA_URL": f"{url}/v1"}
        return subprocess.run(["node", script], capture_output=True, text=True, timeout=60, env=env)
    finally:
        script.unlink()


def test_the_readme_shows_the_script_that_runs_here(examples):
    assert examples["javascript"] == (JS / "call.mjs").read_text(encoding="utf-8")


def test_the_gateway_personalises_for_the_client_and_says_so(node_folder, gateway, recorder):
    run = run_node(node_folder, gateway)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["music", "personalized"]
    body, headers = recorder.last
    part, text = body["messages"][0]["content"]
    assert part["type"] == "prompt_embeds" and text == {"type": "text", "text": "What next?"}
    assert "user" not in body and headers["user-agent"].startswith("OpenAI/JS")


def test_user_and_instruction_leave_the_client_as_the_server_reads_them(node_folder, recorder):
    run = run_node(node_folder, recorder.url)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["music", "null"]  # a plain vLLM says nothing of users
    body, headers = recorder.last
    assert body["user"] == "ana"
    assert headers["x-persona-instruction"] == "Which%20music%20does%20this%20user%20like%3F%20%E2%99%AA"
