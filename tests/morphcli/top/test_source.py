"""What `morph top` reads: servers, answers that are none, recordings; and what it prints."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from fake_state import EVENTS, encoded, make_state

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.top.feeds import CannotAct, LiveFeed
from morphserve.morphcli.top.look import BadState, decode
from morphserve.morphcli.top.recording import Recording
from morphserve.morphcli.top.source import Away, Keys, Server

NO_KEYS = Keys()
TOP = (sys.executable, "-m", "morphserve.morphcli", "top")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer: tuple[int, bytes] = (200, encoded())
    asked: list[tuple[str, str, str | None, bytes]] = []

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append((self.command, self.path, self.headers["Authorization"], body))
        status, answer = self.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET


@contextmanager
def answering(status: int = 200, answer: bytes = b"", port: int = 0) -> Iterator[tuple[str, type]]:
    handler = type("Handler", (_Handler,), {"answer": (status, answer), "asked": []})
    with HTTPServer(("127.0.0.1", port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", handler
        finally:
            server.shutdown()
            thread.join()


def unused_url() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


def ask(url: str, keys: Keys = NO_KEYS) -> bytes:
    server = Server(url, keys)
    try:
        return server.state()
    finally:
        server.close()


def test_a_state_is_read_as_it_was_sent() -> None:
    state = make_state()
    assert decode(encoded(time=state.time, started=state.started)) == state


def test_fields_that_a_later_server_adds_are_no_trouble() -> None:
    later = json.loads(encoded()) | {"held": 3}
    assert decode(json.dumps(later).encode()).model == "demo"


def test_control_characters_of_a_server_reach_no_terminal() -> None:
    evil = "\x1b]0;owned\x07 \x9b2J \u202e abc"
    state = decode(encoded(model=evil, refused={evil: 1}, status=evil))
    for text in (state.model, state.status, *state.refused):
        assert text.isprintable() and "owned" in text


@pytest.mark.parametrize("body", [b"", b"no", b"[]", b"{}", b'{"time": "x"}', b"[" * 100_000])
def test_what_is_no_state_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(BadState, match="no state of a MorphServe server"):
        decode(body)


def test_the_key_travels_as_a_bearer_token() -> None:
    with answering(answer=encoded()) as (url, handler):
        ask(url, Keys(api="secret"))
        assert handler.asked == [("GET", "/morph/v1/state", "Bearer secret", b"")]


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (401, b"", "--api-key or MORPH_API_KEY"),
        (404, b"", "no /morph/v1/state on this server"),
        (503, b'{"error": {"message": "shutting \x1b down"}}', r"no reason was given \(HTTP 503\)"),
        (503, b'{"error": {"message": "the engine died"}}', r"the engine died \(HTTP 503\)"),
        (500, b"oops", "HTTP 500"),
    ],
)
def test_a_refusal_says_what_to_do(status: int, answer: bytes, words: str) -> None:
    with answering(status, answer) as (url, _), pytest.raises(Away, match=words):
        ask(url)


def test_closing_ends_a_request_that_waits_for_its_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", NO_KEYS)
        ended: list[Exception] = []

        def ask_once() -> None:
            try:
                server.state()
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=ask_once)
        thread.start()
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(1000).startswith(b"GET /morph/v1/state")
            server.close()
            thread.join()
    assert [type(error) for error in ended] == [Away]


def test_a_server_that_is_away_is_named() -> None:
    with pytest.raises(Away, match="does not answer"):
        ask(unused_url())


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:notaport", "no/such/file"])
def test_what_is_no_url_is_refused(url: str) -> None:
    if url == "no/such/file":
        url = "://no"
    with pytest.raises(ConfigError, match="write http://HOST:PORT"):
        Server(url, Keys())


@pytest.mark.anyio
async def test_the_feed_finds_a_server_again(anyio_backend: str) -> None:
    url = unused_url()
    feed = LiveFeed(url, Keys())
    assert await feed.look(0.0) == [] and "does not answer" in feed.note
    with answering(answer=encoded(running=7), port=int(url.rpartition(":")[2])):
        (state,) = await feed.look(0.0)
        assert state.running == 7 and feed.note == ""
        feed.close()


@pytest.mark.anyio
async def test_acting_needs_the_admin_key(anyio_backend: str) -> None:
    with answering(answer=b"{}") as (url, handler):
        with pytest.raises(CannotAct, match="MORPH_ADMIN_KEY"):
            await LiveFeed(url, Keys(api="secret")).act("step", {"by": 1})
        await LiveFeed(url, Keys(api="secret", admin="root")).act("step", {"by": 1})
        assert handler.asked == [("POST", "/morph/v1/step", "Bearer root", b'{"by":1}')]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_a_recording_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    for content, words in ((b"", "is empty"), (b"hello\n", "is no recording"), (b"{}\n", "is no")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            Recording(path)


def test_a_recording_that_was_cut_off_plays_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    whole = [encoded(time=1.0), encoded(time=2.0)]
    path.write_bytes(b"\n".join([*whole, encoded(time=3.0)[:-9]]))
    assert Recording(path).lines() == whole
    path.write_bytes(b"\n".join([whole[0], whole[1][:-9], whole[1]]))
    with pytest.raises(ConfigError, match="is no recording"):
        Recording(path)
    path.write_bytes(whole[0][:-9])
    with pytest.raises(ConfigError, match="is no recording"):
        Recording(path)


def test_off_a_terminal_a_line_of_json_is_printed_per_look(tmp_path: Path) -> None:
    with answering(answer=encoded(running=7)) as (url, _):
        command = [*TOP, url]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
    path = tmp_path / "session.jsonl"
    path.write_bytes(b"".join(lines))
    assert [decode(line).running for line in Recording(path).lines()] == [7, 7, 7]
    assert decode(lines[0]).events == EVENTS


def test_off_a_terminal_a_refused_key_is_the_end() -> None:
    with answering(401) as (url, handler):
        environment = os.environ | {"MORPH_API_KEY": "sk-1 sk-2"}
        result = subprocess.run(
            [*TOP, url], stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=60
        )
    assert result.returncode == 1 and result.stdout == b""
    assert result.stderr.startswith(b"error: the server wants a key: --api-key or MORPH_API_KEY")
    assert result.stderr.count(b"\n") == 1
    assert [key for _, _, key, _ in handler.asked] == ["Bearer sk-1"]


def test_nobody_reading_any_more_is_a_quiet_end() -> None:
    reader, writer = os.pipe()
    with answering(answer=encoded()) as (url, _):
        with subprocess.Popen(
            [*TOP, url], stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE
        ) as process:
            os.close(writer)
            os.read(reader, 10)
            os.close(reader)
            assert process.stderr is not None
            assert process.wait(timeout=60) == 0 and process.stderr.read() == b""
