"""A model on GPUs as a target: step times from a device's constants."""

from morphserve.configs.errors import ConfigError, OutOfBudget
from morphserve.morphcli.simulate.devices import Device, Linear
from morphserve.morphcli.simulate.sizes import layer_weights, model_sizes
from morphserve.morphcli.simulate.target import Target
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.costs import Curve
from morphserve.quantize.manifest import Variant
from morphserve.runtime.costs import AttentionCost, CostModel
from morphserve.runtime.memory import ModelSizes, align

_TOKENS = (
    *(1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768),
    *(1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384),
)
_RESERVED = 0.1  # of a device's memory: what vLLM leaves by default, for activations and the driver
_ITEM = 2  # bytes of an activation: 16 bits


def gpu_target(
    device: Device,
    arch: Architecture,
    name: str,
    *,
    int8: bool = False,
    tensor_parallel: int = 1,
) -> Target:
    """A replica of so many devices, each of which holds an equal part of every layer.

    Sizes are those of one device, since all of them do the same. Raises OutOfBudget, with the
    memory that it takes, if the model does not fit.
    """
    _check_split(device, arch, tensor_parallel)
    sizes = model_sizes(arch, int8=int8, shards=tensor_parallel)
    reserved = int(device.memory_bytes * _RESERVED)
    _check_fit(device, sizes, name, device.memory_bytes - reserved)
    title = device.title if tensor_parallel == 1 else f"{tensor_parallel} x {device.title}"
    return Target(
        device=title,
        model=name,
        max_position=arch.max_position,
        sizes=sizes,
        costs=gpu_costs(device, arch, sizes, tensor_parallel),
        copy_bytes_per_s=device.copy_bytes_per_s,
        copies_overlap=True,
        memory_bytes=device.memory_bytes,
        reserved_bytes=reserved,
        about=device.about(),
    )


def gpu_costs(
    device: Device, arch: Architecture, sizes: ModelSizes, tensor_parallel: int = 1
) -> CostModel:
    """Step times on so many devices at once."""
    layers = _Layers(device, arch, sizes, tensor_parallel)
    return CostModel(
        layers={
            variant: Curve(list(_TOKENS), [layers.seconds(variant, n) for n in _TOKENS])
            for variant in sizes.image_bytes
        },
        decode=_decode(device, sizes),
        prefill=_prefill(device, arch, tensor_parallel),
        rest=Curve(list(_TOKENS), [_head_s(device, arch, tensor_parallel, n) for n in _TOKENS]),
    )


class _Layers:
    """Seconds of a layer, without even a token's look at itself: that is in the attention terms."""

    def __init__(
        self, device: Device, arch: Architecture, sizes: ModelSizes, tensor_parallel: int
    ) -> None:
        self._device, self._arch, self._sizes = device, arch, sizes
        self._split = tensor_parallel
        self._weights = layer_weights(arch) / tensor_parallel

    def seconds(self, variant: Variant, tokens: int) -> float:
        return self._linears_s(variant, tokens) + self._small_s(tokens) + self._reduce_s(tokens)

    def _linears_s(self, variant: Variant, tokens: int) -> float:
        """A quantised layer by its own kernel or, if that is faster, dequantised before bf16's."""
        device = self._device
        full_s = device.full.seconds(self._bytes(Variant.FULL), self._weights, tokens)
        if variant is Variant.FULL:
            return full_s
        kernel: Linear = device.int4 if variant is Variant.INT4 else device.int8
        moved = self._bytes(variant) + self._bytes(Variant.FULL)
        dequantised_s = moved / device.full.bytes_per_s + full_s
        return min(kernel.seconds(self._bytes(variant), self._weights, tokens), dequantised_s)

    def _bytes(self, variant: Variant) -> int:
        return self._sizes.image_bytes[variant][0]

    def _small_s(self, tokens: int) -> float:
        """Norms twice (x and residual in and out), rotary embedding, gate times up."""
        arch = self._arch
        split = 2 * (arch.q_size + arch.kv_size) + 3 * arch.intermediate_size
        moved = (8 * arch.hidden_size + split / self._split) * _ITEM * tokens
        traffic_s = moved / self._device.full.bytes_per_s
        return float((self._device.small_s**2 + traffic_s**2) ** 0.5)

    def _reduce_s(self, tokens: int) -> float:
        """After attention and after the MLP."""
        link = self._device.link
        if self._split == 1 or link is None:
            return 0.0
        return 2 * (link.call_s + tokens * self._arch.hidden_size * _ITEM / link.bytes_per_s)


def _decode(device: Device, sizes: ModelSizes) -> AttentionCost:
    attention = device.attention
    per_pair = sizes.kv_bytes_per_token / attention.kv_bytes_per_s
    return AttentionCost(attention.call_s, per_pair, attention.sequence_s, 0.0)


def _prefill(device: Device, arch: Architecture, tensor_parallel: int) -> AttentionCost:
    attention = device.attention
    return AttentionCost(
        per_call=attention.prefill_call_s,
        per_pair=4 * arch.q_size / tensor_parallel / attention.flops,
        per_query=2
        * (arch.q_size + arch.kv_size)
        * _ITEM
        / tensor_parallel
        / attention.prefill_bytes_per_s,
        error=0.0,
    )


def _head_s(device: Device, arch: Architecture, tensor_parallel: int, rows: int) -> float:
    weights = arch.vocab_size * arch.hidden_size / tensor_parallel
    return device.full.seconds(weights * _ITEM, weights, rows)


def _check_split(device: Device, arch: Architecture, tensor_parallel: int) -> None:
    if tensor_parallel < 1:
        raise ConfigError(f"--tensor-parallel must be at least 1, not {tensor_parallel}")
    if tensor_parallel > 1 and device.link is None:
        raise ConfigError(
            f"{device.title} has no link between devices that --tensor-parallel could use"
        )
    if arch.num_kv_heads % tensor_parallel:
        raise ConfigError(
            f"--tensor-parallel {tensor_parallel} cannot split {arch.num_kv_heads} key and value "
            "heads evenly"
        )


def _check_fit(device: Device, sizes: ModelSizes, name: str, usable: int) -> None:
    block = sizes.page_bytes * sizes.num_layers
    needed = align(sizes.static_bytes + sum(sizes.full_bytes) + block)
    if needed > usable:
        raise OutOfBudget(
            f"{name} takes {needed / 2**30:.1f} GiB at full precision on each device, and "
            f"{device.title} has {usable / 2**30:.1f} GiB for it: split it with --tensor-parallel "
            "over more devices, or use a larger one",
            needed_bytes=needed,
        )
