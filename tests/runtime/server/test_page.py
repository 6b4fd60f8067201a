"""The page at `/`: what it may load, what it reads of the state, and what it shows in a browser."""

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import msgspec
import pytest
import serve_fake_engine

from morphserve.runtime.server import page as module
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.server.state import State, state_of

pytestmark = pytest.mark.anyio
SCRIPT = Path(module.__file__).with_name("page.js").read_text("utf-8")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


async def test_the_page_loads_nothing_from_elsewhere(api: httpx.AsyncClient) -> None:
    page = await api.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text and "://" not in SCRIPT
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; connect-src 'self';")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert (await api.get("/page.js")).text == SCRIPT


async def test_no_text_becomes_markup() -> None:
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in SCRIPT


async def test_the_script_reads_fields_that_the_state_has(serving: Serving) -> None:
    while not serving.engine.events:
        await asyncio.sleep(0.001)
    state = msgspec.to_builtins(state_of(serving))
    read = set(re.findall(r"\bstate\.(\w+)", SCRIPT))
    assert len(read) > 20
    assert read - state.keys() == set()
    assert set(re.findall(r"\blatency\.(\w+)", SCRIPT)) <= state["latency"].keys()
    assert set(re.findall(r"\bslo\.(\w+)", SCRIPT)) <= state["slo"].keys()
    assert set(re.findall(r"\bplan\.(\w+)", SCRIPT)) <= state["memory"].keys()
    assert set(re.findall(r"\bevent\.(?!preventDefault)(\w+)", SCRIPT)) <= state["events"][0].keys()


async def test_the_script_reads_fields_that_requests_have(api: httpx.AsyncClient) -> None:
    await api.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
    state = (await api.get("/morph/v1/state")).json()
    assert set(re.findall(r"\brequest\.(\w+)", SCRIPT)) <= state["requests"][0].keys()
    msgspec.convert(state, State, strict=False)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
async def test_a_browser_shows_the_state(tmp_path: Path) -> None:
    assert BROWSER is not None
    command = [sys.executable, serve_fake_engine.__file__]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = [server.stderr.readline() for _ in range(4)]
        url = re.search(r"http://\S+", lines[2])
        assert url, lines
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        shown = subprocess.run(
            [BROWSER, *options, "--virtual-time-budget=3000", "--dump-dom", url[0]],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        server.terminate()
    assert "<title>demo: rung 2 of 4</title>" in shown
    assert re.search(r'<div id="map">.*4.*F.*</div>', shown) and "▼" in shown
    assert "layer 1 to INT4: demand 50 of 40 blocks" in shown
    assert '<main id="view">' in shown
