"""Errors a user can act on; they are shown as one sentence, without a traceback."""


class MorphError(Exception):
    """Something the user can mend. The message says what is wrong and what to do."""

    exit_code = 1


class ConfigError(MorphError):
    """A flag, a preset or a config file is wrong."""

    exit_code = 2


class UnsupportedModel(MorphError):
    """The checkpoint is of a kind that cannot be served."""

    exit_code = 4


class OutOfBudget(MorphError):
    """The memory budget cannot hold the model; the message holds the number that would."""

    exit_code = 5

    def __init__(self, message: str, needed_bytes: int | None = None) -> None:
        """`needed_bytes`: least --memory-budget that would do; None: the machine has too little."""
        super().__init__(message)
        self.needed_bytes = needed_bytes
