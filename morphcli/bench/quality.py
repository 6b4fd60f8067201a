"""Perplexity of each mix of layers that was served, on held-out text."""

from collections.abc import Collection
from pathlib import Path

from morphserve.configs.errors import ConfigError
from morphserve.profile.mixes import Mix, Model, mix_of
from morphserve.profile.perplexity import measure
from morphserve.quantize.bundle import Bundle, open_bundle
from morphserve.quantize.calibration import Part, Windows, draw_windows
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint

_NUM_WINDOWS = 8
_WINDOW_TOKENS = 512


class Quality:
    """A checkpoint with its bundle and the text to judge them by, all checked on opening."""

    def __init__(self, checkpoint: Checkpoint, bundle: Bundle | None, windows: Windows) -> None:
        self._checkpoint = checkpoint
        self._bundle = bundle
        self._windows = windows

    def perplexities(self, mixes: Collection[Mix]) -> dict[Mix, float]:
        """Of each mix and of full precision; without a bundle, of full precision alone."""
        full = mix_of((), self._checkpoint.architecture.num_layers)
        wanted = {full, *mixes} if self._bundle else {full}
        found = measure(Model(self._checkpoint, self._bundle), self._windows.tokens, wanted)
        return {mix: found[mix].perplexity for mix in wanted}


def open_quality(model: str, bundle: Path | None, text: Path | None) -> Quality:
    """Raises a MorphError if checkpoint, bundle or text cannot be used.

    `text` None takes the held-out text in the model's folder. The windows are of the quarter of
    it that neither `morph quantize` nor `morph profile` has seen.
    """
    checkpoint = open_checkpoint(model)
    opened = open_bundle(str(bundle), checkpoint) if bundle else None
    length = min(_WINDOW_TOKENS, checkpoint.architecture.max_position)
    source = str(text) if text else None
    try:
        windows = draw_windows(checkpoint, source, Part.EVALUATION, _NUM_WINDOWS, length)
    except ConfigError as error:
        raise ConfigError(
            f"perplexity is measured on text of at least {4 * _NUM_WINDOWS * length:,} tokens: "
            "give a longer --prompts FILE"
        ) from error
    return Quality(checkpoint, opened, windows)
