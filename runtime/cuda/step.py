"""The parts of one step on the device, from token ids to logits, over tensors that never move."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from morphserve.runtime.cuda.inputs import Inputs
from morphserve.runtime.kernels import AttentionShape, BatchMeta, FullLinear, LayerWeights
from morphserve.runtime.memory import align
from morphserve.runtime.model import Model

Plan = Any  # what the kernels at hand make of it


class StepKernels(Protocol):
    """A forward pass in pieces. Nothing waits for the device.

    delta and residual: [M, hidden]; what the next layer adds to the residual first, and that.
    Tokens of page -1 write nothing, sequences of context 0 read nothing.
    """

    def plan(self, meta: BatchMeta, shape: AttentionShape) -> Plan:
        """How attention is split up, the same in all layers of a step."""

    def enter(self, tokens: Tensor, embedding: FullLinear) -> tuple[Tensor, Tensor]:
        """(delta, residual) that the first layer begins with."""

    def layer(
        self,
        delta: Tensor,
        residual: Tensor,
        layer: LayerWeights,
        cache: Tensor,
        meta: BatchMeta,
        plan: Plan,
        shape: AttentionShape,
        cos_sin: Tensor,
    ) -> None:
        """One layer, in place."""

    def leave(
        self,
        delta: Tensor,
        residual: Tensor,
        rows: Tensor,
        norm: Tensor,
        eps: float,
        head: FullLinear,
    ) -> Tensor:
        """Logits [len(rows), vocab] of the batch rows asked for, int32."""


class ModelStep:
    """A step of the loaded model: as a whole, or in pieces that hand over in tensors of its own."""

    def __init__(self, kernels: StepKernels, model: Model, inputs: Inputs, max_seqs: int) -> None:
        self._kernels, self._model, self._inputs = kernels, model, inputs
        # Of the right dtypes, whatever those are.
        self._delta, self._residual = kernels.enter(inputs.tokens[:max_seqs], self._embedding)
        vocab = model.static.head.num_outputs
        # Rows 16 numbers apart or a multiple of that, whatever the vocabulary: for wide loads.
        self.logits = self._delta.new_empty(max_seqs, align(vocab, 16))[:, :vocab]

    @property
    def active(self) -> Sequence[LayerWeights]:
        """The weights of each layer, as the next step computes."""
        return self._model.layers

    @property
    def _embedding(self) -> FullLinear:
        return self._model.static.embedding

    def whole(
        self, layers: Sequence[LayerWeights], num_tokens: int, num_seqs: int, num_rows: int
    ) -> None:
        """Logits of the rows asked for, from the inputs."""
        meta = self._inputs.meta(num_tokens, num_seqs)
        plan = self._kernels.plan(meta, self._model.shape)
        delta, residual = self._kernels.enter(self._inputs.tokens[:num_tokens], self._embedding)
        for i, weights in enumerate(layers):
            self._layer(i, weights, delta, residual, meta, plan)
        if num_rows:
            self._leave(delta, residual, num_rows)

    def enter(self, size: int) -> Plan:
        """The first piece of a step of `size` sequences with one token each; its plan."""
        plan = self._kernels.plan(self._inputs.meta(size, size), self._model.shape)
        delta, residual = self._kernels.enter(self._inputs.tokens[:size], self._embedding)
        put(delta, self._delta[:size])
        put(residual, self._residual[:size])
        return plan

    def layer(self, i: int, weights: LayerWeights, size: int, plan: Plan) -> None:
        """Layer `i` of such a step with these weights and this plan."""
        meta = self._inputs.meta(size, size)
        self._layer(i, weights, self._delta[:size], self._residual[:size], meta, plan)

    def leave(self, size: int) -> None:
        """The last piece: logits of every row asked for, and of row 0 in place of padding."""
        self._leave(self._delta[:size], self._residual[:size], size)

    def _layer(
        self,
        i: int,
        weights: LayerWeights,
        delta: Tensor,
        residual: Tensor,
        meta: BatchMeta,
        plan: Plan,
    ) -> None:
        model = self._model
        self._kernels.layer(
            *(delta, residual, weights, model.caches[i], meta, plan, model.shape, model.cos_sin)
        )

    def _leave(self, delta: Tensor, residual: Tensor, num_rows: int) -> None:
        static, eps = self._model.static, self._model.shape.norm_eps
        rows = self._inputs.rows[:num_rows]
        logits = self._kernels.leave(delta, residual, rows, static.norm, eps, static.head)
        put(logits, self.logits[:num_rows])


def put(values: Tensor, into: Tensor) -> None:
    """Copies by a kernel: a plain copy may go to the engine that is busy with a layer's bytes."""
    torch.mul(values, 1, out=into)
