"""The scheduler that serves, with a way to do many steps at once in which nothing happens."""

from morphserve.runtime.scheduler import Scheduler


class SkippingScheduler(Scheduler):
    """Decisions are the scheduler's own: what is skipped are steps without any."""

    @property
    def context_tokens(self) -> int:
        """Of all running requests, the token to be computed included."""
        return sum(request.num_tokens for request in self.running)

    def quiet_steps(self) -> int:
        """Steps to come in each of which all running requests gain one token, and no more.

        None of them ends one, admits one, or finds memory full.
        """
        if self.waiting and self._is_seat_free() and self._room_for(self.waiting[0]) is not None:
            return 0
        left = self._max_model_len
        for request in self.running:
            num_tokens = request.num_tokens
            if num_tokens - request.num_computed != 1 or not request.runs_at(self._rung):
                return 0
            left = min(left, request.max_tokens - num_tokens, self._max_model_len - num_tokens)
        steps = left - 1
        while steps > 1 and self._growth(steps) > self._pool.num_free:
            steps //= 2
        return steps if self._growth(steps) <= self._pool.num_free else 0

    def skip(self, steps: int) -> None:
        """Does so many quiet steps; every new token is 0."""
        tokens = [0] * steps
        for request in self.running:
            missing = self._blocks_for(request.num_tokens + steps - 1) - len(request.blocks)
            if missing > 0:
                request.blocks += self._pool.allocate(missing)
            request.output += tokens
            request.num_computed += steps
            request.kv_rung = max(request.kv_rung, self._rung)

    def _growth(self, steps: int) -> int:
        """Blocks that running requests take in so many steps beyond those they hold."""
        ahead = steps - 1 + self._block_tokens - 1
        return sum(
            max(0, (request.num_tokens + ahead) // self._block_tokens - len(request.blocks))
            for request in self.running
        )
