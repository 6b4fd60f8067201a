"""An event loop that stands still leaves a trace."""

import asyncio
import time
from pathlib import Path

from morphserve.runtime.server.watchdog import LoopWatchdog


def hold_up_the_loop(seconds: float) -> None:
    time.sleep(seconds)


async def stalled(times: int, log: Path, limit_s: float = 0.1) -> int:
    """Stalls counted after so many blocking callbacks, each between turns of the loop."""
    with log.open("wb") as file:
        watchdog = LoopWatchdog(limit_s, file.fileno())
        async with watchdog.watching():
            for _ in range(times):
                await asyncio.sleep(limit_s)
                asyncio.get_running_loop().call_soon(hold_up_the_loop, 4 * limit_s)
                await asyncio.sleep(limit_s)
    return watchdog.num_stalls


def test_each_stall_of_the_loop_is_written_down_once_with_its_place(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert asyncio.run(stalled(2, log)) == 2
    assert log.read_text().count("hold_up_the_loop") == 2


def test_a_loop_that_turns_leaves_no_trace(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert asyncio.run(stalled(0, log, limit_s=30.0)) == 0
    assert log.read_text() == ""
