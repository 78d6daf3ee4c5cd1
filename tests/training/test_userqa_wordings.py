"""Wordings of an LLM, asked over real HTTP: it sees templates alone, and what it says is checked."""

import json
import socket
import threading
from collections import Counter
from copy import copy
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest

from persona.demo.shop import generate_shop
from persona.errors import PersonaError
from persona.training.userqa import Rewriting, UserQAConfig, triples, write_userqa
from persona.training.userqa.wordings import choose

DEMO = Path(__file__).parents[2] / "adapters" / "demo" / "recipe.yaml"


def load(folder):
    return datasets.load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


class LLM(ThreadingHTTPServer):
    """A server that speaks OpenAI's chat completions and keeps what it is asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.keys, self.status, self.raw = [], [], 200, None
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def reply(self, request):
        """Good wordings and bad ones, with an introduction, as LLMs give them."""
        question = request.rsplit("Question: ", 1)[1]
        bad = ["", f"{question} {{user}}", "x" * 300 + question, f"Well,\n{question}", question.upper(), "Hm?\ud83d"]
        good = [f"Please say: {question}", f"Tell me: {question}", f"I ask: {question}", f"One too many: {question}"]
        return "Here [as asked]: " + json.dumps([*bad, good[0], *good])


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["authorization"])
        content = self.server.reply(body["messages"][0]["content"])
        message = {"role": "assistant", "content": content}
        whole = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
        whole["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        data = json.dumps(whole if self.server.raw is None else self.server.raw).encode()
        self.send_response(self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def llm():
    with LLM() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_an_llm_rewrites_the_templates_and_sees_no_user(domain, text_encoder, llm, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rewriting, said, out = Rewriting(llm.url, "tiny", 3), [], tmp_path / "out"
    config = UserQAConfig(easy_share=1)
    write_userqa(domain, out, config, rewriting=rewriting, encoder=text_encoder, say=said.append)
    assert len(llm.bodies) == len(said) == len(domain.recipe.questions) and set(llm.keys) == {"Bearer secret"}
    assert all(line.endswith(")") and "3 wordings kept, 7 refused" in line for line in said)
    sent = json.dumps(llm.bodies)
    assert all(body["temperature"] == 0 and body["model"] == "tiny" for body in llm.bodies)
    assert not any(user in sent for user in domain.histories)
    bought = {e.text for h in domain.histories.values() for e in h.events if e.source == "purchase"}
    assert len(bought) > 50 and not any(text in sent for text in bought)

    plain, loaded = list(triples(domain, "train", config, text_encoder)), load(out)["train"]
    known = json.loads((out / "wordings.json").read_text())["questions"]
    starts = Counter()
    assert len(loaded) == len(plain)
    for row, same in zip(loaded, plain):
        assert (row["answer"], row["rank"]) == (same.question.answer, same.rank)
        start = row["instruction"].removesuffix(same.question.prompt)
        assert row["instruction"] == start + same.question.prompt
        assert start + known[row["task"]]["prompt"] in [known[row["task"]]["prompt"], *known[row["task"]]["kept"]]
        starts[start] += 1
    assert set(starts) == {"", "Please say: ", "Tell me: ", "I ask: "} and min(starts.values()) > len(loaded) / 8
    assert "tiny" in (out / "README.md").read_text() and "no record of any user" in (out / "README.md").read_text()


def test_wordings_are_kept_and_asked_for_again_only_where_something_changed(domain, text_encoder, llm, tmp_path):
    out, config = tmp_path / "out", UserQAConfig(per_user=1)

    def write(source=domain, **changes):
        llm.bodies.clear()
        rewriting = Rewriting(**{"url": llm.url, "model": "tiny", "count": 2, **changes})
        options = {"encoder": text_encoder, "overwrite": True, "say": lambda _: None}
        write_userqa(source, out, config, rewriting=rewriting, **options)
        return len(llm.bodies), contents(out)

    calls, first = write()
    assert calls == len(domain.recipe.questions) and "wordings.json" in first
    assert write(url="http://127.0.0.1:9/v1") == (0, first)  # nobody listens there
    other = copy(domain)
    changed = dict(domain.recipe.questions)
    changed["recent_category"] = replace(changed["recent_category"], prompt="What lately?")
    other.recipe = replace(domain.recipe, questions=changed)
    assert write(other)[0] == 1 and write(model="large")[0] == len(changed)

    file = out / "wordings.json"
    file.write_text(file.read_text().replace("Tell me: What did", "Tell {me}: What did"))
    with pytest.raises(PersonaError, match=r"questions\.recent_category has the wording 'Tell \{me\}.*other places"):
        write(model="large")
    file.write_text("{")
    with pytest.raises(PersonaError, match=r"wordings\.json is not JSON"):
        write()
    file.write_text("{}")
    with pytest.raises(PersonaError, match=r"wordings\.json: model is missing"):
        write()


def test_an_llm_that_cannot_be_asked_is_an_error_for_people(domain, llm, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"

    def refused(url, message):
        with pytest.raises(PersonaError, match=message):
            write_userqa(domain, tmp_path / "out", rewriting=Rewriting(url, "tiny"))
        assert list(tmp_path.iterdir()) == []

    refused(nobody, r"did not answer \(Connection error.*--rewrite-url")
    llm.status = 401
    refused(llm.url, "did not answer .*OPENAI_API_KEY")
    llm.status, llm.raw = 200, {"hello": "world"}
    refused(llm.url, "not as a chat completion")
    assert set(llm.keys) == {"Bearer none"}


@pytest.mark.parametrize(
    "reply, kept, refused",
    [
        ('["Buys {item}?", "Gets {item}?"]', ["Buys {item}?", "Gets {item}?"], 0),
        ('<think>[1] or ["no"]</think> ```json\n[" Buys {item}? "]\n```', ["Buys {item}?"], 0),
        ('["Buys it?", "{item} or {item}?", "{item} of {value}?", "buy {ITEM}?"]', [], 4),
        ('["will THEY buy {item}?", "Buys {item}?", "buys {item}?"]', ["Buys {item}?"], 2),
        ('["{item} 1", "{item} 2", "{item} 3", "{item} 4"]', ["{item} 1", "{item} 2", "{item} 3"], 0),
        ("Buys {item}?", [], 1),
        ('["Buys {item}?", 3]', [], 1),
        ("[" * 100_000, [], 1),
        ("", [], 1),
    ],
)
def test_a_wording_has_the_places_of_its_template(reply, kept, refused):
    found = choose("Will they buy {item}?", reply, 3)
    assert (found.kept, sum(found.refused.values())) == (kept, refused)
    assert found.all == ("Will they buy {item}?", *kept)


def test_the_verb_writes_a_dataset_and_says_so(run, llm, tmp_path):
    data, out = tmp_path / "shop", tmp_path / "out"
    generate_shop(data, users=20)
    common = ("data", "userqa", DEMO, "--data", data, "--out", out, "--per-user", "2")
    done = run(*common, "--rewrite-url", llm.url, "--rewrite-model", "tiny")
    assert done.returncode == 0 and "| next_purchase |" in done.stdout
    last = done.stderr.strip().split("\n")[-1]
    assert last.startswith(f"wrote {out}: train") and "easy ones left out" in last
    assert len(load(out)["train"]) > 20 and len(llm.bodies) == 3
    again = run(*common)
    assert again.returncode == 1 and "--overwrite" in again.stderr and again.stderr.startswith("persona: ")
    assert run(*common, "--overwrite").returncode == 0 and not (out / "wordings.json").exists()
