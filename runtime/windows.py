"""Sums over the latest seconds, without the history behind them."""

_NUM_BUCKETS = 20


class Rolling:
    """A sum over about the latest `span_s` seconds. Updates cost O(1), however much is added.

    Time is cut into 20 buckets per span; the oldest one leaves as a whole, so that between 19/20
    of the span and all of it is counted.
    """

    def __init__(self, span_s: float) -> None:
        self._bucket_s = span_s / _NUM_BUCKETS
        self._sums = [0] * _NUM_BUCKETS
        self._total = 0
        self._started_s: float | None = None
        self._latest = 0  # number of the bucket that is filled now

    def add(self, now_s: float, amount: int) -> None:
        self._advance(now_s)
        self._sums[self._latest % _NUM_BUCKETS] += amount
        self._total += amount

    def total(self, now_s: float) -> int:
        self._advance(now_s)
        return self._total

    def per_second(self, now_s: float) -> float:
        """Over what the window covers: less than the span just after the first addition."""
        total = self.total(now_s)
        if self._started_s is None:
            return 0.0
        covered = (now_s - self._started_s) / self._bucket_s - max(
            0, self._latest - _NUM_BUCKETS + 1
        )
        return total / (max(1.0, covered) * self._bucket_s)

    def _advance(self, now_s: float) -> None:
        if self._started_s is None:
            self._started_s = now_s
        bucket = int((now_s - self._started_s) / self._bucket_s)
        for number in range(max(self._latest + 1, bucket - _NUM_BUCKETS + 1), bucket + 1):
            self._total -= self._sums[number % _NUM_BUCKETS]
            self._sums[number % _NUM_BUCKETS] = 0
        self._latest = max(self._latest, bucket)
