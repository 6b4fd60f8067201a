import asyncio
import subprocess
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import fake_engine
import pytest
from engine_thread import EngineThread
from hypothesis import given
from hypothesis import strategies as st

from morphserve.configs.errors import MorphError
from morphserve.configs.schema import CacheConfig, EngineConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime import engine_process
from morphserve.runtime.deliveries import Chunk
from morphserve.runtime.engine_client import EngineClient, EngineDead, RequestRefused
from morphserve.runtime.frames import FrameSplitter, FrameTooLarge, encode_frame
from morphserve.runtime.messages import Submit
from morphserve.runtime.request import FinishReason, SamplingParams
from morphserve.runtime.supervisor import launch_engine

pytestmark = pytest.mark.anyio
COMMAND = (sys.executable, str(Path(fake_engine.__file__)))


async def collect(client: EngineClient, prompt: list[int], max_tokens: int) -> list[Chunk]:
    lists = client.generate("a", prompt, SamplingParams(max_tokens))
    return [chunk async for chunks in lists for chunk in chunks]


@given(st.lists(st.binary(max_size=300)), st.integers(1, 50))
def test_frames_survive_any_cutting(bodies: list[bytes], size: int) -> None:
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    splitter = FrameSplitter()
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert [body for piece in pieces for body in splitter.feed(piece)] == bodies


def test_a_frame_that_is_too_large_is_no_frame_of_ours() -> None:
    with pytest.raises(FrameTooLarge, match="4294967295 bytes"):
        FrameSplitter().feed(b"\xff\xff\xff\xff")


async def test_an_engine_waits_for_an_http_process_that_stalls(
    engine_thread: EngineThread, engine_config: EngineConfig
) -> None:
    sock = engine_thread.sock
    sock.setblocking(True)
    params = SamplingParams(10**6)
    prompt = [5] * 100
    sock.sendall(encode_frame(engine_config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "MAX_UNSENT_BYTES", 10_000)
        patch.setattr(fake_engine.time, "sleep", lambda _: None)
        for i in range(50):
            sock.sendall(encode_frame(Submit(f"request-{i}", prompt, params)))
        steps = -1
        while not engine_thread.engines or engine_thread.engine.steps != steps:
            steps = engine_thread.engine.steps if engine_thread.engines else -1
            assert steps < 100_000, "it goes on and on"
            await asyncio.sleep(0.5)
        splitter, bodies = FrameSplitter(), 0
        while bodies <= steps:  # all that was made arrives, and then more is made
            bodies += len(splitter.feed(sock.recv(1 << 16)))
        while engine_thread.engine.steps == steps:
            sock.recv(1 << 16)


def test_a_frame_is_its_length_and_msgpack() -> None:
    assert encode_frame({"a": 1}) == b"\x04\x00\x00\x00\x81\xa1a\x01"


async def test_chunks_carry_tokens_precision_and_the_reason_of_the_end(
    client: EngineClient,
) -> None:
    chunks = await collect(client, [5, 6], 3)
    assert [chunk.tokens for chunk in chunks] == [[5], [6], [5]]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, FinishReason.LENGTH]
    assert {chunk.precision for chunk in chunks} == {Variant.FULL}
    assert (await collect(client, [fake_engine.INT4], 1))[0].precision is Variant.INT4


async def test_leaving_early_aborts_in_the_engine(
    client: EngineClient, engine_thread: EngineThread
) -> None:
    async with aclosing(client.generate("a", [5], SamplingParams(1000))) as chunks:
        await anext(chunks)
    assert client.num_requests == 0
    while engine_thread.engine.aborted != ["a"]:
        await asyncio.sleep(0.001)


async def test_cancelling_the_reader_aborts_in_the_engine(
    client: EngineClient, engine_thread: EngineThread
) -> None:
    reading = asyncio.create_task(collect(client, [5], 1000))
    while not engine_thread.engine.requests:
        await asyncio.sleep(0.001)
    reading.cancel()
    while engine_thread.engine.aborted != ["a"]:
        await asyncio.sleep(0.001)


async def test_a_finished_request_is_not_aborted(
    client: EngineClient, engine_thread: EngineThread
) -> None:
    await collect(client, [5], 3)
    await collect(client, [5], 3)  # the engine has read everything sent before
    assert engine_thread.engine.aborted == []


async def test_a_refusal_is_raised_with_the_engines_numbers(client: EngineClient) -> None:
    with pytest.raises(RequestRefused, match="99 blocks"):
        await collect(client, [fake_engine.REFUSE], 3)
    assert client.num_requests == 0


async def test_a_failing_step_ends_requests_with_an_error_and_the_engine_with_1(
    client: EngineClient, engine_thread: EngineThread, caplog: pytest.LogCaptureFixture
) -> None:
    other = client.generate("a", [5], SamplingParams(100_000))
    await anext(other)
    with pytest.raises(EngineDead, match="told to crash"):  # it has no token yet
        await anext(client.generate("b", [fake_engine.CRASH], SamplingParams(3)))
    assert [chunks async for chunks in other][-1][-1].finish_reason is FinishReason.ERROR
    assert client.died.is_set() and "told to crash" in client.failure
    while not engine_thread.exit_codes:
        await asyncio.sleep(0.001)
    assert engine_thread.exit_codes == [1]
    assert "Traceback" in caplog.text
    with pytest.raises(EngineDead, match="told to crash"):
        await collect(client, [5], 3)


async def test_abort_all_ends_requests_with_abort(client: EngineClient) -> None:
    reading = asyncio.create_task(collect(client, [5], 100_000))
    while client.num_requests == 0:
        await asyncio.sleep(0)
    client.abort_all()
    assert (await reading)[-1].finish_reason is FinishReason.ABORT


async def test_snapshots_keep_coming(client: EngineClient) -> None:
    first = client.snapshot
    while client.snapshot.time == first.time:
        await asyncio.sleep(0.01)
    assert client.hello.num_layers == fake_engine.NUM_LAYERS
    assert set(client.hello.startup_s) == {"import", "checkpoint"}


async def test_closing_ends_the_engine_with_0(
    engine_thread: EngineThread, engine_config: EngineConfig
) -> None:
    client = EngineClient(engine_thread.sock)
    await client.start(engine_config)
    await client.close()
    while not engine_thread.exit_codes:
        await asyncio.sleep(0.001)
    assert engine_thread.exit_codes == [0]


async def test_a_start_that_cannot_work_is_one_sentence_with_its_exit_code(
    engine_config: EngineConfig,
) -> None:
    process = launch_engine(COMMAND)
    client = EngineClient(process.sock)
    with pytest.raises(MorphError, match="at least 42 MiB are needed") as caught:
        await client.start(replace(engine_config, cache=CacheConfig(memory_budget=1)))
    assert caught.value.exit_code == 5
    await client.close()
    assert await process.wait(10) == 5


async def test_a_killed_engine_process_ends_requests_with_an_error(
    engine_config: EngineConfig,
) -> None:
    process = launch_engine(COMMAND)
    client = EngineClient(process.sock)
    await client.start(engine_config)
    chunks = client.generate("a", [5], SamplingParams(100_000))
    await anext(chunks)
    process.process.kill()
    assert [more async for more in chunks][-1][-1].finish_reason is FinishReason.ERROR
    await client.close()
    assert await process.wait(10) == -9


async def test_an_engine_killed_while_it_loads_is_told_with_its_signal(
    engine_config: EngineConfig,
) -> None:
    process = launch_engine((sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    client = EngineClient(process.sock, process.wait)
    with pytest.raises(EngineDead, match=r"was killed by signal 9 \(out of memory\?\)"):
        await client.start(engine_config)
    await client.close()


async def test_the_engine_process_leaves_when_its_parent_does(engine_config: EngineConfig) -> None:
    process = launch_engine(COMMAND)
    client = EngineClient(process.sock)
    await client.start(engine_config)
    process.sock.shutdown(2)
    assert await process.wait(10) == 0
    await client.close()


def test_the_http_process_imports_no_torch() -> None:
    code = (
        "import sys, morphserve.runtime.server.lifetime, morphserve.morphcli.commands.serve, "
        "morphserve.morphcli.monitor; print('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout == "False\n", output.stderr


def test_the_http_side_is_not_imported_before_the_engine_process_runs() -> None:
    code = (
        "import sys, morphserve.runtime.server.run, morphserve.morphcli.commands.serve, "
        "morphserve.morphcli.view; print({'starlette', 'uvicorn', 'jinja2'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout == "set()\n", output.stderr


async def test_an_engine_that_cannot_be_imported_says_so(engine_config: EngineConfig) -> None:
    code = (
        "import sys; from morphserve.runtime.engine_process import main; "
        "sys.modules['morphserve.runtime.build'] = None; sys.exit(main())"
    )
    process = launch_engine((sys.executable, "-c", code))
    client = EngineClient(process.sock)
    with pytest.raises(MorphError, match="ModuleNotFoundError: .*runtime.build") as caught:
        await client.start(engine_config)
    assert caught.value.exit_code == 1
    assert await process.wait(10) == 1
    await client.close()
