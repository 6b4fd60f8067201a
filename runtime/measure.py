"""Times of a model's layers, attention and everything else on this device, for the cost model.

What is timed are the parts that serve: images in an arena, a scheduler, a runner. Layers follow
each other as in a step, so that weights come from where they come from there, cache or memory.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from morphserve.quantize.bundle import Bundle
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.costs import AttentionTime, Curve, DeviceCosts, LayerTimes
from morphserve.quantize.manifest import Variant
from morphserve.quantize.modules import linear_shapes
from morphserve.runtime.build import DeviceParts
from morphserve.runtime.device import Device, open_device
from morphserve.runtime.kernels import BatchMeta, load_kernels
from morphserve.runtime.loader import choose_dtype
from morphserve.runtime.model import Model
from morphserve.runtime.parts import Runner
from morphserve.runtime.points import points_of
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.rigs import build_rigs
from morphserve.runtime.runner import pack
from morphserve.runtime.scheduler import Batch, Slice
from morphserve.runtime.stopwatch import Preparation, Work, seconds_alone, stopwatch

LONGEST_S = 0.5  # a pass over the layers that takes longer is the last one: the rest extrapolates
# Every point has its turn in each round, so that other work on the machine does not meet all the
# runs of one point. Such work only ever adds time: of a point's runs, the lower quartile counts.
ROUNDS = 5
LEAST_S = 1e-7  # what a clock tells apart
PROMPT_TOKENS = 128  # from so many on, layers are timed on prompts
TURN_S = 0.03
MAX_RUNS = 20  # in one turn

Run = Callable[[], list[float]]  # returns seconds, of each layer where it runs layers


def measure_costs(
    checkpoint: Checkpoint,
    bundle: Bundle,
    kernels_name: str,
    threads: int,
    show: Callable[[str], None] = lambda _: None,
    device: Device | None = None,
) -> DeviceCosts:
    """What the cost model needs. `show` is told what goes on.

    kernels_name: as `load_kernels` knows them. `device` is one that they compute on; without one
    those for cuda are timed on the first GPU, where `threads` do not matter. Takes about ten
    seconds for a small model; a large one is loaded in part, and a turn is then as long as its
    run.
    """
    arch = checkpoint.architecture
    device = device or open_device("cuda" if kernels_name == "cuda" else "cpu")
    kernels, points = load_kernels(kernels_name), points_of(device.kind)
    dtype = choose_dtype("auto", arch.dtype, kernels)
    with num_threads(threads), torch.inference_mode():
        show("loading layers of every variant")
        limits = points.limits(arch.max_position)
        rigs = build_rigs(checkpoint, bundle, kernels, dtype, limits, points.kv_tokens, device)
        full = rigs[Variant.FULL].parts
        bare = device.runner(replace(full.model, layers=(), caches=()), limits, ())
        counts = _affordable(full, points.tokens)
        attention = points.attention_of(arch.max_position, max(64, counts[-1]))
        times = _Times()
        for i in range(ROUNDS):
            show(f"timing layers, attention and the rest of a step, {i + 1} of {ROUNDS}")
            for tokens in counts:
                for variant, rig in rigs.items():
                    times.measure((variant, tokens), _layers(rig.parts, tokens))
            for point in attention:
                times.measure(point, _attention(full, *point))
            for rows in points.rows:
                times.measure(rows, _rest(full, bare, rows))
        num_cores = device.num_threads
    return DeviceCosts(
        device=device.name,
        kernels=kernels.name,
        threads=num_cores,
        dtype=str(dtype).removeprefix("torch."),
        layer_weights=sum(n * k for n, k in linear_shapes(arch).values()),
        layers=[
            LayerTimes(
                variant,
                rig.image_bytes,
                Curve(counts, [times.seconds((variant, tokens)) for tokens in counts]),
            )
            for variant, rig in rigs.items()
        ],
        attention=[AttentionTime(*point, times.seconds(point)) for point in attention],
        rest=Curve(list(points.rows), [times.seconds(rows) for rows in points.rows]),
    )


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """So many threads compute within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _affordable(parts: DeviceParts, counts: Sequence[int]) -> list[int]:
    """Token counts up to the first, but the second, whose pass takes longer than LONGEST_S."""
    for i, tokens in enumerate(counts):
        with _layers(parts, tokens) as run:
            if sum(run()) > LONGEST_S and i:
                return list(counts[: i + 1])
    return list(counts)


@contextmanager
def _layers(parts: DeviceParts, tokens: int) -> Iterator[Run]:
    """Layers in which each token sees itself alone.

    Many tokens are prompts, whose attention is taken off: as many short sequences would keep it
    busier than any step does.
    """
    model = parts.model
    longest = 1 << len(model.cos_sin).bit_length() - 1
    length = min(tokens, longest) if tokens >= PROMPT_TOKENS else 1
    with _requests(parts, tokens // length, length) as requests:
        meta = _last_tokens(parts, requests, length)
        works = [partial(_pass, model, meta)]
        if length > 1:
            works += [partial(_attending, model, cache, meta) for cache in model.caches]
        watch = stopwatch(_device(parts), works)

        def run() -> list[float]:
            seconds, *attention = watch()
            return [max(seconds - sum(attention), LEAST_S) / len(model.layers)]

        yield run


@contextmanager
def _attention(parts: DeviceParts, num_seqs: int, query_tokens: int, context: int) -> Iterator[Run]:
    """A layer's attention, after other work whose weights take their share of the caches.

    What a token needs to look at itself alone, which layers are timed with, is taken off.
    """
    model = parts.model
    with _requests(parts, num_seqs, context) as requests:
        meta = _last_tokens(parts, requests, query_tokens)
        alone = _first_tokens(parts, requests)
        works: list[Preparation] = []
        for layer, cache in zip(model.layers, model.caches, strict=True):
            works.append(partial(_pass, replace(model, layers=[layer], caches=[cache]), alone))
            works += [partial(_attending, model, cache, at) for at in (meta, alone)]
        watch = stopwatch(_device(parts), works)

        def run() -> list[float]:
            spent = watch()
            return [max(a - b, LEAST_S) for a, b in zip(spent[1::3], spent[2::3], strict=True)]

        yield run


def _attending(model: Model, cache: Tensor, meta: BatchMeta) -> Work:
    """A layer's attention."""
    kernels, shape = model.kernels, model.shape
    q = torch.ones(len(meta.positions), shape.num_heads, shape.head_dim, device=cache.device)
    q = q.to(kernels.activation_dtype(cache.dtype))
    return partial(kernels.attention, q, cache, meta, shape)


@contextmanager
def _rest(parts: DeviceParts, runner: Runner, rows: int) -> Iterator[Run]:
    """A step of so many decoding requests without layers, from the scheduler back to it.

    runner: of the model without its layers. Layers run before each step, uncounted: what they leave
    in the caches is what a step finds there.
    """
    params = SamplingParams(max_tokens=MAX_RUNS + 2, temperature=0.0, ignore_eos=True)
    for i in range(rows):
        parts.scheduler.add(Request(str(i), [0], params, 0.0))

    def launch() -> Work:
        batch = parts.scheduler.schedule()
        launched = runner.launch(batch)
        return lambda: parts.scheduler.update(batch, [got.token for got in launched.result()])

    with _layers(parts, rows) as run_layers:

        def run() -> list[float]:
            run_layers()
            return [seconds_alone(_device(parts), launch)]

        launch()()  # the prompts
        yield run
    for i in range(rows):
        parts.scheduler.abort(str(i))


def _pass(model: Model, meta: BatchMeta) -> Work:
    """The model's layers. Each norms what it reads, so that it may be what the last pass left."""
    norm = model.static.norm
    dtype = model.kernels.activation_dtype(norm.dtype)
    residual = torch.ones(len(meta.positions), norm.numel(), dtype=dtype, device=norm.device)
    rows = torch.arange(len(residual), device=norm.device)
    return partial(
        model.kernels.run_layers,
        *(residual, model.layers, model.caches, meta, model.shape, model.cos_sin, rows),
    )


def _device(parts: DeviceParts) -> torch.device:
    return parts.model.static.norm.device


@contextmanager
def _requests(parts: DeviceParts, num_seqs: int, context: int) -> Iterator[list[Request]]:
    """Equal sequences with their blocks."""
    params = SamplingParams(max_tokens=1)
    requests = [Request(str(i), [0] * context, params, 0.0) for i in range(num_seqs)]
    for request in requests:
        request.blocks = parts.pool.allocate(-(-context // parts.model.shape.block_tokens))
    yield requests
    for request in requests:
        parts.pool.free(request.blocks)


def _last_tokens(parts: DeviceParts, requests: Sequence[Request], count: int) -> BatchMeta:
    """Where the last `count` tokens of each lie."""
    return _meta_of(parts, [Slice(r, r.num_tokens - count, r.num_tokens) for r in requests])


def _first_tokens(parts: DeviceParts, requests: Sequence[Request]) -> BatchMeta:
    return _meta_of(parts, [Slice(r, 0, 1) for r in requests])


def _meta_of(parts: DeviceParts, batch: Batch) -> BatchMeta:
    meta, device = pack(batch, parts.model.shape.block_tokens)[1], _device(parts)
    return replace(meta, **{f.name: getattr(meta, f.name).to(device) for f in fields(meta)})


class _Times:
    """Seconds of the runs of each point."""

    def __init__(self) -> None:
        self._runs: dict[Hashable, list[float]] = {}

    def measure(self, point: Hashable, prepared: AbstractContextManager[Run]) -> None:
        """Runs for one turn."""
        runs = self._runs.setdefault(point, [])
        with prepared as run:
            end = time.perf_counter() + TURN_S
            for _ in range(MAX_RUNS):
                runs += run()
                if time.perf_counter() > end:
                    return

    def seconds(self, point: Hashable) -> float:
        runs = sorted(self._runs[point])
        return runs[len(runs) // 4]
