"""GPUs as constants, each with its source; docs/simulator.md tells how they were fitted."""

from collections.abc import Iterator
from dataclasses import dataclass

from morphserve.configs.errors import ConfigError

_TABLES = (
    "ai-dynamo/aiconfigurator, commit 095f58a, measured tables of {}: GEMM, attention and "
    "all-reduce of vLLM {}"
)
_INT4_ADA_AMPERE = "weight-only GEMM of TensorRT-LLM 1.0.0 in the same tables"
_INT4_HOPPER = (
    "INT4: 2.2 times bf16 at up to 16 rows (inclusionAI/humming PR 2, Marlin and humming on H100, "
    "8192 x 8192), even with it near 128 (mobiusml/gemlite charts), above that weights are "
    "dequantised first; INT8: TensorRT-LLM 1.2.0rc5 at one row"
)
_PCIE = "PCIe {} x16, as far as pinned copies usually get"


@dataclass(frozen=True, slots=True)
class Linear:
    """Linears of a layer: ((bytes / bytes_per_s)^p + (2 weights tokens / flops)^p)^(1/p) s."""

    bytes_per_s: float
    flops: float
    sharpness: float = 2.0  # p: 1 where reading and multiplying never overlap

    def seconds(self, num_bytes: float, weights: float, tokens: int) -> float:
        p = self.sharpness
        reading, multiplying = num_bytes / self.bytes_per_s, 2 * weights * tokens / self.flops
        return float((reading**p + multiplying**p) ** (1 / p))

    def about(self) -> str:
        return f"{_rates(self.bytes_per_s, self.flops)}, joined by a {self.sharpness:g}-norm"


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention, over a batch."""

    call_s: float  # of a launch
    kv_bytes_per_s: float  # of K and V that decoding reads
    sequence_s: float  # of each sequence that decodes
    flops: float  # of prefill, over pairs of a query and a token it looks at
    prefill_call_s: float
    prefill_bytes_per_s: float  # of q, k, v and the output


@dataclass(frozen=True, slots=True)
class Link:
    """Between GPUs of one server: an all-reduce takes call_s + bytes / bytes_per_s."""

    call_s: float
    bytes_per_s: float

    def about(self) -> str:
        return f"{_us(self.call_s)} per all-reduce, {_gb(self.bytes_per_s)}"


def _rates(bytes_per_s: float, flops: float) -> str:
    return f"{_gb(bytes_per_s)} and {flops / 1e12:.4g} TFLOP/s"


def _gb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:,.0f} GB/s"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU. Bytes per second and operations per second are what kernels reach, not peaks."""

    name: str
    title: str
    memory_bytes: int  # as nvidia-smi tells
    peak_bytes_per_s: float
    peak_flops: float  # bf16, dense
    full: Linear
    int8: Linear
    int4: Linear
    attention: Attention
    small_s: float  # a layer's norms, rotary embedding and activation in a small batch: launches
    copy_bytes_per_s: float  # from pinned host memory
    link: Link | None  # None: no fast one
    sources: tuple[str, ...]

    def about(self) -> dict[str, str]:
        """What a report says of the constants."""
        attention = self.attention
        return {
            "device": self.title,
            "memory": f"{self.memory_bytes / 2**30:.1f} GiB",
            "peaks": _rates(self.peak_bytes_per_s, self.peak_flops),
            "linears at full precision": self.full.about(),
            "linears at INT8": self.int8.about(),
            "linears at INT4": self.int4.about(),
            "attention of a decoding batch": f"{_us(attention.call_s)} a call, "
            f"{_us(attention.sequence_s)} per sequence, K and V at {_gb(attention.kv_bytes_per_s)}",
            "attention of a prefill": f"{_us(attention.prefill_call_s)} a call, "
            f"{_rates(attention.prefill_bytes_per_s, attention.flops)}",
            "norms and activations of a layer": _us(self.small_s),
            "copies from the host": _gb(self.copy_bytes_per_s),
            "between GPUs": "no fast link" if self.link is None else self.link.about(),
            "sources": "; ".join(self.sources),
        }


_SMALL_S = 10e-6
_NVLINK3, _NVLINK4 = Link(5e-6, 60e9), Link(5e-6, 100e9)


def _devices() -> Iterator[Device]:
    yield Device(
        name="l4",
        title="NVIDIA L4 24 GB",
        memory_bytes=23034 * 2**20,
        peak_bytes_per_s=0.300e12,
        peak_flops=121e12,
        full=Linear(0.24e12, 77e12),
        int8=Linear(0.233e12, 81e12),
        int4=Linear(0.228e12, 81e12, 1.5),
        attention=Attention(10e-6, 0.234e12, 0.16e-6, 66e12, 7.8e-6, 0.344e12),
        small_s=_SMALL_S,
        copy_bytes_per_s=25e9,
        link=None,
        sources=(
            "peaks: NVIDIA's data sheet",
            "not measured: bandwidth at 0.8 of the peak (aiconfigurator's systems/l4.yaml), all "
            "else the L40S's shares of its peaks, which has the same multiprocessors; an L4 that "
            "its 72 W hold back is slower in prefill",
            _PCIE.format(4),
        ),
    )
    yield Device(
        name="l40s",
        title="NVIDIA L40S 48 GB",
        memory_bytes=46068 * 2**20,
        peak_bytes_per_s=0.864e12,
        peak_flops=362e12,
        full=Linear(0.654e12, 231e12),
        int8=Linear(0.67e12, 242e12),
        int4=Linear(0.62e12, 243e12, 1.5),
        attention=Attention(10e-6, 0.673e12, 0.16e-6, 199e12, 7.8e-6, 0.99e12),
        small_s=_SMALL_S,
        copy_bytes_per_s=25e9,
        link=None,
        sources=(_TABLES.format("NVIDIA L40S", "0.24.0"), _INT4_ADA_AMPERE, _PCIE.format(4)),
    )
    yield _a100("a100", "NVIDIA A100 SXM 80 GB", 81920, 2.039e12)
    yield _a100("a100-40", "NVIDIA A100 SXM 40 GB", 40960, 1.555e12)
    yield Device(
        name="h100",
        title="NVIDIA H100 SXM 80 GB",
        memory_bytes=81559 * 2**20,
        peak_bytes_per_s=3.35e12,
        peak_flops=989e12,
        full=Linear(2.60e12, 800e12),
        int8=Linear(2.01e12, 450e12),
        int4=Linear(1.475e12, 450e12),
        attention=Attention(10.8e-6, 3.27e12, 0.18e-6, 726e12, 12.4e-6, 1.41e12),
        small_s=_SMALL_S,
        copy_bytes_per_s=53e9,
        link=_NVLINK4,
        sources=(_TABLES.format("NVIDIA H100 SXM", "0.24.0"), _INT4_HOPPER, _PCIE.format(5)),
    )
    yield Device(
        name="h200",
        title="NVIDIA H200 SXM 141 GB",
        memory_bytes=143771 * 2**20,
        peak_bytes_per_s=4.8e12,
        peak_flops=989e12,
        full=Linear(3.47e12, 780e12),
        int8=Linear(2.68e12, 450e12),
        int4=Linear(1.97e12, 450e12),
        attention=Attention(11e-6, 4.43e12, 0.18e-6, 706e12, 12.3e-6, 1.5e12),
        small_s=_SMALL_S,
        copy_bytes_per_s=53e9,
        link=_NVLINK4,
        sources=(_TABLES.format("NVIDIA H200 SXM", "0.24.0"), _INT4_HOPPER, _PCIE.format(5)),
    )


def _a100(name: str, title: str, memory_mib: int, peak_bytes_per_s: float) -> Device:
    """What was measured on the 80 GB card, at its share of the peak bandwidth."""
    share = peak_bytes_per_s / 2.039e12
    return Device(
        name=name,
        title=title,
        memory_bytes=memory_mib * 2**20,
        peak_bytes_per_s=peak_bytes_per_s,
        peak_flops=312e12,
        full=Linear(1.43e12 * share, 260e12),
        int8=Linear(1.26e12 * share, 261e12, 1.25),
        int4=Linear(0.84e12 * share, 244e12, 1.0),
        attention=Attention(16.3e-6, 1.62e12 * share, 0.23e-6, 192e12, 12.7e-6, 0.71e12 * share),
        small_s=_SMALL_S,
        copy_bytes_per_s=25e9,
        link=_NVLINK3,
        sources=(
            _TABLES.format("NVIDIA A100 SXM 80 GB", "0.14.0"),
            _INT4_ADA_AMPERE,
            _PCIE.format(4),
        ),
    )


DEVICES = {device.name: device for device in _devices()}


def find_device(name: str) -> Device:
    """A device by its name, in any case."""
    device = DEVICES.get(name.lower())
    if device is None:
        raise ConfigError(f"device {name!r} is not known: use {', '.join(DEVICES)}")
    return device
