"""Downloads from a real server on this machine, which may break off, ignore ranges, or send something else."""

import json
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from persona.errors import DataError, MissingExtraError, PersonaError
from persona.evaluation.lamp.download import NOTICE, download_lamp
from persona.evaluation.lamp.files import read_samples
from persona.evaluation.lamp.tasks import read_task

TASK = read_task("LaMP_4")
QUESTIONS, OUTPUTS = "LaMP_4/dev/dev_questions.json", "LaMP_4/dev/dev_outputs.json"
HTML = b"<!DOCTYPE html><html><body>There is no such page.</body></html>"


class Server(ThreadingHTTPServer):
    """Sends what is in `files`, by path."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.ranges = True
        self.breaks_at: int | None = None
        """Bytes after which the connection is closed, once."""
        self.down = False
        """Every answer is status 503."""
        self.down_after_break = False
        self.asked: list[tuple[str, str | None]] = []
        """Path and range of each request."""
        self.headers: list[str] = []
        self.base = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        path, wanted = self.path.lstrip("/"), self.headers.get("Range")
        self.server.asked.append((path, wanted))
        self.server.headers.append(str(self.headers))
        if self.server.down or path not in self.server.files:
            self.send_error(503 if self.server.down else 404)
            return
        content = self.server.files[path]
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.breaks_at])
        if self.server.breaks_at:
            self.server.breaks_at, self.server.down = None, self.server.down_after_break

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The tests forbid the Hub, and `http_get` asks that switch for every server."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def server(tmp_path, official):
    """A server of the dev parts of LaMP_4 and LaMP_2, user split."""
    for name in ("LaMP_4", "LaMP_2"):
        official(tmp_path / "official", name, "user")
    files = [path for path in (tmp_path / "official").rglob("*") if path.is_file()]
    with Server({p.relative_to(tmp_path / "official").as_posix(): p.read_bytes() for p in files}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_of_a_part_come_after_the_notice(server, out):
    said = []
    download_lamp(TASK, "user", out, ["dev"], server.base, said.append)
    assert files_of(out) == {path: server.files[path] for path in (QUESTIONS, OUTPUTS)}
    assert said[0] == NOTICE and "CC BY-NC-SA 4.0" in NOTICE and "arXiv 2304.11406" in NOTICE
    assert said[1:3] == [f"fetching {server.base}/{QUESTIONS}", f"wrote {out / QUESTIONS}"]
    assert len(list(read_samples(out / QUESTIONS, out / OUTPUTS, TASK))) == 3


def test_movies_come_from_their_own_folder(server, out):
    download_lamp(read_task("2"), "user", out, ["dev"], server.base)
    assert sorted(files_of(out)) == [f"LaMP_2/new/dev/dev_{kind}.json" for kind in ("outputs", "questions")]


def test_what_is_there_is_not_fetched_again(server, out):
    download_lamp(TASK, "user", out, ["dev"], server.base)
    server.asked.clear()
    said = []
    download_lamp(TASK, "user", out, ["dev"], server.base, said.append)
    assert server.asked == []
    assert said[1:] == [f"{out / path} is there already: not fetched" for path in (QUESTIONS, OUTPUTS)]


def test_the_test_outputs_of_the_user_split_are_not_asked_for(server, out):
    path = QUESTIONS.replace("dev", "test")
    server.files[path] = server.files[QUESTIONS]
    said = []
    download_lamp(TASK, "user", out, ["test"], server.base, said.append)
    assert server.asked == [(path, None)] and list(files_of(out)) == [path]
    assert said[-1] == "the test outputs of the user split are not public: none fetched"


def test_those_of_the_time_split_are(server, out):
    paths = [f"time/{path.replace('dev', 'test')}" for path in (QUESTIONS, OUTPUTS)]
    server.files.update(zip(paths, (b"[]", b'{"task": "LaMP_4", "golds": []}')))
    download_lamp(TASK, "time", out, ["test"], server.base)
    assert [path for path, _ in server.asked] == paths == sorted(files_of(out), reverse=True)


def test_no_token_of_the_hub_goes_along(server, out, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download_lamp(TASK, "user", out, ["dev"], server.base)
    assert len(server.headers) == 2 and "hf_secret" not in "".join(server.headers)
    assert all("authorization" not in text.lower() for text in server.headers)


# --- interruptions ----------------------------------------------------------------------------------------------


@pytest.fixture
def large(server):
    """The server's questions, now of more than the 10 MiB that are written at once."""
    questions = [{"id": str(n), "input": f"{n}" * 500, "profile": []} for n in range(8_000)]
    server.files[QUESTIONS] = json.dumps(questions).encode()
    return server.files[QUESTIONS]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on_at_the_next_call(server, large, out, ranges):
    server.ranges, server.breaks_at, server.down_after_break = ranges, 12_000_000, True
    kept = r"\(the server answers with status 503\); 10485760 bytes are kept in .*questions.json.part, and the next"
    with pytest.raises(PersonaError, match=rf"cannot be fetched {kept}"):
        download_lamp(TASK, "user", out, ["dev"], server.base)
    assert files_of(out) == {f"{QUESTIONS}.part": large[:10_485_760]}
    server.down, server.asked = False, []
    said = []
    download_lamp(TASK, "user", out, ["dev"], server.base, said.append)
    assert server.asked == [(QUESTIONS, "bytes=10485760-"), (OUTPUTS, None)]
    assert f"fetching {server.base}/{QUESTIONS}, going on after 10485760 bytes" in said
    assert files_of(out) == {path: server.files[path] for path in (QUESTIONS, OUTPUTS)}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_short_break_is_passed_over(server, large, out, ranges):
    server.ranges, server.breaks_at = ranges, 12_000_000
    download_lamp(TASK, "user", out, ["dev"], server.base)
    assert server.asked == [(QUESTIONS, None), (QUESTIONS, "bytes=10485760-"), (OUTPUTS, None)]
    assert files_of(out) == {path: server.files[path] for path in (QUESTIONS, OUTPUTS)}


@pytest.mark.parametrize("ranges", [True, False])
def test_all_bytes_but_no_name_yet(server, out, ranges):
    server.ranges = ranges
    download_lamp(TASK, "user", out, ["dev"], server.base)
    (out / QUESTIONS).rename(out / f"{QUESTIONS}.part")
    download_lamp(TASK, "user", out, ["dev"], server.base)
    assert files_of(out) == {path: server.files[path] for path in (QUESTIONS, OUTPUTS)}


def test_more_than_all_bytes(server, out):
    (out / QUESTIONS).parent.mkdir(parents=True)
    (out / f"{QUESTIONS}.part").write_bytes(server.files[QUESTIONS] * 2)
    with pytest.raises(DataError, match=r"what came is not the file, and was removed.*trailing garbage"):
        download_lamp(TASK, "user", out, ["dev"], server.base)
    assert files_of(out) == {}
    download_lamp(TASK, "user", out, ["dev"], server.base)
    assert files_of(out)[QUESTIONS] == server.files[QUESTIONS]


# --- answers that are wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [QUESTIONS, OUTPUTS])
@pytest.mark.parametrize(
    "content, reason",
    [
        (HTML, r"begins with '<!DOCTYPE html>' \(a web page, which is what the server sends for a wrong address\)"),
        (b"", "is empty"),
        (b'[{"id": "1"', "premature EOF|must begin with {"),
        (b'{"task": "LaMP_4", "golds": [', r"premature EOF|must begin with \["),
    ],
)
def test_what_is_not_the_file_is_removed(server, out, path, content, reason):
    server.files[path] = content
    message = f"{server.base}/{path}: what came is not the file, and was removed. .*{path}.part: .*({reason})"
    with pytest.raises(DataError, match=message):
        download_lamp(TASK, "user", out, ["dev"], server.base)
    assert list(files_of(out)) == ([] if path == QUESTIONS else [QUESTIONS])


def test_half_a_web_page_is_no_start_of_a_file(server, out):
    server.files[QUESTIONS] = HTML
    (out / QUESTIONS).parent.mkdir(parents=True)
    (out / f"{QUESTIONS}.part").write_bytes(HTML[:30])
    with pytest.raises(DataError, match="a web page"):
        download_lamp(TASK, "user", out, ["dev"], server.base)
    assert files_of(out) == {}


def test_a_file_that_is_not_on_the_server(server, out):
    del server.files[QUESTIONS]
    place = re.escape(str(out / QUESTIONS))
    message = (
        rf"{QUESTIONS} cannot be fetched \(the server answers with status 404\); no file was changed. .* at {place}"
    )
    with pytest.raises(PersonaError, match=message):
        download_lamp(TASK, "user", out, ["dev"], server.base)
    assert files_of(out) == {}


def test_no_server(out):
    with socket.socket() as taken:  # a port that nobody listens on
        taken.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{taken.getsockname()[1]}"
        message = (
            rf"{base}/{QUESTIONS} cannot be fetched \(.*refused\); no file was changed. .* by hand at .*{QUESTIONS}"
        )
        with pytest.raises(PersonaError, match=message):
            download_lamp(TASK, "user", out, ["dev"], base)
    assert files_of(out) == {}


def test_the_offline_switch_is_named(out, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        PersonaError, match=r"cannot be fetched \(.*offline mode is enabled.*HF_HUB_OFFLINE.*\); no file"
    ):
        download_lamp(TASK, "user", out, ["dev"])


# --- before anything is fetched ---------------------------------------------------------------------------------


def test_mails_are_refused(server, out):
    with pytest.raises(PersonaError, match="LDC2015T03"):
        download_lamp(read_task("6"), "user", out, base=server.base)
    assert server.asked == [] and not out.exists()


@pytest.mark.parametrize("split, parts", [("users", ["dev"]), ("user", ["dev", "validation"])])
def test_splits_and_parts_that_are_not_there(server, out, split, parts):
    with pytest.raises(PersonaError, match=r"of LaMP is .* not '(users|validation)'"):
        download_lamp(TASK, split, out, parts, server.base)
    assert server.asked == [] and not out.exists()


def test_a_missing_extra_is_named(server, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "ijson", None)  # what an uninstalled module looks like to `import`
    with pytest.raises(MissingExtraError, match=r"persona\[eval\]"):
        download_lamp(TASK, "user", out, ["dev"], server.base)
    assert server.asked == []
