"""One field of a row at a time: stamps to microseconds, counts of tokens."""

import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from morphserve.morphcli.traces.formats import TimeUnit

Value = str | int | float  # of a CSV field, or of a JSON key

MICROSECONDS = {TimeUnit.SECONDS: 1_000_000, TimeUnit.MILLISECONDS: 1_000, TimeUnit.MICROSECONDS: 1}
_EPOCH = datetime(1970, 1, 1)
_SINCE_1970_S = 1e9  # a count of seconds this large is a date: 2001 and later
_LONGEST_DATE = 40
_MOST_TOKENS = 2**31 - 1
_MOST_US = 2**60  # 36,000 years


def count_tokens(value: Value, column: str) -> int:
    """The count that a field holds, above 0. Raises ValueError, with the reason, if it is none."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 11:
        number = int(value)
    else:
        number = _whole(value)
    if not 0 < number <= _MOST_TOKENS:
        raise ValueError(f"{column} is not a count of tokens: {quoted(value)}")
    return number


def _whole(value: Value) -> int:
    try:
        number = _float(value)
    except (ValueError, OverflowError):
        return -1
    return int(number) if number.is_integer() else -1


def _float(value: Value) -> float:
    if isinstance(value, str) and "_" in value:  # Python's own way to write a number
        raise ValueError
    return float(value)


def stamp_reader(unit: TimeUnit, column: str) -> Callable[[Value], int]:
    """A function from a stamp to microseconds; it raises ValueError, with the reason."""
    if unit is TimeUnit.DATE:
        return lambda value: _date_us(value, column)
    scale = MICROSECONDS[unit]
    return lambda value: _number_us(value, scale, column)


def _date_us(value: Value, column: str) -> int:
    try:
        at = datetime.fromisoformat(_date_text(value))
        if at.tzinfo is not None:
            at = at.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        raise ValueError(f"{column} is not a time: {quoted(value)}") from None
    since = at - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _date_text(value: Value) -> str:
    text = str(value).strip()
    if len(text) > _LONGEST_DATE:  # fromisoformat looks at no more than the first digits
        raise ValueError
    return text


def _number_us(value: Value, scale: int, column: str) -> int:
    try:
        at = round(_float(value) * scale)
    except (ValueError, OverflowError):  # of no number, nan and infinity
        at = _MOST_US
    if not -_MOST_US < at < _MOST_US:
        raise ValueError(f"{column} is not a time: {quoted(value)}")
    return at


def tell_unit(column: str, values: Iterable[Value]) -> TimeUnit:
    """The unit of a column of stamps: by its name's ending, else by the first stamp that is one.

    Dates are dates. Numbers too large for seconds since 1970 are milliseconds or microseconds, all
    others seconds.
    """
    for unit in (TimeUnit.MILLISECONDS, TimeUnit.MICROSECONDS):
        if column.lower().endswith(f"_{unit}"):
            return unit
    for value in values:
        if (number := _number(value)) is not None:
            return _unit_of_number(abs(number))
        if isinstance(value, str) and _is_date(value):
            return TimeUnit.DATE
    return TimeUnit.SECONDS


def _unit_of_number(number: float) -> TimeUnit:
    if number >= _SINCE_1970_S * 1e5:
        return TimeUnit.MICROSECONDS
    return TimeUnit.MILLISECONDS if number >= _SINCE_1970_S * 1e2 else TimeUnit.SECONDS


def is_since_1970(stamp_us: int, unit: TimeUnit) -> bool:
    """Whether a stamp tells a date, and not just the time since some start."""
    return unit is TimeUnit.DATE or stamp_us >= _SINCE_1970_S * 1e6


def _number(value: Value) -> float | None:
    try:
        number = _float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(_date_text(text))
    except ValueError:
        return False
    return True


def quoted(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value if isinstance(value, (str, float)) else f"{value}")
    return text if len(text) <= 60 else f"{text[:56]}…{text[-1]}"
