"""Running token windows through any mix of full-precision and INT4 layers."""

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize import dense
from morphserve.quantize.bundle import Bundle
from morphserve.quantize.checkpoint import Checkpoint

_BATCH_TOKENS = 2048  # windows that run together: bounds the memory of states and logits


class Model:
    """Both variants of every layer in memory, as they are stored; float32 only while in use."""

    def __init__(self, checkpoint: Checkpoint, bundle: Bundle | None) -> None:
        self.architecture = checkpoint.architecture
        self.num_layers = checkpoint.architecture.num_layers
        self._static = checkpoint.static()
        self._full = [checkpoint.layer(i) for i in range(self.num_layers)]
        self._int4 = [bundle.layer(i) for i in range(self.num_layers)] if bundle else []

    def embed(self, tokens: Tensor) -> Tensor:
        """[n, length] token ids to [n, length, hidden]."""
        return dense.embed(self._static, tokens)

    def layer(self, x: Tensor, i: int, int4: bool) -> Tensor:
        """[n, length, hidden] through layer `i`."""
        if int4 and not self._int4:
            raise ConfigError("INT4 layers need a bundle: make one with `morph quantize`")
        weights = (
            dense.quantized_to_float32(self._int4[i]) if int4 else dense.to_float32(self._full[i])
        )
        return dense.decoder_layer(
            x, weights, self.architecture, dense.rotation(self.architecture, x.shape[1])
        )

    def logits(self, x: Tensor) -> Tensor:
        """[n, length, hidden] behind the last layer to [n, length, vocab]."""
        return dense.logits(x, self._static, self.architecture)


class Run:
    """One batch of windows under a current mix; only what a change touches is computed again."""

    def __init__(self, model: Model, tokens: Tensor) -> None:
        self.tokens = tokens  # [n, length]
        self._model = model
        self._int4: Collection[int] = frozenset()
        self._states = [model.embed(tokens)]  # entering layer i, under the current mix
        self._extend(0)

    def entering(self, layer: int) -> Tensor:
        """[n, length, hidden]; `layer` = number of layers: behind the last one."""
        return self._states[layer]

    def logits(self) -> Tensor:
        """[n, length, vocab] of the current mix."""
        return self._model.logits(self._states[-1])

    def change(self, int4: Collection[int]) -> None:
        """Makes exactly these layers INT4."""
        differing = set(int4) ^ set(self._int4)
        self._int4 = frozenset(int4)
        if differing:
            self._extend(min(differing))

    def logits_with(self, layer: int) -> Tensor:
        """Logits with one more layer at INT4; the current mix stays."""
        x = self._model.layer(self._states[layer], layer, int4=True)
        for i in range(layer + 1, self._model.num_layers):
            x = self._model.layer(x, i, i in self._int4)
        return self._model.logits(x)

    def _extend(self, first: int) -> None:
        """Computes the states behind layer `first` and all later ones."""
        del self._states[first + 1 :]
        for i in range(first, self._model.num_layers):
            self._states.append(self._model.layer(self._states[i], i, i in self._int4))


def batches(windows: Tensor) -> Iterator[Tensor]:
    """[n, length] windows in batches of about 2,048 tokens."""
    yield from torch.split(windows, _batch_windows(windows))


def num_batches(windows: Tensor) -> int:
    return math.ceil(len(windows) / _batch_windows(windows))


def _batch_windows(windows: Tensor) -> int:
    return max(1, _BATCH_TOKENS // windows.shape[1])
