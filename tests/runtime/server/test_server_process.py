"""A whole server, with its engine process, over real sockets and signals."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_engine
import openai
import pytest
import serve_fake_engine

from morphserve.runtime.supervisor import MAX_DEATHS

SCRIPT = str(Path(serve_fake_engine.__file__))
DEADLINE_S = 20.0  # far above what anything here takes


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    start: Sequence[str] = ()  # the lines it begins with

    def is_listening(self) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def wait_until_ready(self) -> None:
        until(lambda: self.get("/ready")[0] == 200)

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def children(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def ask(self, path: str) -> socket.socket:
        """A connection on which this path has been asked for."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        return connection

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, body

    def state(self) -> Any:
        return json.loads(self.get("/morph/v1/state")[1])

    def post(self, keep_alive: bool = False, **fields: Any) -> socket.socket:
        """A connection on which this completion has been asked for."""
        return self.send(json.dumps(fields).encode(), keep_alive=keep_alive)

    def send(
        self, body: bytes, announced: int | None = None, keep_alive: bool = False
    ) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)
        length = len(body) if announced is None else announced
        head = [
            "POST /v1/completions HTTP/1.1",
            "Host: localhost",
            f"Connection: {'keep-alive' if keep_alive else 'close'}",
            f"Content-Length: {length}",
        ]
        connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        return connection

    def wait_for_running(self, count: int) -> None:
        until(lambda: self.state()["running"] == count)

    def engine_pid(self) -> int:
        return self.children()[0]

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)


def is_running(pid: int) -> bool:
    """Whether the process is there and not merely waiting for its parent to notice its end."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def read_all(connection: socket.socket) -> str:
    """Everything until the server hangs up."""
    with connection, connection.makefile("rb") as file:
        return file.read().decode()


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """Starts a server with these flags."""
    with ExitStack() as stack:

        def start(*flags: str) -> Server:
            process = subprocess.Popen(
                [sys.executable, SCRIPT, *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None and process.stderr is not None
            start = [process.stderr.readline() for _ in range(4)]
            match = re.fullmatch(r"serving demo on http://127\.0\.0\.1:(\d+)\n", start[2])
            assert match, "".join(start) + process.stderr.read()
            assert start[0] == "loading demo ...\n"
            return Server(process, int(match[1]), start)

        yield start


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server()


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_the_openai_client_streams_and_does_not(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").object == "model"
        whole = client.completions.create(model="demo", prompt="import os\n", max_tokens=6)
        assert whole.choices[0].text == "import os\n" * 2
        assert whole.usage is not None and whole.usage.completion_tokens == 6
        chat = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )
        assert chat.choices[0].message.content == "user: h"
        with client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "user: h"
        assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens > 3
        with pytest.raises(openai.BadRequestError, match="together exceed"):
            client.completions.create(model="demo", prompt="a", max_tokens=5000)
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here"):
            client.completions.create(model="gpt-4", prompt="a")


def test_the_start_tells_policy_memory_time_and_a_command_to_try(server: Server) -> None:
    assert server.start[1].startswith(
        "native kernels on a CPU, policy balanced, 2 threads, memory budget automatic, KV cache of "
        "640 tokens at full precision and 1280 at most, started in "
    )
    url = f"http://127.0.0.1:{server.port}"
    assert server.start[3].startswith(f"try: curl {url}/v1/completions -d '{{")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", [[5], [fake_engine.MUTE]], ids=["speaking", "silent"])
def test_a_client_that_leaves_frees_its_request(
    server: Server, stream: bool, prompt: list[int]
) -> None:
    connection = server.post(prompt=prompt, max_tokens=1000, stream=stream)
    server.wait_for_running(1)
    connection.close()
    server.wait_for_running(0)
    assert server.state()["preemptions"] == 1  # where the fake engine counts aborts


def test_a_client_that_leaves_takes_all_its_prompts_along(server: Server) -> None:
    connection = server.post(prompt=[[fake_engine.MUTE]] * 5, max_tokens=1000, stream=True)
    server.wait_for_running(5)
    connection.close()
    server.wait_for_running(0)


def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_0(server: Server) -> None:
    wishes = {"include_usage": True}
    stream = server.post(prompt=[5], max_tokens=1000, stream=True, stream_options=wishes)
    server.wait_for_running(1)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: read_all(server.post(prompt="a")).startswith("HTTP/1.1 503"))
    text = read_all(stream)
    assert '"completion_tokens":1000' in text and "data: [DONE]" in text
    assert server.wait() == 0
    assert server.process.stdout is not None
    assert server.process.stdout.read() == "torch imported: False\n"


def test_a_second_signal_aborts_with_an_error_event(server: Server) -> None:
    stream = server.post(prompt=[5], max_tokens=1000, stream=True)
    silent = server.post(prompt=[fake_engine.MUTE], max_tokens=10)
    server.wait_for_running(2)
    server.process.send_signal(signal.SIGINT)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert '"message":"the server is shutting down; the request was aborted"' in read_all(stream)
    assert read_all(silent).startswith("HTTP/1.1 503")


def test_a_killed_engine_is_told_to_clients_and_started_again(server: Server) -> None:
    stream = server.post(prompt=[5], max_tokens=1000, stream=True)
    silent = server.post(prompt=[fake_engine.MUTE], max_tokens=10)
    server.wait_for_running(2)
    engine = server.engine_pid()
    subprocess.run(["kill", "-9", str(engine)], check=True)
    assert '"type":"server_error"' in read_all(stream)
    answer = read_all(silent)  # none of it was told: the client may try again
    assert answer.startswith("HTTP/1.1 503") and "retry-after: " in answer
    server.wait_until_ready()
    assert server.engine_pid() != engine
    answer = read_all(server.post(prompt="import os\n", max_tokens=3))
    assert answer.startswith("HTTP/1.1 200")
    state = server.state()
    assert state["engine_restarts"] == 1 and state["refused"] == {"engine_down": 1}
    told = [event["text"] for event in state["events"] if event["kind"] == "engine"]
    assert "was killed by signal 9 (out of memory?)" in told[0] and "serves again" in told[1]
    ids = [event["id"] for event in state["events"]]
    assert ids == sorted(set(ids))
    assert b"morph:engine_restarts_total 1.0" in server.get("/metrics")[1]
    server.process.terminate()
    assert server.wait() == 0


def test_restarts_leave_no_files_and_no_processes_behind(server: Server) -> None:
    files = server.open_files()
    for count in range(1, 4):
        os.kill(server.engine_pid(), signal.SIGKILL)
        until(lambda count=count: server.state()["engine_restarts"] == count)
    until(lambda: server.open_files() <= files)
    assert len(server.children()) == 1


def test_an_engine_that_keeps_dying_ends_the_server_with_1_and_the_cause(server: Server) -> None:
    for _ in range(MAX_DEATHS):
        server.wait_until_ready()
        assert read_all(server.post(prompt=[fake_engine.CRASH])).startswith("HTTP/1.1 503")
    assert server.wait() == 1
    assert server.process.stderr is not None
    log = server.process.stderr.read()
    assert "RuntimeError: told to crash" in log and "Traceback" in log
    assert "stopping: the engine failed: RuntimeError: told to crash" in log


def test_an_engine_that_dies_while_its_requests_finish_ends_the_server_with_1_and_the_cause(
    server: Server,
) -> None:
    stream = server.post(prompt=[5], max_tokens=2000, stream=True)
    server.wait_for_running(1)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.get("/ready")[0] == 503)
    os.kill(server.engine_pid(), signal.SIGKILL)
    assert '"type":"server_error"' in read_all(stream)
    assert server.wait() == 1
    assert server.process.stderr is not None
    assert "stopping: the engine process was killed by signal 9" in server.process.stderr.read()


def test_a_dead_engine_is_503_with_its_cause_until_it_serves_again(server: Server) -> None:
    for _ in range(MAX_DEATHS - 1):  # the wait before the next start is longest then
        server.wait_until_ready()
        os.kill(server.engine_pid(), signal.SIGKILL)
        until(lambda: server.get("/health")[0] == 503)
    answers = [read_all(server.ask(path)) for path in ("/health", "/ready")]
    answers.append(read_all(server.post(prompt="a")))
    for answer in answers:
        assert answer.startswith("HTTP/1.1 503") and "was killed by signal 9" in answer
        assert re.search(r"retry-after: [1-9]\d*\r\n", answer)
    assert server.state()["refused"] == {"engine_down": 1}
    server.process.terminate()
    assert server.wait() == 0


def test_a_stuck_engine_is_replaced_and_its_stack_is_in_the_log(
    start_server: Callable[..., Server],
) -> None:
    server = start_server("--engine-timeout", "1")
    stuck = server.post(prompt=[fake_engine.STUCK], max_tokens=3)
    assert read_all(stuck).startswith("HTTP/1.1 503")
    until(lambda: server.state()["engine_restarts"] == 1)
    server.process.terminate()
    assert server.wait() == 0
    assert server.process.stderr is not None
    log = server.process.stderr.read()
    assert log.count("warning: engine: the engine said nothing for 1 s") == 1
    assert log.count("the engine said nothing for 1 s") == 1
    assert "Fatal Python error: Aborted" in log and "fake_engine.py" in log


def test_a_hangup_of_the_terminal_drains_like_sigterm(server: Server) -> None:
    stream = server.post(prompt=[5], max_tokens=500, stream=True)
    server.wait_for_running(1)
    server.process.send_signal(signal.SIGHUP)
    assert "data: [DONE]" in read_all(stream)
    assert server.wait() == 0


def test_a_draining_server_says_when_to_come_again_and_hangs_up(server: Server) -> None:
    stream = server.post(prompt=[fake_engine.MUTE], max_tokens=5, stream=True)
    server.wait_for_running(1)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.get("/ready")[0] == 503)
    answer = read_all(server.post(keep_alive=True, prompt="a"))
    assert answer.startswith("HTTP/1.1 503")
    assert "connection: close\r\n" in answer and "retry-after: 1\r\n" in answer
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert read_all(stream).startswith("HTTP/1.1 503")


@pytest.mark.parametrize("files", ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_server_without_a_log_serves_on(files: str, free_port: int) -> None:
    command = f"exec {sys.executable} {SCRIPT} --port {free_port} {files}"
    with subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.DEVNULL) as process:
        server = Server(process, free_port)
        until(server.is_listening)
        os.kill(server.engine_pid(), signal.SIGKILL)
        until(lambda: server.state()["engine_restarts"] == 1)
        assert "[DONE]" in read_all(server.post(prompt=[5], max_tokens=3, stream=True))
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


def test_the_engine_leaves_with_a_killed_server(server: Server) -> None:
    engine = server.engine_pid()
    server.process.kill()
    until(lambda: not is_running(engine))


def test_a_huge_body_is_refused_before_it_is_sent(server: Server) -> None:
    answer = read_all(server.send(b'{"prompt": "', announced=64 * 1024 * 1024))
    assert answer.startswith("HTTP/1.1 413") and "larger than 2 MiB" in answer
    assert server.get("/health")[0] == 200


def test_a_refusal_reaches_a_client_that_is_still_sending(server: Server) -> None:
    answer = read_all(server.send(b" " * (32 << 20)))
    assert answer.startswith("HTTP/1.1 413")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET /" + b"a" * 300 + b" HTTP/9.9\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_harm_nobody(server: Server, request_bytes: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as connection:
        connection.sendall(request_bytes)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")
    assert server.get("/health")[0] == 200


def test_a_port_in_use_is_one_sentence(server: Server) -> None:
    second = subprocess.run(
        [sys.executable, SCRIPT, "--port", str(server.port)], capture_output=True, text=True
    )
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1:{server.port}: " in second.stdout


def test_a_host_that_is_not_here_is_one_sentence() -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, "--host", "256.1.1.1"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stdout.startswith("cannot listen on host '256.1.1.1': ")


def test_a_server_that_others_can_reach_warns_that_no_key_is_checked() -> None:
    with subprocess.Popen(
        [sys.executable, SCRIPT, "--host", "0.0.0.0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(5)]
        process.terminate()
    assert lines[4].startswith(b"warning: other machines can reach this server")
