"""What clients send does not come out of the server's log, nor out of its answers' heads."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import serve_fake_engine

FORGED = "forged"
NASTY = f"\r\nerror: {FORGED}\x1b[31m\x07"
QUOTED = f"%0d%0aerror:%20{FORGED}%1b[31m"
DEADLINE_S = 20.0  # far above what anything here takes


def answer_to(port: int, method: str, path: str, body: bytes = b"", **headers: bytes) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", b"Connection: close"]
    lines += [f"{name.replace('_', '-')}: ".encode() + value for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}".encode(), b"", b""]
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as connection:
        connection.sendall(b"\r\n".join(lines) + body)
        with connection.makefile("rb") as answer:
            return answer.read()


def test_nothing_that_clients_send_reaches_the_log_or_a_head(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, str(Path(serve_fake_engine.__file__))],
            stderr=stderr,
            stdout=subprocess.DEVNULL,
        ) as process,
    ):
        while not (found := re.search(r"serving demo on \S+:(\d+)\n", log.read_text())):
            assert process.poll() is None
            time.sleep(0.01)
        port = int(found[1])
        chat = {"messages": [{"role": "user", "content": NASTY}], "max_tokens": 2, "user": NASTY}
        for body in (chat, chat | {"model": NASTY}, {NASTY: 1}, {"messages": NASTY}):
            for path in ("/v1/chat/completions", "/v1/completions", f"/{QUOTED}"):
                given = json.dumps(body).encode()
                answer = answer_to(port, "POST", path, given, X_Forwarded_For=b"x\x1b[31m")
                head, _, rest = answer.partition(b"\r\n\r\n")
                assert FORGED.encode() not in head
                assert b"\x1b" not in answer and b"\r\nerror:" not in rest
        for bad in (b"a\x1b[31mforged", b"a\tforged", b"f" * 129, "né".encode()):
            assert bad not in answer_to(port, "GET", "/health", X_Request_Id=bad)
        answer_to(port, "GET", f"/v1/models/{QUOTED}")
        answer_to(port, FORGED.upper(), "/")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert "\x1b" not in log.read_text() and FORGED not in log.read_text().lower()
