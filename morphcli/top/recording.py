"""A session that `morph top URL > FILE` wrote, played again in its own time."""

from bisect import bisect_right
from pathlib import Path

import msgspec

from morphserve.configs.errors import ConfigError


class _Moment(msgspec.Struct):
    time: float


def _time(line: bytes) -> float:
    return msgspec.json.decode(line, type=_Moment).time


def _is_whole(line: bytes) -> bool:
    """The last line is not where the recording was killed, or is still being written."""
    try:
        _time(line)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


class Recording:
    """Lines of a file, each a state; one of them is shown now."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for what is no recording."""
        try:
            lines = [line for line in path.read_bytes().splitlines() if line.strip()]
            self._lines = lines[:-1] if len(lines) > 1 and not _is_whole(lines[-1]) else lines
            self._times = [_time(line) for line in self._lines]
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(
                f"{path} is no recording: `morph top URL > FILE` makes one ({error})"
            ) from error
        if not self._lines:
            raise ConfigError(f"{path} is empty: `morph top URL > FILE` makes a recording")
        self.played_s = 0.0  # from the first line

    @property
    def length_s(self) -> float:
        return self._times[-1] - self._times[0]

    @property
    def at_end(self) -> bool:
        return self.played_s >= self.length_s

    def seek(self, by_s: float) -> None:
        self.played_s = min(max(0.0, self.played_s + by_s), self.length_s)

    def until_now(self, seconds: float) -> list[bytes]:
        """The lines of the last so many seconds, the one to show last."""
        now = self._times[0] + self.played_s
        end = max(1, bisect_right(self._times, now))
        start = min(end - 1, bisect_right(self._times, now - seconds))
        return self._lines[start:end]

    def lines(self) -> list[bytes]:
        return self._lines
