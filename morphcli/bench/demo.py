"""The demonstration: the shipped model, a shipped burst, and a budget that makes it bind."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from morphserve.configs.errors import MorphError
from morphserve.configs.load import DEMO_MODEL, load_policy
from morphserve.configs.schema import EngineConfig
from morphserve.morphcli.bench.run import BenchRequest
from morphserve.morphcli.bench.schedule import Shape
from morphserve.morphcli.bench.summary import Slo
from morphserve.profile.mixes import Model
from morphserve.profile.orders import RankSettings
from morphserve.profile.ranking import draw_texts, rank
from morphserve.quantize.build import QuantizeSettings, build_bundle, default_group_size
from morphserve.quantize.bundle import Bundle, open_bundle
from morphserve.quantize.calibration import Part, draw_windows
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.runtime.build import budget_for_tokens

TRACE = "azure2023_burst.csv"
WINDOW_S = 6.0, 54.0


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Every number of the demonstration, chosen for two CPU cores and a few minutes."""

    shape: Shape = field(
        default_factory=lambda: Shape(
            window_s=WINDOW_S,
            rate_scale=0.22,
            length_scale=0.1,
            output_scale=10.0,
            max_prompt=384,
            max_output=256,
        )
    )
    policies: tuple[str, ...] = ("full", "static:all", "morph")
    kv_tokens: int = 1400  # that the memory budget leaves room for at full precision
    max_model_len: int = 640
    slo: Slo = field(default_factory=lambda: Slo(ttft_s=1.0, tpot_s=0.1))
    timeout_s: float = 30.0
    quantize_windows: int = 16
    profile_windows: int = 2
    window_tokens: int = 256


def demo_budget(settings: DemoSettings, bundle: Path) -> str:
    """The memory budget of every server, as `morph serve` takes it."""
    config = EngineConfig(DEMO_MODEL, load_policy("balanced"), bundle=str(bundle))
    return f"{math.ceil(budget_for_tokens(config, settings.kv_tokens) / 2**20)}MiB"


def demo_request(settings: DemoSettings, folder: Path, bundle: Path, budget: str) -> BenchRequest:
    """The comparison that the demonstration runs."""
    return BenchRequest(
        model=DEMO_MODEL,
        trace=Path(__file__).with_name(TRACE),
        shape=settings.shape,
        policies=settings.policies,
        slo=settings.slo,
        output=folder,
        bundle=bundle,
        memory_budget=budget,
        max_model_len=settings.max_model_len,
        timeout_s=settings.timeout_s,
        force=True,
    )


def prepare_bundle(
    folder: Path, settings: DemoSettings, on_step: Callable[[str, int, int], None]
) -> Path:
    """A ranked bundle of the shipped model in `folder`; one that is there and sound is kept.

    `on_step` is told the phase, the steps done and the steps in all.
    """
    checkpoint = open_checkpoint(DEMO_MODEL)
    bundle = _existing(folder, checkpoint)
    if bundle is None:
        total = checkpoint.architecture.num_layers
        size = default_group_size(checkpoint.architecture)
        shape = settings.quantize_windows, settings.window_tokens
        build_bundle(
            checkpoint,
            folder,
            QuantizeSettings("gptq", size),
            draw_windows(checkpoint, None, Part.CALIBRATION, *shape),
            force=True,
            on_layer=lambda i: on_step("quantising layers", i + 1, total),
        )
        bundle = open_bundle(str(folder), checkpoint)
    if bundle.manifest.ranking is None:
        shape = settings.profile_windows, settings.window_tokens
        texts = draw_texts(checkpoint, None, *shape)
        model = Model(checkpoint, bundle)
        bundle.with_ranking(rank(model, texts, RankSettings(num_random=1), on_step))
    return folder


def _existing(folder: Path, checkpoint: Checkpoint) -> Bundle | None:
    try:
        return open_bundle(str(folder), checkpoint)
    except MorphError:
        return None  # missing, unfinished or of another version: it is built anew
