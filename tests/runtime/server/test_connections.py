"""Connections of clients that send too slowly, too much or too often, or do not read."""

import asyncio
import contextlib
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import fake_engine
import httpx
import pytest
import uvicorn
import uvloop
from engine_thread import EngineThread

from morphserve.runtime.server.app import make_app
from morphserve.runtime.server.connections import Limits, http_config
from morphserve.runtime.server.serving import Serving

pytestmark = pytest.mark.anyio
PATIENT = Limits(head_s=1000.0, keep_alive_s=1000, stall_s=1000.0)
DEADLINE_S = 20.0  # far above what anything here takes
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": uvloop.new_event_loop}  # as in a server


@asynccontextmanager
async def listening(serving: Serving, limits: Limits) -> AsyncIterator[int]:
    """The port of a server with these limits."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(http_config(make_app(serving), limits, serving.admission))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await running


async def send(port: int, *parts: bytes) -> Stream:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    return reader, writer


async def answer_of(stream: Stream) -> bytes:
    """Everything until the server hangs up."""
    reader, writer = stream
    async with asyncio.timeout(DEADLINE_S):
        data = await reader.read()
    writer.close()
    return data


async def until(happened: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await happened():
            await asyncio.sleep(0.01)


async def status(port: int, path: str = "/health") -> int:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(f"http://127.0.0.1:{port}{path}")).status_code


async def test_a_head_that_does_not_arrive_is_a_408(serving: Serving) -> None:
    async with listening(serving, replace(PATIENT, head_s=0.2)) as port:
        stream = await send(port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        answer = await answer_of(stream)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the request's head did not arrive" in answer
    assert b'"type":"invalid_request_error"' in answer and b"x-request-id: " in answer


async def test_a_trickle_does_not_put_the_end_off(serving: Serving) -> None:
    async with listening(serving, replace(PATIENT, head_s=0.3)) as port:
        reader, writer = await send(port, b"GET /health HTTP/1.1\r\n")
        async with asyncio.timeout(DEADLINE_S):
            while not reader.at_eof():
                writer.write(b"X: y\r\n")
                data = b""
                try:
                    async with asyncio.timeout(0.02):
                        data = await reader.read(4096)
                except TimeoutError:
                    continue
                if data:
                    assert data.startswith(b"HTTP/1.1 408 ")
                    break
        writer.close()


async def test_a_connection_that_says_nothing_is_closed_without_a_word(serving: Serving) -> None:
    async with listening(serving, replace(PATIENT, head_s=0.1)) as port:
        assert await answer_of(await send(port)) == b""


async def test_an_idle_connection_is_closed_after_the_keep_alive(serving: Serving) -> None:
    async with listening(serving, replace(PATIENT, keep_alive_s=1)) as port:
        request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        answer = await answer_of(await send(port, request, request))
    assert answer.count(b"HTTP/1.1 200 OK") == 2


async def test_a_body_that_nobody_wants_does_not_keep_the_connection(serving: Serving) -> None:
    async with listening(serving, replace(PATIENT, head_s=0.2)) as port:
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        answer = await answer_of(await send(port, head, b"x"))
    assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ", b"x" * 4096),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"X-Many: y\r\n" * 400),
        (b"GET /", b"x" * 4096),
        (
            b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nT: ",
            b"x" * 4096,
        ),
    ],
    ids=["header", "headers", "path", "trailer"],
)
async def test_a_head_without_an_end_is_cut_off(
    serving: Serving, start: bytes, part: bytes
) -> None:
    async with listening(serving, PATIENT) as port:
        reader, writer = await send(port, start)
        over = asyncio.create_task(reader.read())
        async with asyncio.timeout(DEADLINE_S):
            while not over.done():
                writer.write(part)
                await asyncio.sleep(0)
        writer.close()
        assert await status(port) == 200


async def test_a_head_that_is_too_large_is_a_431(serving: Serving) -> None:
    async with listening(serving, PATIENT) as port:
        stream = await send(port, b"GET /health HTTP/1.1\r\nX-Long: ", b"x" * 100_000)
        assert (await answer_of(stream)).startswith(b"HTTP/1.1 431 ")


async def test_what_is_no_request_is_a_400_in_the_envelope(serving: Serving) -> None:
    async with listening(serving, PATIENT) as port:
        answer = await answer_of(await send(port, b"NONSENSE\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 400 ") and b'{"error":{"message":"this is not' in answer


_BODY = b'{"prompt": [5], "max_tokens": 2}'
_LENGTH = b"Content-Length: %d\r\n\r\n" % len(_BODY)
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY)


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
@pytest.mark.parametrize(
    "parts",
    [[_LENGTH + _BODY], [_LENGTH, _BODY], [_CHUNKED], [_LENGTH + _BODY[:9], _BODY[9:]]],
    ids=["at once", "body later", "chunked", "body in parts"],
)
async def test_the_wish_for_another_protocol_is_passed_over(
    serving: Serving, parts: list[bytes], upgrade: bytes
) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: %b\r\nHTTP2-Settings: AAMAAABkAARAAAAA\r\n" % upgrade
    )
    after = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n"
    async with listening(serving, PATIENT) as port:
        stream = await send(port, head)
        for part in (*parts, after):
            await asyncio.sleep(0.02)  # likely to come by itself
            stream[1].write(part)
        answer = await answer_of(stream)
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200 OK") == 2
    assert b'"completion_tokens":2' in answer


async def test_a_body_is_never_read_as_a_request(serving: Serving) -> None:
    hidden = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
        b"Upgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(hidden)
    )
    async with listening(serving, replace(PATIENT, keep_alive_s=1)) as port:
        stream = await send(port, head)
        await asyncio.sleep(0.02)
        stream[1].write(hidden)
        answer = await answer_of(stream)
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1


async def test_a_server_is_no_proxy(serving: Serving) -> None:
    async with listening(serving, PATIENT) as port:
        request = b"CONNECT example.com:80 HTTP/1.1\r\nHost: example.com\r\n\r\n"
        answer = await answer_of(await send(port, request, b"GET /health HTTP/1.1\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1


async def test_too_many_requests_sent_ahead_end_the_connection(
    serving: Serving, engine_thread: EngineThread
) -> None:
    body = b'{"prompt": [%d], "max_tokens": 9}' % fake_engine.MUTE
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with listening(serving, PATIENT) as port:
        reader, writer = await send(port, (head + body) * 30)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        await until(lambda: _nothing_runs(engine_thread))


async def _nothing_runs(engine_thread: EngineThread) -> bool:
    return not engine_thread.engine.requests


async def test_a_reader_that_stalls_loses_connection_and_request(
    serving: Serving, engine_thread: EngineThread
) -> None:
    prompts = b", ".join([b"[5]"] * 60)  # many bytes in little time
    body = b'{"prompt": [%s], "max_tokens": 2000, "stream": true, "logprobs": 5}' % prompts
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with listening(serving, replace(PATIENT, stall_s=0.3)) as port:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with client:
            client.connect(("127.0.0.1", port))
            client.sendall(head + body)
            await until(lambda: _some_are_aborted(engine_thread))
        assert await status(port) == 200


async def _some_are_aborted(engine_thread: EngineThread) -> bool:
    return bool(engine_thread.engines) and len(engine_thread.engine.aborted) > 0


async def test_connections_over_the_limit_are_refused_and_others_served(serving: Serving) -> None:
    async with listening(serving, replace(PATIENT, max_connections=3)) as port:
        open_ones = [await send(port) for _ in range(3)]
        answer = await answer_of(await send(port))
        assert answer.startswith(b"HTTP/1.1 503 ") and b"too many connections" in answer
        assert b"Retry-After: 1" in answer
        assert serving.refused["connections"] == 1
        open_ones[0][1].close()
        await until(lambda: _is_served(port))
        for _, writer in open_ones[1:]:
            writer.close()


async def test_a_client_that_still_sends_gets_its_refusal(serving: Serving) -> None:
    async with listening(serving, replace(PATIENT, max_connections=0)) as port:
        streams = [await send(port) for _ in range(8)]
        await asyncio.sleep(0.05)  # the refusals are likely to be sent
        for _, writer in streams:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        answers = [await answer_of(stream) for stream in streams]
        assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in answers)
        many = [await send(port) for _ in range(200)]  # more than are waited for
        await until(lambda: _are_refused(serving, 208))
        for _, writer in many:
            writer.close()


async def _are_refused(serving: Serving, count: int) -> bool:
    return serving.refused["connections"] == count


async def _is_served(port: int) -> bool:
    try:
        return await status(port) == 200
    except httpx.TransportError:
        return False


def test_open_files_are_taken_as_far_as_allowed() -> None:
    code = (
        "import resource; from morphserve.runtime.server.connections import limits_here;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 256));"
        "print(limits_here().max_connections, *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["128", "256", "256"]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0
