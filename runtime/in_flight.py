"""Steps from their launch to their settling; of those that fail, each request's part by itself.

A step is settled once its tokens are read and noted: at once, or, where the runner overlaps, after
the next one has been launched. That one does not know then which requests have just ended; what it
computes for them is dropped.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress

from morphserve.quantize.manifest import Variant
from morphserve.runtime.messages import Step, TokenLogprobs, TokenOutput
from morphserve.runtime.monitor import Monitor
from morphserve.runtime.parts import Clock, Computed, DeviceLost, Launched, Parts, Runner, Sampled
from morphserve.runtime.request import FinishReason, Request, Status
from morphserve.runtime.scheduler import Batch

logger = logging.getLogger(__name__)


@dataclass(slots=True)  # not frozen: that takes longer, and each step makes one
class _InFlight:
    """A step that was launched and is not settled."""

    batch: Batch
    launched: Launched
    variants: tuple[Variant, ...]  # of the layers that it goes through
    precision: Variant  # the lowest of these
    started_s: float
    in_parts: bool = False  # the runner's latest launch is not the whole of it


class Steps:
    """Launches steps and settles them; at most one is in flight between two calls."""

    def __init__(self, parts: Parts, monitor: Monitor, clock: Clock) -> None:
        self._parts, self._monitor, self._clock = parts, monitor, clock
        self._in_flight: _InFlight | None = None
        self._settled_s = float("-inf")  # when the latest step was
        self._settled: Variant | None = None  # precision of the step that `take` is to tell of
        self._outputs: list[TokenOutput] = []  # not yet taken

    @property
    def is_one_in_flight(self) -> bool:
        return self._in_flight is not None

    def settle_before(self, rung: int) -> None:
        """Settles the step in flight if the next one, at this rung, has to know its tokens."""
        if self._in_flight is not None:
            if self._in_flight.in_parts or self._parts.scheduler.must_know(rung):
                self._settle()

    def go_on(self, batch: Batch, precision: Variant, started_s: float) -> None:
        """Launches a batch, if there is any, and settles the step before it or the step itself."""
        following = self._launch(batch, precision, started_s) if batch else None
        self._settle()
        if following is None:
            if self._is_at_rest:
                self._parts.runner.prepare()
            return
        self._parts.scheduler.launched(following.batch)
        self._in_flight = following
        if not self._parts.runner.overlaps:
            self._settle()

    def tell_ends(self, requests: Iterable[Request]) -> None:
        """Adds requests that ended without a token to what is to be told."""
        self._outputs += [_output(request, []) for request in requests]

    def take(self, precision: Variant) -> Step | None:
        """What is to be told since the last call; the precision stands in where no step was run."""
        settled, outputs = self._settled, self._outputs
        if settled is None and not outputs:
            return None
        self._settled, self._outputs = None, []
        return Step(settled or precision, outputs)

    @property
    def _is_at_rest(self) -> bool:
        """Whether nobody waits to be told of something, and no swap for its commit."""
        return self._settled is None and not self._outputs and not self._parts.swapper.in_flight

    def _launch(self, batch: Batch, precision: Variant, started_s: float) -> _InFlight | None:
        """Starts a step; None if no request of it can be computed."""
        runner, variants = self._parts.runner, tuple(self._parts.layers.variants)
        try:
            return _InFlight(batch, runner.launch(batch), variants, precision, started_s)
        except DeviceLost:
            raise
        except Exception as error:
            logger.exception("a step of %d requests failed; each is run alone", len(batch))
            cause = f"{type(error).__name__}: {error}"
        self._settle()
        batch = [piece for piece in batch if piece.request.status is Status.RUNNING]
        done, sampled, lost = _run_in_parts(runner, batch)
        text = f"a step failed ({cause}): {len(lost)} of {len(batch)} requests ended with an error"
        self._monitor.event("error", text, {"requests": len(batch), "lost": len(lost)})
        self.tell_ends(self._parts.scheduler.fail(lost))
        if not done:
            return None
        return _InFlight(done, Computed(sampled), variants, precision, started_s, in_parts=True)

    def _settle(self) -> None:
        """Reads the tokens of the step in flight, if there is one, and notes them."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return
        batch, sampled = step.batch, step.launched.result()
        ended_s = self._clock.now_s()
        step_s = ended_s - max(step.started_s, self._settled_s)  # the step before it came first
        if self._parts.runner.overlaps:
            batch, sampled = _still_wanted(batch, sampled)
        tokens = [got.token for got in sampled]
        told = len(tokens) - tokens.count(None)
        self._monitor.stepped(step.batch, told, step.variants, step.precision, ended_s, step_s)
        ran = self._parts.scheduler.computed(batch, tokens)
        self._outputs += [
            _output(request, new, got.logprobs)
            for (request, new), got in zip(ran, sampled, strict=True)
        ]
        self._settled, self._settled_s = step.precision, ended_s


def _still_wanted(batch: Batch, sampled: list[Sampled]) -> tuple[Batch, list[Sampled]]:
    """The slices of requests that have not ended since the launch, and what these got."""
    wanted = [piece.request.status is not Status.FINISHED for piece in batch]
    if all(wanted):
        return batch, sampled
    of_tokens = [is_wanted for is_wanted, piece in zip(wanted, batch, strict=True) if piece.samples]
    return list(compress(batch, wanted)), list(compress(sampled, of_tokens))


def _run_in_parts(runner: Runner, batch: Batch) -> tuple[Batch, list[Sampled], Batch]:
    """(the slices that could be computed, what the runner gave for them, the other slices)

    Each slice of a step that failed is run alone, so that only those at fault are lost. A step
    writes nothing but KV, the same each time.
    """
    done: Batch = []
    lost: Batch = []
    sampled: list[Sampled] = []
    for piece in batch:
        try:
            launched = runner.launch([piece])
        except DeviceLost:
            raise
        except Exception as error:
            logger.error("request %s ends with an error: %s", piece.request.id, error)
            lost.append(piece)
        else:
            sampled += launched.result()
            done.append(piece)
    return done, sampled, lost


def _output(
    request: Request, tokens: list[int], logprobs: TokenLogprobs | None = None
) -> TokenOutput:
    reason: FinishReason | None = request.finish_reason
    is_first = bool(tokens) and len(request.output) == len(tokens)
    queued_s = 0.0
    if is_first and request.scheduled_s is not None:
        queued_s = request.scheduled_s - request.arrival_s
    return TokenOutput(
        request.id,
        tokens,
        None if reason is None else reason.value,
        None if logprobs is None else [logprobs],
        cached_tokens=request.num_cached_tokens if is_first else 0,
        queued_s=queued_s,
    )
