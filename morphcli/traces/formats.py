"""The formats of traces, known by the names in their header."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import TraceError

_ROLES = ("time", "prompt", "output")
MAP_FORM = "--map time=COL,prompt=COL,output=COL"


class TimeUnit(StrEnum):
    """What a stamp is written in; numbers count from anywhere, dates are ISO 8601."""

    SECONDS = "s"
    MILLISECONDS = "ms"
    MICROSECONDS = "us"
    DATE = "date"


@dataclass(frozen=True, slots=True)
class Columns:
    """The names under which a file has what a replay needs."""

    time: str
    prompt: str
    output: str

    def __str__(self) -> str:
        return ", ".join((self.time, self.prompt, self.output))


@dataclass(frozen=True, slots=True)
class Format:
    name: str
    columns: Columns
    unit: TimeUnit | None  # None: told by the stamps
    marker: str | None = None  # a further column, which tells it from a format that is alike
    has_failures: bool = False  # no output token means that the request failed
    spread_s: float = 0.0  # whole-second stamps are spread over so much


FORMATS = (
    Format(
        "Azure LLM inference",
        Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        TimeUnit.DATE,
    ),
    Format(
        "BurstGPT",
        Columns("Timestamp", "Request tokens", "Response tokens"),
        TimeUnit.SECONDS,
        has_failures=True,
        spread_s=1.0,
    ),
    Format(
        "Vidur", Columns("arrived_at", "num_prefill_tokens", "num_decode_tokens"), TimeUnit.SECONDS
    ),
    Format(
        "Bailian",
        Columns("timestamp", "input_length", "output_length"),
        TimeUnit.SECONDS,
        marker="chat_id",
    ),
    Format(
        "Mooncake", Columns("timestamp", "input_length", "output_length"), TimeUnit.MILLISECONDS
    ),
)


def find_format(path: str, header: Collection[str]) -> Format:
    """The format that a file's names tell. Raises TraceError, naming them, if none does."""
    for known in FORMATS:
        columns = known.columns
        wanted = {columns.time, columns.prompt, columns.output} | {known.marker or columns.time}
        if wanted <= set(header):
            return known
    formats = "; ".join(f"{known.name}: {known.columns}" for known in FORMATS if not known.marker)
    raise TraceError(
        f"{path} is of no known format: its header holds {_listed(header)}. Known are {formats}. "
        f"For any other, name its columns with {MAP_FORM}"
    )


def mapped_format(path: str, columns: Columns, header: Collection[str]) -> Format:
    """The format of a file whose columns the user named. Raises TraceError if it lacks one."""
    require(path, (columns.time, columns.prompt, columns.output), header)
    return Format("plain", columns, None)


def require(path: str, names: Iterable[str], header: Collection[str]) -> None:
    """Raises TraceError if the header lacks one of the names."""
    if missing := [name for name in names if name not in header]:
        raise TraceError(f"{path} has no {', '.join(missing)}: its header holds {_listed(header)}")


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(map(_shown, list(names)[:20]))
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def _shown(name: str) -> str:
    """A name for a message: cut where it is long, quoted where a terminal would act on it."""
    short = name if len(name) <= 40 else f"{name[:40]}…"
    return short if short.isprintable() else repr(short)


def parse_map(text: str) -> Columns:
    """The columns that `time=COL,prompt=COL,output=COL` names."""
    pairs = [part.partition("=") for part in text.split(",")]
    found = {role.strip(): column.strip() for role, _, column in pairs}
    columns = set(found.values())
    if len(pairs) != 3 or set(found) != set(_ROLES) or len(columns) != 3 or "" in columns:
        raise ConfigError(f"--map {text!r}: write {MAP_FORM}, three different columns")
    return Columns(**found)


def parse_where(texts: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Columns and the values that rows must have there, of `COL=VALUE` each."""
    pairs = []
    for text in texts:
        column, equals, value = (part.strip() for part in text.partition("="))
        if not column or not equals:
            raise ConfigError(f"--where {text!r}: write --where COL=VALUE, as --where Model=GPT-4")
        pairs.append((column, value))
    return tuple(pairs)
