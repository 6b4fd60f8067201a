"""A small server that speaks the OpenAI API and misbehaves on request."""

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.started_s: list[float] = []
        self.gets: list[str] = []
        self.state: dict[str, Any] | None = None
        self.api_key: str | None = None
        self.stop_after: int | None = None  # tokens, unless a request forbids it
        self.routes = {"/v1/completions", "/v1/chat/completions"}
        self.unknown_fields: set[str] = set()  # of a request, which is refused
        self.takes_ids = True  # as a prompt
        self.sends_usage = True
        self.ends_with_done = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.gets.append(self.path)
        if not self._may_ask():
            self._json(401, {"error": {"message": "wrong key"}})
        elif self.path == "/v1/models":
            self._json(200, {"data": [{"id": "fake"}]})
        elif self.path == "/morph/v1/state" and self.server.state is not None:
            self._json(200, self.server.state | {"time": time.time()})
        else:
            self._json(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may_ask():
            return self._json(401, {"error": {"message": "wrong key"}})
        if refusal := self._refusal(body):
            return self._json(*refusal)
        self.server.bodies.append(body)
        self.server.started_s.append(time.monotonic())
        said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        how, _, _ = str(said).partition(" ")
        if how == "refuse":
            self._json(503, {"error": {"message": "the queue is full"}})
        elif not body.get("stream"):
            self._json(200, {"choices": [{"text": "ab" * body["max_tokens"]}]})
        elif how == "slow":
            time.sleep(0.5)
            self._stream(body)
        else:
            self._stream(body, drop=how == "drop", stuck=how == "stuck")

    def _refusal(self, body: dict[str, Any]) -> tuple[int, object] | None:
        if self.path not in self.server.routes:
            return 404, {"detail": "Not Found"}
        if unknown := self.server.unknown_fields & body.keys():
            return 422, {"detail": f"Unexpected fields in the request: {sorted(unknown)}"}
        if not self.server.takes_ids and isinstance(body.get("prompt"), list):
            return 400, {"detail": "prompt must be a string."}
        return None

    def _may_ask(self) -> bool:
        key = self.server.api_key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def _json(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, body: dict[str, Any], drop: bool = False, stuck: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        total, ended = body.get("max_tokens", 6), "length"
        limit = self.server.stop_after
        if limit is not None and limit < total and not body.get("ignore_eos"):
            total, ended = limit, "stop"
        for first in range(0, total, 2):  # two tokens in a piece
            if stuck:
                time.sleep(30)
            count = min(2, total - first)
            last = first + count == total
            reason = ended if last else None
            text = (
                {"delta": {"content": "ab" * count}}
                if "messages" in body
                else {"text": "ab" * count}
            )
            told = {}
            if body.get("return_token_ids"):
                precision = "int4" if last else "full"
                told = {
                    "token_ids": list(range(first, first + count)),
                    "token_precisions": [[precision, count]],
                }
            self._event({"choices": [text | told | {"finish_reason": reason}]})
            if drop:
                self.close_connection = True
                return
        if self.server.sends_usage:
            morph = {"full": total - 1, "int4": 1, "queue_s": 0.25}
            self._event({"choices": [], "usage": {"completion_tokens": total, "morph": morph}})
        if self.server.ends_with_done:
            self._chunk(b"data: [DO")
            self._chunk(b"NE]\n\n")
        self._chunk(b"")

    def _event(self, value: object) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


@contextlib.contextmanager
def fake_server(tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, _Server]]:
    """Its URL and the server; the first word of a prompt says how it is treated."""
    server = _Server()
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        scheme = "http" if tls is None else "https"
        yield f"{scheme}://127.0.0.1:{server.server_address[1]}", server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
