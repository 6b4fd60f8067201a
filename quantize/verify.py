"""Whether every layer of a bundle is whole and computes what full precision does."""

from collections.abc import Iterator
from dataclasses import dataclass

from morphserve.quantize.agreement import FLOOR, Agreement, Probe
from morphserve.quantize.bundle import Bundle
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.files import BadFile
from morphserve.quantize.manifest import Variant


@dataclass(frozen=True, slots=True)
class LayerCheck:
    layer: int
    variant: Variant
    agreement: Agreement | None  # None if there was nothing to compare or the file is damaged
    fault: str | None  # a sentence


def verify_layers(
    bundle: Bundle, checkpoint: Checkpoint | None = None, floor: float = FLOOR
) -> Iterator[LayerCheck]:
    """One check of every variant of every layer, layer by layer.

    Files must be byte for byte what was written and hold a layer's tensors. With the checkpoint,
    each layer must also agree with full precision: see `Agreement.fault`.
    """
    probe = None if checkpoint is None else Probe(checkpoint)
    for i in range(bundle.num_layers):
        for variant in bundle.manifest.variants:
            yield _check(bundle, i, variant, probe, floor)
        if probe is not None:
            probe.advance()


def _check(
    bundle: Bundle, i: int, variant: Variant, probe: Probe | None, floor: float
) -> LayerCheck:
    try:
        layer = bundle.checked_layer(i, variant)
    except BadFile as error:
        return LayerCheck(i, variant, None, str(error))
    if probe is None:
        return LayerCheck(i, variant, None, None)
    agreement = probe.compare(layer)
    fault = agreement.fault(floor)
    return LayerCheck(i, variant, agreement, fault and f"{variant} layer {i}: {fault}")
