"""The log of a running server: a line per interval, events as they happen, text or JSON."""

import asyncio
import io
import json
import logging
import subprocess
import sys
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import make_snapshot

from morphserve.morphcli.monitor import log_line, watch_log
from morphserve.quantize.manifest import Variant
from morphserve.runtime.latency import Rates
from morphserve.runtime.messages import Event
from morphserve.runtime.server.logs import JsonLines, TextLines, logger, say


def logged(formatter: logging.Formatter) -> tuple[logging.StreamHandler[io.StringIO], io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    return handler, stream


@pytest.fixture(params=[TextLines, JsonLines])
def log(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    handler, stream = logged(request.param())
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    return stream


def serving(**changes: Any) -> Any:
    engine = SimpleNamespace(snapshot=make_snapshot(**changes), events=deque(maxlen=10))
    return SimpleNamespace(engine=engine)


def test_the_log_line_reads_like_vllms_and_adds_precision() -> None:
    before = make_snapshot(time=10.0, prompt_tokens=100, generated_tokens={})
    now = make_snapshot(
        time=12.0,
        prompt_tokens=300,
        generated_tokens={Variant.FULL: 50},
        running=4,
        step_s=0.0079,
        predicted_step_s=0.0076,
    )
    assert log_line(now, Rates.between(before, now)) == (
        "Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 25.0 tokens/s, "
        "Running: 4 reqs, Waiting: 3 reqs, Preemptions: 0, KV cache usage: 50.0% of 60 blocks, "
        "INT4 layers: 1/4, Step: 7.9 ms, predicted 7.6 ms"
    )


@pytest.mark.parametrize("log", [TextLines], indirect=True)
def test_what_happened_last_is_told_before_the_log_ends(log: io.StringIO) -> None:
    server = serving()

    async def watch() -> None:
        watching = asyncio.create_task(watch_log(server, 1000.0))
        await asyncio.sleep(0.02)
        server.engine.events.append(Event(1, 0.0, "engine", "the engine process was killed"))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(watch())
    assert log.getvalue().endswith(" warning: engine: the engine process was killed\n")


@pytest.mark.parametrize("log", [TextLines], indirect=True)
def test_an_idle_server_says_so_once_and_tells_what_happens(log: io.StringIO) -> None:
    server = serving(running=0, waiting=0)

    async def watch() -> None:
        watching = asyncio.create_task(watch_log(server, 0.02))
        server.engine.events.append(Event(1, 0.0, "decision", "demand 50 of 40 blocks"))
        while "demand" not in log.getvalue() or "Avg" not in log.getvalue():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(watch())
    lines = log.getvalue().splitlines()
    assert sum("Avg" in line for line in lines) == 1
    assert [line.partition(" ")[2] for line in lines if "demand" in line] == [
        "decision: demand 50 of 40 blocks"
    ]


@pytest.mark.parametrize("log", [JsonLines], indirect=True)
def test_json_lines_carry_the_numbers(log: io.StringIO) -> None:
    say("event", "decision: so it is", {"event": {"numbers": {"demand": 50.0}}})
    logging.getLogger("morphserve.runtime.engine").error("a step failed")
    event, error = (json.loads(line) for line in log.getvalue().splitlines())
    assert (event["kind"], event["level"], event["message"]) == (
        "event",
        "info",
        "decision: so it is",
    )
    assert event["event"]["numbers"] == {"demand": 50.0} and event["time"] > 1.7e9
    assert (error["kind"], error["level"], error["message"]) == ("log", "error", "a step failed")


def test_a_log_line_holds_no_control_characters(log: io.StringIO) -> None:
    say("start", "serving evil\x1b[2J\r\n00:00:00 forged")
    assert log.getvalue().count("\n") == 1
    assert "\x1b" not in log.getvalue() and "\r" not in log.getvalue()


def test_a_failure_is_logged_with_its_traceback(log: io.StringIO) -> None:
    try:
        raise ValueError("told to fail")
    except ValueError:
        logging.getLogger("morphserve.x").exception("a step failed")
    assert "a step failed" in log.getvalue() and "ValueError: told to fail" in log.getvalue()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_errors_of_libraries_are_logged_like_our_own(log_format: str) -> None:
    code = (
        "import logging, sys; from morphserve.runtime.server.logs import start_logging, say\n"
        "logging.basicConfig(); start_logging(sys.argv[1])\n"
        "logging.getLogger('asyncio').info('nothing of note')\n"
        "try: raise RuntimeError('secret\\x1b[31m')\n"
        "except RuntimeError: logging.getLogger('uvicorn.error').exception('it broke')\n"
        "say('event', 'ours')\n"
    )
    command = [sys.executable, "-c", code, log_format]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "\x1b" not in log and "it broke" in log and "RuntimeError: secret" in log
    assert log.count("ours") == 1 and "nothing of note" not in log
    if log_format == "json":
        assert [json.loads(line)["kind"] for line in log.splitlines()] == ["log", "event"]
