"""How far a quantised layer computes what the full-precision one does."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.quantize import dense
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.dense import Linear
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

# Cosine under which a layer is not this model's: another model's is near 0, INT4 of 0.9 to 0.99.
FLOOR = 0.8
MAX_KV_SHIFT = 0.1  # rounding to INT4 moves channels by about 0.03, folds by 0.3 and more
_NUM_STATES = 512  # random hidden states that K and V are compared on
_DEAD = 1e-6  # share of the mean energy; channels under it mean nothing to attention


@dataclass(frozen=True, slots=True)
class Agreement:
    """A quantised layer against the full-precision one on the same hidden states."""

    # Means over tokens of the cosine of what is added to the residual stream, which itself would
    # hide every error:
    cosine: float  # by the whole layer
    attention: float
    mlp: float
    # How much K or V is scaled, |ratio - 1|: the largest but for one channel in a hundred. A layer
    # that writes them in another basis cannot share a cache with the full-precision one.
    kv_shift: float

    def fault(self, floor: float = FLOOR) -> str | None:
        """What is wrong with the layer, or None."""
        if not self.cosine >= floor:
            return (
                f"its output has a cosine of {self.cosine:.3f} with full precision, under {floor:g}"
            )
        if not self.shares_cache:
            return (
                f"it scales keys or values by {self.kv_shift:.0%} against full precision (scales "
                "folded into them?), so it cannot share a KV cache with full-precision layers"
            )
        return None

    @property
    def shares_cache(self) -> bool:
        """Whether it writes keys and values as full precision does, up to rounding."""
        return self.kv_shift <= MAX_KV_SHIFT


@dataclass(frozen=True, slots=True)
class _Outputs:
    added: Tensor  # [1, length, hidden]
    attention: Tensor
    mlp: Tensor
    keys: Tensor  # [states, channels]
    values: Tensor


class Probe:
    """Stands before the first layer; `advance` moves it behind one layer at full precision.

    Its text is random tokens: they need no tokenizer and reach every part of a layer.
    """

    def __init__(self, checkpoint: Checkpoint, num_tokens: int = 128, seed: int = 0) -> None:
        arch = checkpoint.architecture
        self._checkpoint = checkpoint
        self._arch = arch
        length = min(num_tokens, arch.max_position)
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randint(arch.vocab_size, (1, length), generator=random)
        self._cos_sin = dense.rotation(arch, length)
        self._x = dense.embed(checkpoint.static(), tokens)
        self._states = torch.randn(_NUM_STATES, arch.hidden_size, generator=random)
        self._enter(0)

    @property
    def layer(self) -> int:
        """The layer it stands before."""
        return self._layer

    def compare(self, layer: LayerTensors[QuantizedWeight]) -> Agreement:
        """Of a variant of the layer the probe stands before."""
        ours = self._run(dense.quantized_to_float32(layer))
        exact = self._exact
        return Agreement(
            cosine=_cosine(ours.added, exact.added),
            attention=_cosine(ours.attention, exact.attention),
            mlp=_cosine(ours.mlp, exact.mlp),
            kv_shift=max(_shift(ours.keys, exact.keys), _shift(ours.values, exact.values)),
        )

    def advance(self) -> None:
        """Moves on behind the full-precision layer."""
        self._x = self._x + self._exact.added
        if self._layer + 1 < self._arch.num_layers:
            self._enter(self._layer + 1)

    def _enter(self, layer: int) -> None:
        self._layer = layer
        self._exact = self._run(dense.to_float32(self._checkpoint.layer(layer)))

    def _run(self, layer: LayerTensors[Tensor]) -> _Outputs:
        inputs: dict[Linear, Tensor] = {}

        def keep(linear: Linear, x: Tensor) -> None:
            inputs[linear] = x

        y = dense.decoder_layer(self._x, layer, self._arch, self._cos_sin, keep)
        keys, values = self._keys_and_values(layer)
        return _Outputs(
            added=y - self._x,
            attention=F.linear(inputs["o"], layer.o, layer.biases.o),
            mlp=F.linear(inputs["down"], layer.down, layer.biases.down),
            keys=keys,
            values=values,
        )

    def _keys_and_values(self, layer: LayerTensors[Tensor]) -> tuple[Tensor, Tensor]:
        """[states, channels] each, before rotation, of hidden states of every direction alike.

        Text lies in few directions, and rounding errors along those would look like a scale.
        """
        arch, norms = self._arch, layer.norms
        x = F.rms_norm(self._states, norms.input.shape, norms.input, arch.norm_eps)
        bias = None if layer.biases.qkv is None else layer.biases.qkv[arch.q_size :]
        keys, values = F.linear(x, layer.qkv[arch.q_size :], bias).chunk(2, dim=-1)
        if norms.k is not None:
            heads = keys.view(len(x), -1, arch.head_dim)
            keys = F.rms_norm(heads, norms.k.shape, norms.k, arch.norm_eps).flatten(1)
        return keys, values


def _cosine(ours: Tensor, exact: Tensor) -> float:
    """Mean over tokens. Two vectors of zeros agree."""
    both_zero = (ours == 0).all(dim=-1) & (exact == 0).all(dim=-1)
    cosines = F.cosine_similarity(ours.double(), exact.double(), dim=-1)
    return float(torch.where(both_zero, 1.0, cosines).mean())


def _shift(ours: Tensor, exact: Tensor) -> float:
    """|ratio - 1| of channels of [states, channels], ratio = <ours, exact> / <exact, exact>.

    Of every hundred channels the furthest is left out.
    """
    energy = exact.square().sum(dim=0)
    alive = energy > _DEAD * energy.mean()
    if not alive.any():
        return 0.0 if torch.equal(ours, exact) else 1.0
    ratio = (ours * exact).sum(dim=0)[alive] / energy[alive]
    shifts = (ratio - 1).abs().sort().values
    return float(shifts[len(shifts) - 1 - len(shifts) // 100])
