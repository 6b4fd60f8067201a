"""Running token windows through any mix of layer variants."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize import dense
from morphserve.quantize.bundle import Bundle
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.machine import free_memory
from morphserve.quantize.manifest import Variant
from morphserve.quantize.weights import LayerTensors, StaticTensors

Mix = tuple[Variant, ...]  # the variant of each layer

_BATCH_TOKENS = 2048  # windows that run together: bounds the memory of states and logits


def mix_of(layers: Collection[int], num_layers: int, variant: Variant = Variant.INT4) -> Mix:
    """These layers as `variant`, all others at full precision."""
    return tuple(variant if i in layers else Variant.FULL for i in range(num_layers))


class Model:
    """Every variant of every layer, read when it is first used.

    Layers are kept in float32 while they take at most `float32_bytes` (None: half the memory that
    is free), the rest as they are stored, to be converted at each use.
    """

    def __init__(
        self, checkpoint: Checkpoint, bundle: Bundle | None, float32_bytes: int | None = None
    ) -> None:
        self.architecture = checkpoint.architecture
        self.num_layers = checkpoint.architecture.num_layers
        self._checkpoint = checkpoint
        self._bundle = bundle
        self._static = checkpoint.static()
        self._room = free_memory() // 2 if float32_bytes is None else float32_bytes
        self._float32: dict[tuple[int, Variant], LayerTensors[Tensor]] = {}
        self._stored: dict[tuple[int, Variant], Callable[[], LayerTensors[Tensor]]] = {}

    @property
    def variants(self) -> Sequence[Variant]:
        """What layers can be replaced by."""
        return sorted(self._bundle.manifest.variants) if self._bundle else []

    def freed_bytes(self, layer: int, variant: Variant) -> int:
        """How much smaller the layer's file is than at full precision."""
        if variant is Variant.FULL:
            return 0
        file = self._require_bundle().manifest.variants[variant].layers[layer]
        return self._checkpoint.layer_bytes(layer) - file.num_bytes

    def embed(self, tokens: Tensor) -> Tensor:
        """[n, length] token ids to [n, length, hidden]."""
        return dense.embed(self._static, tokens)

    def weights(self, i: int, variant: Variant) -> LayerTensors[Tensor]:
        """Layer `i` in float32."""
        key = i, variant
        if key in self._float32:
            return self._float32[key]
        convert = self._stored.pop(key, None) or self._read(i, variant)
        weights = convert()
        size = sum(4 * w.numel() for w in (weights.qkv, weights.o, weights.gate_up, weights.down))
        if size <= self._room:
            self._room -= size
            self._float32[key] = weights
        else:
            self._stored[key] = convert
        return weights

    def layer(self, x: Tensor, i: int, variant: Variant) -> Tensor:
        """[n, length, hidden] through layer `i`."""
        cos_sin = dense.rotation(self.architecture, x.shape[1])
        return dense.decoder_layer(x, self.weights(i, variant), self.architecture, cos_sin)

    def logits(self, x: Tensor) -> Tensor:
        """[n, length, hidden] behind the last layer to [n, length, vocab]."""
        return dense.logits(x, self._static, self.architecture)

    def compact_logits(self, x: Tensor) -> Tensor:
        """[n, length, at most hidden], of the same lengths and angles as the logits.

        With the head's weights W = Q R and Q's columns orthonormal, W a · W b = R a · R b.
        """
        return dense.logits(x, self._compact_static, self.architecture)

    @cached_property
    def _compact_static(self) -> StaticTensors:
        r = torch.linalg.qr(self._static.head.float(), mode="r").R
        return replace(self._static, head=r)

    def _read(self, i: int, variant: Variant) -> Callable[[], LayerTensors[Tensor]]:
        if variant is Variant.FULL:
            return partial(dense.to_float32, self._checkpoint.layer(i))
        return partial(dense.quantized_to_float32, self._require_bundle().layer(i, variant))

    def _require_bundle(self) -> Bundle:
        if self._bundle is None:
            raise ConfigError("INT4 layers need a bundle: make one with `morph quantize`")
        return self._bundle


class Run:
    """One batch of windows under a current mix; only what a change touches is computed again."""

    def __init__(self, model: Model, tokens: Tensor) -> None:
        self.tokens = tokens  # [n, length]
        self._model = model
        self._mix = mix_of((), model.num_layers)
        self._states = [model.embed(tokens)]  # entering layer i, under the current mix
        self._extend(0)

    def entering(self, layer: int) -> Tensor:
        """[n, length, hidden]; `layer` = number of layers: behind the last one."""
        return self._states[layer]

    def logits(self) -> Tensor:
        """[n, length, vocab] of the current mix."""
        return self._model.logits(self._states[-1])

    def change(self, mix: Mix) -> None:
        pairs = enumerate(zip(mix, self._mix, strict=True))
        first = next((i for i, (new, old) in pairs if new is not old), None)
        self._mix = mix
        if first is not None:
            self._extend(first)

    def behind_with(self, layer: int, variant: Variant) -> Tensor:
        """[n, length, hidden] behind the last layer with one replaced; the current mix stays."""
        x = self._model.layer(self._states[layer], layer, variant)
        for i in range(layer + 1, self._model.num_layers):
            x = self._model.layer(x, i, self._mix[i])
        return x

    def _extend(self, first: int) -> None:
        """Computes the states behind layer `first` and all later ones."""
        del self._states[first + 1 :]
        for i in range(first, self._model.num_layers):
            self._states.append(self._model.layer(self._states[i], i, self._mix[i]))


def batches(windows: Tensor) -> Iterator[Tensor]:
    """[n, length] windows in batches of about 2,048 tokens."""
    yield from torch.split(windows, _batch_windows(windows))


def num_batches(windows: Tensor) -> int:
    return math.ceil(len(windows) / _batch_windows(windows))


def _batch_windows(windows: Tensor) -> int:
    return max(1, _BATCH_TOKENS // windows.shape[1])
