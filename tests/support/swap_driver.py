"""A tiny random model in memory, and a driver that turns the step loop with scripted swaps."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.quantize.architecture import Architecture, Rope
from morphserve.quantize.manifest import Variant
from morphserve.quantize.rounding import Grid, quantize_rtn
from morphserve.quantize.weights import (
    Biases,
    LayerTensors,
    Norms,
    QuantizedWeight,
    StaticTensors,
)
from morphserve.runtime.arena import Arena
from morphserve.runtime.build import DeviceParts, assemble
from morphserve.runtime.kernels import Kernels
from morphserve.runtime.ladder import Ladder, steps_of
from morphserve.runtime.layers import Image, full_image, quantized_image
from morphserve.runtime.layout import Layout
from morphserve.runtime.loader import LoadedModel
from morphserve.runtime.memory import MemoryPlan, budget_for, plan_memory
from morphserve.runtime.model import pack_statics
from morphserve.runtime.request import Request, SamplingParams, Status
from morphserve.runtime.scheduler import Batch

ARCHITECTURE = Architecture(
    family="llama",
    num_layers=5,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=96,
    max_position=512,
    norm_eps=1e-6,
    rope=Rope(10000.0),
    tied_head=True,
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    qk_norm=True,
    dtype="float32",
    eos_token_ids=(),
)
ORDER = [3, 0, 4, 1, 2]
BLOCK_TOKENS = 8
# Of each layer's quantised variant: its grid, and whether inputs have an order of their own.
KINDS = (
    (Grid(4, 32), False),
    (Grid(4, 32, symmetric=False), True),
    (Grid(8, 0), False),
    (Grid(4, 0), True),
    (Grid(4, 64, symmetric=False), False),
)
INT8_GRID = Grid(8, 32)


def _random_layer(generator: torch.Generator) -> LayerTensors[Tensor]:
    arch = ARCHITECTURE

    def weight(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator) * 2 * inputs**-0.5

    sizes = (arch.hidden_size, arch.hidden_size, arch.head_dim, arch.head_dim)
    norms = Norms(*(torch.rand(size, generator=generator) + 0.5 for size in sizes))
    bias = torch.randn(arch.q_size + 2 * arch.kv_size, generator=generator)
    return LayerTensors(
        norms=norms,
        biases=Biases(qkv=bias),
        qkv=weight(arch.q_size + 2 * arch.kv_size, arch.hidden_size),
        o=weight(arch.hidden_size, arch.q_size),
        gate_up=weight(2 * arch.intermediate_size, arch.hidden_size),
        down=weight(arch.hidden_size, arch.intermediate_size),
    )


def _quantise(
    layer: LayerTensors[Tensor], grid: Grid, ordered: bool
) -> LayerTensors[QuantizedWeight]:
    def quantise(weight: Tensor) -> QuantizedWeight:
        if not ordered:
            return quantize_rtn(weight, grid)
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(5))
        return replace(quantize_rtn(weight[:, order].contiguous(), grid), input_order=order)

    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return LayerTensors(layer.norms, layer.biases, *map(quantise, linears))


def random_model() -> tuple[StaticTensors, list[LayerTensors[Tensor]]]:
    """The same every time."""
    generator = torch.Generator().manual_seed(7)
    layers = [_random_layer(generator) for _ in range(ARCHITECTURE.num_layers)]
    embedding = torch.randn(ARCHITECTURE.vocab_size, ARCHITECTURE.hidden_size, generator=generator)
    return StaticTensors(embedding, torch.ones(ARCHITECTURE.hidden_size), embedding), layers


def quantised_layers(ordered: bool = True) -> list[LayerTensors[QuantizedWeight]]:
    """Each layer of `random_model` in another kind of variant.

    With `ordered`, two of them keep their inputs in an order of their own.
    """
    _, layers = random_model()
    return [
        _quantise(layer, grid, ordered and has_order)
        for layer, (grid, has_order) in zip(layers, KINDS, strict=True)
    ]


def tiny_model(kernels: Kernels, exact: bool = False) -> LoadedModel:
    """A random model with swaps to INT8 and to `quantised_layers` as its INT4.

    With `exact`, all three stand for the same weights, and give the same bits: full precision is
    the INT8 image then, made longer, as codes are multiplied with activations of eight bits.
    """
    static, full = random_model()
    int4 = quantised_layers(ordered=not exact)
    int8 = [_quantise(layer, INT8_GRID, ordered=False) for layer in full]
    if exact:
        int8 = [_as_int8(layer) for layer in int4]
    full_images = [full_image(layer, kernels, torch.float32) for layer in full]
    int8_images = [quantized_image(layer, kernels, torch.float32) for layer in int8]
    if exact:
        sizes = [image.num_bytes for image in full_images]
        full_images = [_lengthened(i, n) for i, n in zip(int8_images, sizes, strict=True)]
    return LoadedModel(
        architecture=ARCHITECTURE,
        kernels=kernels,
        dtype=torch.float32,
        statics=pack_statics(static, kernels, torch.float32),
        images={
            Variant.FULL: full_images,
            Variant.INT8: int8_images,
            Variant.INT4: [quantized_image(layer, kernels, torch.float32) for layer in int4],
        },
        ladder=Ladder(steps_of(ORDER, [Variant.INT8, Variant.INT4]), ARCHITECTURE.num_layers),
    )


def _as_int8(layer: LayerTensors[QuantizedWeight]) -> LayerTensors[QuantizedWeight]:
    """The same weights, in 8 bits each."""

    def widened(weight: QuantizedWeight) -> QuantizedWeight:
        shift, zeros = 128 - weight.middle, weight.zeros
        codes = weight.codes + shift if weight.bits == 4 else weight.codes
        zeros = zeros + shift if weight.bits == 4 and zeros is not None else zeros
        return replace(weight, bits=8, codes=codes, zeros=zeros)

    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return LayerTensors(layer.norms, layer.biases, *map(widened, linears))


def _lengthened(image: Image, num_bytes: int) -> Image:
    host = torch.zeros(num_bytes, dtype=torch.uint8)
    host[: image.num_bytes] = image.host
    return replace(image, host=host)


def prompt_of(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, ARCHITECTURE.vocab_size, (length,), generator=generator).tolist()


@dataclass
class Driver:
    """The engine's step loop, with swaps started by a script instead of the controller."""

    model: LoadedModel
    kv_tokens: int
    max_num_batched_tokens: int = 24
    max_num_seqs: int = 8
    prefix_caching: bool = False  # with it, a request's slices may have been others'
    parts: DeviceParts = field(init=False)
    plan: MemoryPlan = field(init=False)
    requests: dict[str, Request] = field(init=False, default_factory=dict)
    moved: int = field(init=False, default=0)  # blocks that evacuations copied
    precisions: dict[str, list[tuple[int, int, tuple[Variant, ...]]]] = field(
        init=False, default_factory=dict
    )  # per request: tokens start..end were computed with these variants

    def __post_init__(self) -> None:
        config = EngineConfig(
            model="",
            policy=load_policy("performance"),
            cache=CacheConfig(
                block_tokens=BLOCK_TOKENS,
                min_run_bytes=1,
                enable_prefix_caching=self.prefix_caching,
            ),
            scheduler=SchedulerConfig(self.max_num_seqs, self.max_num_batched_tokens),
        )
        sizes = self.model.sizes(BLOCK_TOKENS)
        self.plan = plan_memory(sizes, budget_for(sizes, 2, 1, self.kv_tokens), 2, 1)
        full, ladder = [Variant.FULL] * sizes.num_layers, self.model.ladder
        layout = Layout(self.plan, ladder, 256, [self.plan.capacity(full)], full)
        self.parts = assemble(config, self.model, layout)
        relocate = self.parts.swapper._relocate

        def counted(moves: Mapping[int, int]) -> None:
            self.moved += len(moves)
            relocate(moves)

        self.parts.swapper._relocate = counted
        self._poison(self.plan.base_blocks)
        publish = self.parts.pool.publish

        def poisoned(region: Hashable, blocks: Sequence[int]) -> None:
            self._poison(blocks)
            publish(region, blocks)

        self.parts.pool.publish = poisoned

    def add(self, name: str, prompt: Sequence[int], max_tokens: int) -> Request:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.requests[name] = Request(name, list(prompt), params, arrival_s=0.0)
        self.precisions[name] = []
        self.parts.scheduler.add(self.requests[name])
        return self.requests[name]

    def step(self, swaps: Sequence[tuple[int, Variant]] = ()) -> Batch:
        """Commits, starts these swaps (those that can start), and runs one batch."""
        parts = self.parts
        parts.swapper.commit_ready()
        for layer, to in swaps:
            if parts.swapper.has_room and parts.layers.variants[layer] is not to:
                if all(swap.layer != layer for swap in parts.swapper.in_flight):
                    parts.swapper.start(layer, to)
        batch = parts.scheduler.schedule(parts.ladder.rung_of(parts.layers.variants))
        parts.swapper.advance()
        if batch:
            variants = tuple(parts.layers.variants)
            for piece in batch:
                if piece.start == 0:
                    self.precisions[piece.request.id].clear()
                self.precisions[piece.request.id].append((piece.start, piece.end, variants))
            sampled = parts.runner.launch(batch).result()
            parts.scheduler.update(batch, [got.token for got in sampled])
        self.check()
        return batch

    def run(
        self, script: Callable[[int], Sequence[tuple[int, Variant]]], limit: int = 3000
    ) -> None:
        """Steps until every request has ended."""
        for turn in range(limit):
            self.step(script(turn))
            if all(r.status is Status.FINISHED for r in self.requests.values()):
                return
        raise AssertionError("requests did not end")

    def check(self) -> None:
        scheduler = self.parts.scheduler
        self.parts.pool.check([r.blocks for r in scheduler.running])
        assert not any(r.blocks for r in scheduler.waiting)

    @property
    def arena(self) -> Arena:
        return self.parts.swapper._arena

    def _poison(self, blocks: Sequence[int]) -> None:
        """NaN in the blocks' pages, so that a token read from a page nobody wrote shows."""
        for block in blocks:
            for layer in range(ARCHITECTURE.num_layers):
                self.arena.cache(layer, torch.float32)[block] = float("nan")
