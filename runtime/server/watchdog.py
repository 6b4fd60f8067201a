"""Notices when the event loop stands still, and writes down where."""

import asyncio
import faulthandler
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

LIMIT_S = 5.0  # without a turn of the loop; far above what any callback of ours may take
_BEATS = 10  # of the loop within the limit

logger = logging.getLogger(__name__)


class LoopWatchdog:
    """Stacks of all threads go into the log, once each time that the loop stands still."""

    def __init__(self, limit_s: float = LIMIT_S, log_fd: int = 2) -> None:
        """`log_fd`: open file of the log, standard error's."""
        self.num_stalls = 0  # times that the loop stood still
        self._limit_s = limit_s
        self._log_fd = log_fd

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watches the running loop. A process has one such watch at a time."""
        beating = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            faulthandler.cancel_dump_traceback_later()

    async def _beat(self) -> None:
        interval_s = self._limit_s / _BEATS
        while True:
            # Its thread is not one of Python's: code that never lets go of the GIL is seen too.
            faulthandler.dump_traceback_later(self._limit_s + interval_s, file=self._log_fd)
            before = time.monotonic()
            await asyncio.sleep(interval_s)
            stood_s = time.monotonic() - before - interval_s
            if stood_s >= self._limit_s:
                self.num_stalls += 1
                logger.error("the event loop stood still for %.1f s; see the stacks above", stood_s)
