"""Where everything lies in the arena: pages, chunks and slabs, as plain arithmetic.

    [ static weights ][ staging ][ base KV chunks ... ][ slab of layer 0 ][ slab of layer 1 ] ...

The arena is an array of pages. A page holds K and V of one block of one layer. A chunk is
`run_blocks` blocks times all layers, layer-major: layer l of block i is page
`start + l * run_blocks + i`. A block is known by its page in layer 0 (`page0 = start + i`), so
that the cache of layer l is the constant view `pages[l * run_blocks:]` and one block table serves
all layers. A slab is a layer's home; its INT4 image lies at the slab's tail, and the front is cut
into chunks while that image is in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from morphserve.configs.errors import OutOfBudget

ALIGNMENT = 256  # bytes; of every tensor in the arena


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    return -(-nbytes // to) * to


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes that the model needs in the arena; images are already aligned."""

    static_bytes: int
    full_bytes: tuple[int, ...]  # of each layer's full-precision image
    int4_bytes: tuple[int, ...]  # of each layer's INT4 image; empty without a bundle
    kv_bytes_per_token: int  # K and V of one layer
    block_tokens: int

    @property
    def num_layers(self) -> int:
        return len(self.full_bytes)

    @property
    def page_bytes(self) -> int:
        return self.kv_bytes_per_token * self.block_tokens


@dataclass(frozen=True, slots=True)
class Slab:
    """A layer's fixed home. Offsets are bytes from the start of the arena."""

    page: int  # first page
    num_pages: int
    full_offset: int
    int4_offset: int  # tail of the slab; its end without INT4
    blocks: tuple[int, ...]  # page0 of the blocks in the front, while the layer is INT4


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

    def capacities(self, order: Sequence[int], max_demoted: int) -> tuple[int, ...]:
        """KV blocks at rung 0, 1, ... max_demoted: the first layers of `order` at INT4."""
        totals = [len(self.base_blocks)]
        for layer in order[:max_demoted]:
            totals.append(totals[-1] + len(self.slabs[layer].blocks))
        return tuple(totals)


def fixed_bytes(sizes: ModelSizes, staging_slots: int) -> int:
    """Bytes of the arena that are not base KV: static weights, staging, slabs."""
    page = sizes.page_bytes
    staging = staging_bytes(sizes, staging_slots)
    slabs = sum(align(nbytes, page) for nbytes in sizes.full_bytes)
    return align(sizes.static_bytes, page) + staging + slabs


def staging_bytes(sizes: ModelSizes, slots: int) -> int:
    """Bytes of so many staging slots."""
    return align(max(sizes.int4_bytes, default=0), sizes.page_bytes) * slots


def budget_for(sizes: ModelSizes, staging_slots: int, min_run_bytes: int, num_tokens: int) -> int:
    """Least budget in bytes whose base KV holds this many tokens."""
    run = choose_run(sizes, min_run_bytes)
    chunk_tokens = run * sizes.block_tokens
    chunks = -(-num_tokens // chunk_tokens)
    return fixed_bytes(sizes, staging_slots) + chunks * run * sizes.num_layers * sizes.page_bytes


def choose_run(sizes: ModelSizes, min_run_bytes: int) -> int:
    """Blocks per chunk: the longest run that wastes little of what the slabs free.

    Runs shorter than `min_run_bytes` are taken only where a long one would lose more than a fifth
    of the blocks that single-block chunks would give.
    """
    if not sizes.int4_bytes:
        return max(1, -(-min_run_bytes // sizes.page_bytes))
    layers = sizes.num_layers
    fronts = [_front_pages(sizes, layer) for layer in range(layers)]

    def gain(run: int) -> int:
        return sum(front // (run * layers) * run for front in fronts)

    candidates = range(1, max(fronts) // layers + 1)
    long = [run for run in candidates if run * sizes.page_bytes >= min_run_bytes]
    best_long = max(long, key=lambda run: (gain(run), run), default=1)
    if gain(best_long) >= 0.8 * gain(1):
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
            f"raise --memory-budget to {least / 2**20:.1f} MiB or more"
        )
    num_pages = budget // page
    staging_pages = align(max(sizes.int4_bytes, default=0), page) // page
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


def _front_pages(sizes: ModelSizes, layer: int) -> int:
    slab_bytes = align(sizes.full_bytes[layer], sizes.page_bytes)
    return (slab_bytes - sizes.int4_bytes[layer]) // sizes.page_bytes


def _slab(sizes: ModelSizes, layer: int, page: int, num_pages: int, run: int) -> Slab:
    end = (page + num_pages) * sizes.page_bytes
    int4 = sizes.int4_bytes[layer] if sizes.int4_bytes else 0
    front = _front_pages(sizes, layer) if sizes.int4_bytes else 0
    return Slab(
        page=page,
        num_pages=num_pages,
        full_offset=page * sizes.page_bytes,
        int4_offset=end - int4,
        blocks=_chunk_blocks(page, front, run, sizes.num_layers),
    )


def _chunk_blocks(page: int, num_pages: int, run: int, num_layers: int) -> tuple[int, ...]:
    """page0 of every block in the whole chunks that fit into these pages."""
    chunk_pages = run * num_layers
    starts = range(page, page + num_pages - chunk_pages + 1, chunk_pages)
    return tuple(start + i for start in starts for i in range(run))
