"""Perplexity of each number of INT4 layers, on held-out text."""

from collections.abc import Collection
from pathlib import Path

from morphserve.configs.errors import ConfigError
from morphserve.profile.mixes import Model, mix_of
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

    @property
    def num_layers(self) -> int:
        return self._checkpoint.architecture.num_layers

    def perplexities(self, levels: Collection[int]) -> dict[int, float]:
        """By number of INT4 layers, the first of the bundle's order; without a bundle only 0."""
        order = self._bundle.order if self._bundle else []
        mixes = {k: mix_of(order[:k], self.num_layers) for k in sorted(levels) if k <= len(order)}
        model = Model(self._checkpoint, self._bundle)
        found = measure(model, self._windows.tokens, set(mixes.values()))
        return {level: found[mix].perplexity for level, mix in mixes.items()}


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
