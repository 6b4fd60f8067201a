"""Callers without the right to call: counted, and told in the log now and then."""

import logging
import time
from collections import Counter

from starlette.types import Scope

from morphserve.runtime.latency import Clock
from morphserve.runtime.server.errors import ApiError

LOG_INTERVAL_S = 60.0  # between two lines, however many are turned away

logger = logging.getLogger(__name__)


class TurnedAway:
    """Counts refusals of keys and origins by their codes, which are few."""

    def __init__(self, refused: Counter[str], clock: Clock = time.monotonic) -> None:
        """`refused` is counted up."""
        self._refused = refused
        self._clock = clock
        self._num_untold = 0
        self._quiet_until_s = float("-inf")

    def add(self, refusal: ApiError, scope: Scope) -> None:
        assert refusal.detail.code is not None
        self._refused[refusal.detail.code] += 1
        self._num_untold += 1
        if self._clock() < self._quiet_until_s:
            return
        address = scope["client"][0] if scope.get("client") else "an unknown address"
        what = "request was" if self._num_untold == 1 else "requests were"
        logger.warning(
            "%d %s refused, the latest from %s (%d: %s)",
            *(self._num_untold, what, address, refusal.status, refusal.detail.message),
        )
        self._num_untold, self._quiet_until_s = 0, self._clock() + LOG_INTERVAL_S
