"""Starts one step after the other on the GPU; what they chose is read one step late."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from morphserve.runtime.cuda.gpu import Gpu, Mark
from morphserve.runtime.cuda.graphs import StepGraphs, Tally
from morphserve.runtime.cuda.inputs import Inputs, Limits
from morphserve.runtime.cuda.kinds import one_of_each
from morphserve.runtime.cuda.step import ModelStep, StepKernels
from morphserve.runtime.kernels import LayerWeights
from morphserve.runtime.model import Model
from morphserve.runtime.parts import DeviceLost, Sampled
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.scheduler import Batch, Slice

logger = logging.getLogger(__name__)

_WAYS_TO_SAMPLE = (
    SamplingParams(1, temperature=0.0),
    SamplingParams(1),
    SamplingParams(1, top_p=0.9, top_k=40),
    SamplingParams(1, temperature=0.0, logprobs=5),
    SamplingParams(1, temperature=0.0, presence_penalty=0.1),  # from here on in float32
    SamplingParams(1, presence_penalty=0.1),
    SamplingParams(1, top_p=0.9, top_k=40, presence_penalty=0.1),
)


class Drawn(Protocol):
    """What a sampler was asked for."""

    @property
    def tokens(self) -> Tensor:
        """int32 on the device, of each row; -1 where the row is not finite."""

    def result(self) -> list[Sampled]:
        """The same on the host, once it is there."""


class Sampler(Protocol):
    def launch(self, logits: Tensor, requests: Sequence[Request]) -> Drawn:
        """Draws the next token of each request from its row of logits, overwriting them."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that the device is at."""

    drawn: Drawn | None  # None: nothing is sampled
    end: Mark

    def result(self) -> list[Sampled]:
        """Waits for the step: what each sampling slice got, in batch order."""
        if self.drawn is not None:
            return self.drawn.result()
        self.end.synchronize()
        return []


class CudaRunner:
    """Everything is asked of the compute stream, in order; the host waits in `result` alone."""

    overlaps = True  # `launch` returns before the step has been computed

    def __init__(
        self, gpu: Gpu, kernels: StepKernels, model: Model, sampler: Sampler, limits: Limits
    ) -> None:
        self._limits, self._block_tokens = limits, model.shape.block_tokens
        self._longest = min(limits.max_tokens, len(model.cos_sin))  # tokens of a prompt at once
        self._gpu, self._sampler = gpu, sampler
        self._inputs = Inputs(gpu, limits, self._block_tokens)
        self._step = ModelStep(kernels, model, self._inputs, limits.max_seqs)
        self._graphs = StepGraphs(gpu, self._step, self._inputs.blank, limits.max_seqs)
        self._rows: dict[Request, int] = {}  # whose token the latest step chose, and where it lies

    @property
    def tally(self) -> Tally:
        """What was captured, and how steps were run."""
        return self._graphs.tally

    def launch(self, batch: Batch) -> Launched:
        """Starts one forward pass. The result of the last but one must have been read."""
        try:
            return self._launch(batch)
        except Exception as error:
            if self._gpu.is_lost():
                raise DeviceLost(f"{type(error).__name__}: {error}") from error
            raise

    def prepare(self) -> bool:
        """Does some work that spares later steps time; False if there is none. 20 to 40 ms."""
        return self._graphs.capture_wanted()

    def warm_up(
        self,
        views: Sequence[Sequence[LayerWeights]],
        stage: Callable[[LayerWeights], LayerWeights],
    ) -> None:
        """Compiles what steps may need, and captures decode steps.

        views: of each layer, the weights in each variant that it may come to have.
        stage: puts the content of such weights somewhere, until it is called again.
        """
        began = time.monotonic()
        self._compile(None)
        for weights in one_of_each(views, but=self._step.active):
            staged = stage(weights)
            self._compile([staged])
            self._graphs.rehearse(staged)
        self._compile_sampling()
        logger.info("kernels compiled in %.1f s", time.monotonic() - began)
        self._graphs.capture_first()
        self._graphs.capture_pieces(views)
        tally = self.tally
        captured, mib = tally.whole + tally.pieces, tally.num_bytes / 2**20
        logger.info("captured %d graphs in %.1f s, %.0f MiB", captured, tally.seconds, mib)

    def rehearse(self, num_tokens: int, layers: Sequence[LayerWeights] | None = None) -> None:
        """Runs a step of so many tokens through these layers that leaves nothing behind.

        All but one of the tokens are a prompt, and that is another sequence if there may be two.
        layers: None for all of the model.
        """
        is_alone = num_tokens == 1 or self._limits.max_seqs == 1
        counts = [num_tokens] if is_alone else [num_tokens - 1, 1]
        batch = [self._made_up(count) for count in counts]
        self._inputs.load(batch, {}, len(batch))
        self._inputs.meta(num_tokens, len(batch)).token_page.fill_(-1)
        self._step.whole(layers or self._step.active, num_tokens, len(batch), len(batch))

    def _compile(self, layers: Sequence[LayerWeights] | None) -> None:
        for num_tokens in _prompt_lengths(self._longest):
            self.rehearse(num_tokens, layers)

    def _compile_sampling(self) -> None:
        logits = self._step.logits.zero_()
        for params in _WAYS_TO_SAMPLE:
            for count in {1, self._limits.max_seqs}:
                requests = [Request("", [0], params, 0.0) for _ in range(count)]
                self._sampler.launch(logits[:count], requests).result()

    def _made_up(self, num_tokens: int) -> Slice:
        blocks = [0] * -(-num_tokens // self._block_tokens)
        request = Request("", [0] * num_tokens, SamplingParams(1), 0.0, blocks=blocks)
        return Slice(request, 0, num_tokens)

    def _launch(self, batch: Batch) -> Launched:
        graphs = self._graphs.find(len(batch)) if _is_decode(batch) else None
        if graphs is not None:
            packed = self._inputs.load(batch, self._rows, graphs.size)
            graphs.run()
        else:
            packed = self._inputs.load(batch, self._rows, len(batch))
            self._step.whole(self._step.active, packed.num_tokens, packed.num_seqs, packed.num_rows)
        self._graphs.count("eager" if graphs is None else graphs.how)
        return self._choose([piece.request for piece in batch if piece.samples])

    def _choose(self, requests: Sequence[Request]) -> Launched:
        """Has the next tokens drawn from the logits, and keeps them for the next step."""
        drawn = None
        if requests:
            drawn = self._sampler.launch(self._step.logits[: len(requests)], requests)
            # A row that is not finite has token -1: its request ends, but not before another step.
            torch.clamp(drawn.tokens, min=0, out=self._inputs.chosen[: len(requests)])
        self._rows = {request: row for row, request in enumerate(requests)}
        return Launched(drawn, self._gpu.mark())


def _is_decode(batch: Batch) -> bool:
    return all(piece.end - piece.start == 1 for piece in batch)


def _prompt_lengths(longest: int) -> list[int]:
    """Lengths whose kernels are compiled at the start: powers of two, and one more than each."""
    powers = [2**i for i in range(1, longest.bit_length())]
    return sorted({*powers, *(power + 1 for power in powers if power < longest), longest})
