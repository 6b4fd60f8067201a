"""Perplexity and KL divergence of each mix of layers that was served, on held-out text."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.record import MixPerplexity
from morphserve.morphcli.bench.summary import mean_perplexity
from morphserve.profile.mixes import Mix, Model, mix_of
from morphserve.profile.perplexity import Quality as MixQuality
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

    def judge(
        self, policies: Sequence[PolicySummary], served: Sequence[Mapping[Mix, int]]
    ) -> list[MixPerplexity]:
        """Fills perplexity and KL of `policies`, which have `served` so many tokens in each mix.

        Returns those of each mix and of full precision, best first; without a bundle, of full
        precision alone.
        """
        found = self._measured(set().union(*served))
        perplexities = {mix: quality.perplexity for mix, quality in found.items()}
        for policy, tokens in zip(policies, served, strict=True):
            policy.perplexity = mean_perplexity(tokens, perplexities)
            policy.kl = _mean_divergence(tokens, found)
        ordered = sorted(found.items(), key=lambda entry: entry[1].perplexity)
        return [MixPerplexity(list(mix), each.perplexity, each.divergence) for mix, each in ordered]

    def _measured(self, mixes: Collection[Mix]) -> dict[Mix, MixQuality]:
        full = mix_of((), self._checkpoint.architecture.num_layers)
        wanted = {full, *mixes} if self._bundle else {full}
        return measure(Model(self._checkpoint, self._bundle), self._windows.tokens, wanted)


def _mean_divergence(tokens: Mapping[Mix, int], found: Mapping[Mix, MixQuality]) -> float | None:
    total = sum(tokens.values())
    if not total or not tokens.keys() <= found.keys():
        return None
    return sum(n * found[mix].divergence for mix, n in tokens.items()) / total


def open_quality(model: str, bundle: Path | None, text: Path | None) -> Quality:
    """Raises a MorphError if checkpoint, bundle or text cannot be used.

    `text` None, and prompts that are no running text, take the held-out text in the model's
    folder. The windows are of the quarter of it that neither `morph quantize` nor `morph profile`
    has seen.
    """
    checkpoint = open_checkpoint(model)
    opened = open_bundle(str(bundle), checkpoint) if bundle else None
    length = min(_WINDOW_TOKENS, checkpoint.architecture.max_position)
    source = str(text) if text and text.suffix != ".jsonl" else None
    try:
        windows = draw_windows(checkpoint, source, Part.EVALUATION, _NUM_WINDOWS, length)
    except ConfigError as error:
        raise ConfigError(
            f"perplexity is measured on text of at least {4 * _NUM_WINDOWS * length:,} tokens: "
            "give a longer --prompts FILE"
        ) from error
    return Quality(checkpoint, opened, windows)
