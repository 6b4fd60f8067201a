"""Where everything lies in the arena: pages, chunks and slabs, as plain arithmetic.

    [ static weights ][ staging ][ base KV chunks ... ][ slab of layer 0 ][ slab of layer 1 ] ...

The arena is an array of pages. A page holds K and V of one block of one layer. A chunk is
`run_blocks` blocks times all layers, layer-major: layer l of block i is page
`start + l * run_blocks + i`. A block is known by its page in layer 0 (`page0 = start + i`), so
that the cache of layer l is the constant view `pages[l * run_blocks:]` and one block table serves
all layers. A slab is a layer's home; its INT8 and INT4 images lie at the slab's tail, and the front
is cut into chunks while one of them is in use. Chunks are cut from the slab's start, so what INT8
frees is the beginning of what INT4 frees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from morphserve.configs.errors import OutOfBudget
from morphserve.quantize.manifest import Variant
from morphserve.runtime.ladder import DEPTH

ALIGNMENT = 256  # bytes; of every tensor in the arena


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    return -(-nbytes // to) * to


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes that the model needs in the arena; images are already aligned."""

    static_bytes: int
    image_bytes: Mapping[Variant, tuple[int, ...]]  # of each layer, by variant served; FULL always
    kv_bytes_per_token: int  # K and V of one layer
    block_tokens: int

    @property
    def num_layers(self) -> int:
        return len(self.full_bytes)

    @property
    def full_bytes(self) -> tuple[int, ...]:
        return self.image_bytes[Variant.FULL]

    @property
    def quantized(self) -> list[Variant]:
        """The other variants, the shallowest first."""
        return sorted(self.image_bytes.keys() - {Variant.FULL}, key=DEPTH.__getitem__)

    @property
    def staged_bytes(self) -> int:
        """The most that a swap puts aside: a quantised image, or as much of one above it."""
        return max(chain.from_iterable(self.image_bytes[v] for v in self.quantized), default=0)

    @property
    def page_bytes(self) -> int:
        return self.kv_bytes_per_token * self.block_tokens


@dataclass(frozen=True, slots=True)
class Slab:
    """A layer's fixed home. Offsets are bytes from the start of the arena."""

    page: int  # first page
    num_pages: int
    offsets: Mapping[Variant, int]  # of each image: full at the slab's start, others at its tail
    blocks: Mapping[Variant, tuple[int, ...]]  # page0 of what each frees beyond the one above it

    def freed_between(self, upper: Variant, lower: Variant) -> list[Variant]:
        """Whose blocks are free at `lower` and not yet at `upper`, the shallowest first."""
        return [v for v in self.blocks if DEPTH[upper] < DEPTH[v] <= DEPTH[lower]]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    sizes: ModelSizes
    run_blocks: int  # blocks per chunk
    num_pages: int
    staging: tuple[int, ...]  # byte offset of each staging slot
    base_blocks: tuple[int, ...]  # page0
    slabs: tuple[Slab, ...]

    @property
    def num_bytes(self) -> int:
        return self.num_pages * self.sizes.page_bytes

    def capacity(self, variants: Sequence[Variant]) -> int:
        """KV blocks while each layer has this variant."""
        freed = (
            len(slab.blocks[part])
            for slab, variant in zip(self.slabs, variants, strict=True)
            for part in slab.freed_between(Variant.FULL, variant)
        )
        return len(self.base_blocks) + sum(freed)


def fixed_bytes(sizes: ModelSizes, staging_slots: int) -> int:
    """Bytes of the arena that are not base KV: static weights, staging, slabs."""
    page = sizes.page_bytes
    staging = staging_bytes(sizes, staging_slots)
    slabs = sum(align(nbytes, page) for nbytes in sizes.full_bytes)
    return align(sizes.static_bytes, page) + staging + slabs


def staging_bytes(sizes: ModelSizes, slots: int) -> int:
    """Bytes of so many staging slots."""
    return align(sizes.staged_bytes, sizes.page_bytes) * slots


def budget_for(sizes: ModelSizes, staging_slots: int, min_run_bytes: int, num_tokens: int) -> int:
    """Least budget in bytes whose base KV holds this many tokens."""
    run = choose_run(sizes, min_run_bytes)
    chunk_tokens = run * sizes.block_tokens
    chunks = -(-num_tokens // chunk_tokens)
    return fixed_bytes(sizes, staging_slots) + chunks * run * sizes.num_layers * sizes.page_bytes


def choose_run(sizes: ModelSizes, min_run_bytes: int) -> int:
    """Blocks per chunk: the longest run that wastes little of what the slabs free.

    Runs shorter than `min_run_bytes` are taken only where a long one would lose more than a tenth
    of the blocks that single-block chunks would give.
    """
    if not sizes.quantized:
        return max(1, -(-min_run_bytes // sizes.page_bytes))
    layers = sizes.num_layers
    fronts = [_front_pages(sizes, i, variant) for variant in sizes.quantized for i in range(layers)]

    def gain(run: int) -> int:
        return sum(front // (run * layers) * run for front in fronts)

    candidates = range(1, max(fronts) // layers + 1)
    long = [run for run in candidates if run * sizes.page_bytes >= min_run_bytes]
    best_long = max(long, key=lambda run: (gain(run), run), default=1)
    if gain(best_long) >= 0.9 * gain(1):
        return best_long
    return max(candidates, key=lambda run: (gain(run), run), default=1)


def plan_memory(
    sizes: ModelSizes, budget: int, staging_slots: int, min_run_bytes: int
) -> MemoryPlan:
    """Cuts `budget` bytes into pages. Raises OutOfBudget if not even one chunk of KV fits."""
    page = sizes.page_bytes
    run = choose_run(sizes, min_run_bytes)
    least = fixed_bytes(sizes, staging_slots) + run * sizes.num_layers * page
    if budget < least:
        raise OutOfBudget(
            f"a memory budget of {budget / 2**20:.1f} MiB cannot hold the model and any KV cache: "
            f"raise --memory-budget to {least / 2**20:.1f} MiB or more",
            needed_bytes=least,
        )
    num_pages = budget // page
    staging_pages = staging_bytes(sizes, 1) // page
    first_staging = align(sizes.static_bytes, page) // page
    base_start = first_staging + staging_slots * staging_pages
    slab_pages = [align(nbytes, page) // page for nbytes in sizes.full_bytes]
    base_end = num_pages - sum(slab_pages)
    slabs, start = [], base_end
    for layer, count in enumerate(slab_pages):
        slabs.append(_slab(sizes, layer, start, count, run))
        start += count
    return MemoryPlan(
        sizes=sizes,
        run_blocks=run,
        num_pages=num_pages,
        staging=tuple((first_staging + i * staging_pages) * page for i in range(staging_slots)),
        base_blocks=_chunk_blocks(base_start, base_end - base_start, run, sizes.num_layers),
        slabs=tuple(slabs),
    )


def _front_pages(sizes: ModelSizes, layer: int, variant: Variant) -> int:
    slab_bytes = align(sizes.full_bytes[layer], sizes.page_bytes)
    return (slab_bytes - sizes.image_bytes[variant][layer]) // sizes.page_bytes


def _slab(sizes: ModelSizes, layer: int, page: int, num_pages: int, run: int) -> Slab:
    end = (page + num_pages) * sizes.page_bytes
    offsets = {Variant.FULL: page * sizes.page_bytes}
    blocks: dict[Variant, tuple[int, ...]] = {}
    num_freed = 0
    for variant in sizes.quantized:
        offsets[variant] = end - sizes.image_bytes[variant][layer]
        front = _front_pages(sizes, layer, variant)
        freed = _chunk_blocks(page, front, run, sizes.num_layers)
        blocks[variant], num_freed = freed[num_freed:], len(freed)
    assert sorted(offsets.values()) == list(offsets.values()), "a deeper variant is larger"
    return Slab(page, num_pages, offsets, blocks)


def _chunk_blocks(page: int, num_pages: int, run: int, num_layers: int) -> tuple[int, ...]:
    """page0 of every block in the whole chunks that fit into these pages."""
    chunk_pages = run * num_layers
    starts = range(page, page + num_pages - chunk_pages + 1, chunk_pages)
    return tuple(start + i for start in starts for i in range(run))
