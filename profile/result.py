"""All that a run of `morph profile` measures."""

from collections.abc import Collection
from datetime import datetime
from enum import Enum

import msgspec

from morphserve.profile.independence import Independence, study_independence
from morphserve.profile.mixes import Model
from morphserve.profile.orders import RankSettings
from morphserve.profile.positions import Positions, study_positions
from morphserve.profile.ranking import OnProgress, Texts, rank
from morphserve.profile.verdict import chosen_order
from morphserve.quantize.bundle import Bundle
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.manifest import Quantization, Ranking, Variant


class Study(Enum):
    """What is measured beside the ranking if asked for."""

    INDEPENDENCE = "independence"
    POSITIONS = "positions"


class Profile(msgspec.Struct, frozen=True):
    """The content of profile.json."""

    model: str
    created: str  # date and time
    quantization: dict[Variant, Quantization]
    ranking: Ranking
    independence: Independence | None = None
    positions: Positions | None = None


def make_profile(
    checkpoint: Checkpoint,
    bundle: Bundle,
    texts: Texts,
    settings: RankSettings,
    studies: Collection[Study] = (),
    on_progress: OnProgress = lambda phase, done, total: None,
) -> Profile:
    """The ranking, and the studies that are asked for on the text that reports."""
    model = Model(checkpoint, bundle)
    positions = independence = None
    if Study.POSITIONS in studies:  # before the rest, since it may refuse the windows
        positions = study_positions(model, texts.evaluation, on_progress)
    ranking = rank(model, texts, settings, on_progress)
    if Study.INDEPENDENCE in studies:
        order = chosen_order(ranking).layers
        independence = study_independence(model, order, texts.evaluation, on_progress)
    variants = bundle.manifest.variants
    return Profile(
        model=checkpoint.path.name,
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        quantization={variant: files.quantization for variant, files in variants.items()},
        ranking=ranking,
        independence=independence,
        positions=positions,
    )
