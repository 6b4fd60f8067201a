"""What `morph serve --dry-run` shows: where memory would go, and what is set where."""

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from morphserve.configs.errors import OutOfBudget
from morphserve.configs.schema import EngineConfig
from morphserve.morphcli.settings import Setting
from morphserve.quantize.machine import free_memory
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import foretell
from morphserve.runtime.ladder import Ladder
from morphserve.runtime.messages import Hello, MemoryBytes
from morphserve.runtime.sizing import outline_model


class Room(msgspec.Struct, frozen=True):
    """The KV cache at one rung."""

    rung: int
    layers: dict[Variant, int]  # how many have which variant
    blocks: int
    tokens: int
    requests: dict[int, int]  # tokens of a request -> how many of these fit at once


class Plan(msgspec.Struct, frozen=True):
    """A server's memory, in bytes, as it would be laid out."""

    max_model_len: int
    block_tokens: int
    dtype: str
    device: str
    kernels: str
    memory: MemoryBytes
    host_bytes: int  # copies of layers that swaps are made from, outside the budget
    on_host: bool  # whether the budget is main memory, not a device's own
    free_bytes: int  # of main memory, now
    rungs: list[Room]  # no layer, one step, and the deepest that the policy allows
    settings: list[Setting]  # that are not left to their defaults
    fits: bool = True


class NoPlan(msgspec.Struct, frozen=True):
    """Why there is none."""

    reason: str
    needed_bytes: (
        int | None
    )  # least --memory-budget that would do; None: the machine has too little
    fits: bool = False


def show_plan(config: EngineConfig, settings: list[Setting], json: bool) -> None:
    """Prints the plan, or one JSON document, which tells too what does not fit.

    Raises MorphError, as the server would.
    """
    try:
        model = outline_model(config)
        plan = make_plan(foretell(config, model), settings, on_host=model.device.kind == "cpu")
    except OutOfBudget as error:
        if json:
            print(msgspec.json.encode(NoPlan(str(error), error.needed_bytes)).decode())
        raise
    if json:
        print(msgspec.json.encode(plan).decode())
    else:
        _print(plan)


def make_plan(hello: Hello, settings: list[Setting], *, on_host: bool) -> Plan:
    memory = hello.memory
    deepest = len(hello.capacities) - 1
    return Plan(
        max_model_len=hello.max_model_len,
        block_tokens=hello.block_tokens,
        dtype=hello.dtype,
        device=hello.device,
        kernels=hello.kernels,
        memory=memory,
        host_bytes=sum(map(sum, memory.images.values())) if memory.staging else 0,
        on_host=on_host,
        free_bytes=free_memory(),
        rungs=[_room(hello, rung) for rung in sorted({0, min(1, deepest), deepest})],
        settings=settings,
    )


def _room(hello: Hello, rung: int) -> Room:
    variants = Ladder(tuple(hello.ladder), hello.num_layers).variants_at(rung)
    blocks = hello.capacities[rung]
    lengths = (hello.max_model_len, max(1, hello.max_model_len // 4))
    return Room(
        rung=rung,
        layers={variant: variants.count(variant) for variant in Variant if variant in variants},
        blocks=blocks,
        tokens=blocks * hello.block_tokens,
        requests={n: blocks // -(-n // hello.block_tokens) for n in lengths},
    )


def _print(plan: Plan) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(_memory(plan.memory))
    console.print(_rooms(plan.rungs))
    if plan.settings:
        console.print(_settings(plan.settings))
    for line in _sentences(plan):
        console.print(line, markup=False)


def _memory(memory: MemoryBytes) -> Table:
    table = Table("memory budget", title="where it goes at full precision")
    table.add_column(_mib(memory.budget), justify="right")
    kv = memory.budget - memory.static - memory.staging - memory.layers
    table.add_row("embedding, head, norms", _mib(memory.static))
    table.add_row("layers", _mib(memory.layers))
    for variant, images in memory.images.items():
        table.add_row(f"  {len(images)} layers as {variant}", _mib(sum(images)), style="dim")
    table.add_row("staging of swaps", _mib(memory.staging))
    table.add_row("KV cache", _mib(kv))
    return table


def _rooms(rungs: Sequence[Room]) -> Table:
    table = Table(title="the KV cache, rung by rung")
    lengths = [f"requests of {length}" for length in rungs[0].requests]
    for heading in ("rung", "layers", "blocks", "tokens", *lengths):
        table.add_column(heading, justify="left" if heading == "layers" else "right")
    for room in rungs:
        layers = ", ".join(f"{count} {variant}" for variant, count in room.layers.items())
        counts = map(str, (room.blocks, room.tokens, *room.requests.values()))
        table.add_row(str(room.rung), layers, *counts)
    return table


def _settings(settings: Sequence[Setting]) -> Table:
    table = Table("setting", "value", "from", title="what is not left to its default")
    for setting in settings:
        table.add_row(setting.name, setting.value, setting.origin)
    return table


def _sentences(plan: Plan) -> list[str]:
    needed = plan.host_bytes + (plan.memory.budget if plan.on_host else 0)
    lines = [f"it fits: {plan.dtype} weights and KV, {plan.kernels} kernels on {plan.device}"]
    if not plan.on_host:
        lines.append(
            "what a step's activations take is not known before the start, when it is measured: "
            "it comes off a budget that was not given"
        )
    if plan.host_bytes:
        lines.append(f"copies of layers to swap from, beside the budget: {_mib(plan.host_bytes)}")
    if needed > plan.free_bytes:
        lines.append(
            f"warning: this machine has {_mib(plan.free_bytes)} free now, and the server will "
            f"hold {_mib(needed)}"
        )
    return lines


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
