"""The demonstration: the shipped model, a shipped burst, and a budget that makes it bind."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from morphserve.configs.errors import MorphError
from morphserve.configs.load import DEMO_MODEL, load_policy, parse_bytes
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig, Slo
from morphserve.morphcli.bench.request import BenchRequest
from morphserve.morphcli.simulate.fleet import Fleet, simulate
from morphserve.morphcli.simulate.here import this_machine
from morphserve.morphcli.traces.readers import read_trace
from morphserve.morphcli.traces.schedule import Schedule, Shape, shape_trace
from morphserve.profile.mixes import Model
from morphserve.profile.orders import RankSettings
from morphserve.profile.ranking import draw_texts, rank
from morphserve.quantize.build import QuantizeSettings, build_bundle, default_group_size
from morphserve.quantize.bundle import Bundle, open_bundle
from morphserve.quantize.calibration import Part, draw_windows
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.costs import DeviceCosts
from morphserve.runtime.build import budget_for_tokens, costs_of
from morphserve.runtime.device import open_device
from morphserve.runtime.kernels import load_kernels
from morphserve.runtime.loader import choose_dtype
from morphserve.runtime.measure import measure_costs

WINDOW_S = 6.0, 54.0
_TRACE = Path(__file__).with_name("azure2023_burst.csv")
_RATE_SCALES = 0.02, 50.0  # between which the rate of the trace is scaled
_RATE_STEP = 1.02  # how finely
_KEPT_SHARE = 0.95  # of requests within the target: a rate that a server bears
_SLOWDOWN = 1.6  # by HTTP and the clients, which share the cores: what BENCHMARKS.md found


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Every number of the demonstration but the request rate, which `fit_load` finds."""

    shape: Shape = field(
        default_factory=lambda: Shape(
            window_s=WINDOW_S,
            length_scale=0.05,
            output_scale=20.0,  # on top: answers are as long as the trace's
            max_prompt=384,
            max_output=256,
        )
    )
    policies: tuple[str, ...] = ("full", "static:all", "morph")
    kv_tokens: int = 700  # that the memory budget leaves room for at full precision
    max_model_len: int = 640
    slo: Slo = field(default_factory=lambda: Slo(ttft_s=1.0, tpot_s=0.1))
    timeout_s: float = 30.0
    quantize_windows: int = 16
    profile_windows: int = 2
    window_tokens: int = 256


def demo_budget(settings: DemoSettings, bundle: Path) -> str:
    """The memory budget of every server, as `morph serve` takes it."""
    policy = load_policy("balanced")
    config = EngineConfig(DEMO_MODEL, policy, bundle=str(bundle), device="cpu")
    return f"{math.ceil(budget_for_tokens(config, settings.kv_tokens) / 2**20)}MiB"


def fit_load(settings: DemoSettings, bundle: Path, budget: str) -> DemoSettings:
    """The settings with a request rate that full precision just does not bear on this machine.

    By the measured costs. A morphing server bears more, so that the machine may turn out slower
    than it was when it was timed.
    """
    fleet, trace = _fleet(settings, bundle, budget), read_trace(_TRACE)
    low, high = _RATE_SCALES
    while high / low > _RATE_STEP:
        middle = math.sqrt(low * high)
        schedule = shape_trace(trace, replace(settings.shape, rate_scale=middle))
        low, high = (middle, high) if _bears(fleet, schedule, settings) else (low, middle)
    return replace(settings, shape=replace(settings.shape, rate_scale=high))


def _fleet(settings: DemoSettings, bundle: Path, budget: str) -> Fleet:
    """The server under test."""
    cache = CacheConfig(memory_budget=parse_bytes(budget))
    return Fleet(
        this_machine(DEMO_MODEL, bundle, cache),
        cache=cache,
        limits=SchedulerConfig(max_model_len=settings.max_model_len),
        timeout_s=settings.timeout_s,
        slowdown=_SLOWDOWN,
    )


def _bears(fleet: Fleet, schedule: Schedule, settings: DemoSettings) -> bool:
    """Whether a server at full precision does."""
    limit_s = settings.slo.ttft_s
    assert limit_s is not None
    outcomes = simulate(fleet, schedule, load_policy("off")).outcomes
    kept = sum(o.ttft_s is not None and o.ttft_s <= limit_s for o in outcomes)
    return kept >= _KEPT_SHARE * len(outcomes)


def demo_request(settings: DemoSettings, folder: Path, bundle: Path, budget: str) -> BenchRequest:
    """The comparison that the demonstration runs."""
    return BenchRequest(
        model=DEMO_MODEL,
        trace=_TRACE,
        shape=settings.shape,
        policies=settings.policies,
        slo=settings.slo,
        output=folder,
        bundle=bundle,
        memory_budget=budget,
        max_model_len=settings.max_model_len,
        device="cpu",  # to which the load is fitted
        timeout_s=settings.timeout_s,
        force=True,
    )


def prepare_bundle(
    folder: Path, settings: DemoSettings, on_step: Callable[[str, int, int], None]
) -> Path:
    """A ranked bundle of the shipped model, with the costs of this machine, in `folder`.

    What is there already and sound is kept.
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
            QuantizeSettings("gptq", size, int8=True),
            draw_windows(checkpoint, None, Part.CALIBRATION, *shape),
            force=True,
            on_layer=lambda i: on_step("quantising layers", i + 1, total),
        )
        bundle = open_bundle(str(folder), checkpoint)
    if bundle.manifest.ranking is None:
        shape = settings.profile_windows, settings.window_tokens
        texts = draw_texts(checkpoint, None, *shape)
        model = Model(checkpoint, bundle)
        bundle = bundle.with_ranking(rank(model, texts, RankSettings(num_random=1), on_step))
    if _costs_here(bundle) is None:
        on_step("timing layers", 0, 1)
        bundle.with_costs(measure_costs(checkpoint, bundle, "cpu", torch.get_num_threads()))
        on_step("timing layers", 1, 1)
    return folder


def _existing(folder: Path, checkpoint: Checkpoint) -> Bundle | None:
    try:
        return open_bundle(str(folder), checkpoint)
    except MorphError:
        return None  # missing, unfinished or of another version: it is built anew


def _costs_here(bundle: Bundle) -> DeviceCosts | None:
    """What was measured on this machine, as the demonstration's servers run on it."""
    kernels = load_kernels("cpu")
    dtype = choose_dtype("auto", bundle.architecture.dtype, kernels)
    return costs_of(bundle.manifest.costs, kernels, dtype, open_device("cpu"))
