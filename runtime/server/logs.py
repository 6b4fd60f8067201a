"""What the server writes to stderr: lines of text for people, or one JSON object per line."""

import logging
import sys
import time
from collections.abc import Mapping

import msgspec

logger = logging.getLogger("morphserve")

_OWN_FIELDS = "morph_fields"  # of a log record
_OWN_KIND = "morph_kind"


def start_logging(log_format: str) -> None:
    """From now on everything goes to stderr as `text` or `json`: ours, and others' warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)


def say(
    kind: str,
    message: str,
    fields: Mapping[str, object] | None = None,
    level: int = logging.INFO,
) -> None:
    """Logs what happens; `fields` are the numbers behind it, for `json` only.

    `kind` is start (no time is shown before it), interval or event.
    """
    logger.log(level, "%s", message, extra={_OWN_KIND: kind, _OWN_FIELDS: fields or {}})


def printable(text: str) -> str:
    """`text` without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextLines(logging.Formatter):
    """`HH:MM:SS message`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        line = printable(record.getMessage())
        if record.levelno >= logging.WARNING:
            line = f"{record.levelname.lower()}: {line}"
        if getattr(record, _OWN_KIND, "log") != "start":
            line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {line}"
        if not record.exc_info:
            return line
        traceback = self.formatException(record.exc_info).split("\n")
        return "\n".join([line, *map(printable, traceback)])


class JsonLines(logging.Formatter):
    """One object per line: time, level, kind, message, and the numbers behind it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": record.created,  # seconds since the epoch
            "level": record.levelname.lower(),
            "kind": getattr(record, _OWN_KIND, "log"),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line | getattr(record, _OWN_FIELDS, {})).decode()
