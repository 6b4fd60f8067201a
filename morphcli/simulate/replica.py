"""One simulated server: an engine, the admission in front of it, and the clients it answers."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache

from morphserve.configs.schema import EngineConfig, ServerConfig
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.simulate.counted import CountedBatch
from morphserve.morphcli.simulate.engine import SimulatedEngine
from morphserve.morphcli.simulate.router import ReplicaLoad
from morphserve.morphcli.simulate.stretch import Stretch
from morphserve.morphcli.simulate.target import Target
from morphserve.morphcli.traces.arrivals import Arrival
from morphserve.runtime.messages import Step, Submit, TokenOutput
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.server.admission import QUEUED_CACHES, Admission, Ticket
from morphserve.runtime.server.errors import ApiError

MAX_QUEUED = ServerConfig("simulated").max_queued  # prompts beside those that run


class Replica:
    """Answers requests in the order of their arrival; its time goes on as it is told."""

    def __init__(
        self,
        config: EngineConfig,
        target: Target,
        timeout_s: float,
        slowdown: float = 1.0,
        on_swap: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.engine = SimulatedEngine(config, target, slowdown)
        self._timeout_s = timeout_s  # of a request
        self._stretch: Stretch | None = None  # under way
        self._on_swap = on_swap  # told the time
        self._flying: dict[str, tuple[Outcome, Ticket]] = {}
        self._deadlines: deque[tuple[float, str]] = deque()
        self._load: ReplicaLoad | None = None
        self.next_s = math.inf  # when something happens next, if no request comes before
        hello = self.engine.hello()
        self._full_blocks = hello.capacities[0]
        self._admission = Admission(
            config.scheduler.max_num_seqs + MAX_QUEUED,
            QUEUED_CACHES * hello.capacities[-1] * hello.block_tokens,
            clock=self.engine.clock.now_s,
        )

    def _changed(self) -> None:
        """Notes that what others may have seen of this replica holds no more."""
        self._load = None
        if self._stretch is not None:
            self.next_s = self._stretch.end_s(self._stretch.steps)
        else:
            self.next_s = math.inf if self.engine.is_at_rest else self.engine.clock.seconds
        if self._deadlines and self._deadlines[0][0] < self.next_s:
            self.next_s = self._deadlines[0][0]

    @property
    def is_idle(self) -> bool:
        """Whether every answer has ended and every layer is back."""
        return self.engine.is_at_rest

    def load(self) -> ReplicaLoad:
        """What a router may know."""
        if self._load is None:
            scheduler = self.engine.scheduler
            self._load = ReplicaLoad(
                running=len(scheduler.running),
                waiting=len(self._flying) - len(scheduler.running),
                used_blocks=scheduler.num_used,
                full_blocks=self._full_blocks,
                rung=self.engine.rung,
                queued_tokens=self._admission.queued_tokens,
            )
        return self._load

    def submit(self, index: int, arrival: Arrival) -> Outcome:
        """Sends a request at its time, up to which the replica has run."""
        self._cut(arrival.time_s)
        outcome = Outcome(
            index, arrival.time_s, arrival.time_s, arrival.prompt_tokens, arrival.output_tokens
        )
        self._offer(outcome, arrival)
        self._changed()
        return outcome

    def _offer(self, outcome: Outcome, arrival: Arrival) -> None:
        try:
            ticket = self._enter(arrival)
        except ApiError as error:
            outcome.status, outcome.error = error.status, "refused: the queue is full"
            return
        params = SamplingParams(arrival.output_tokens, temperature=0.0, ignore_eos=True)
        request = Submit(str(outcome.index), _prompt(arrival.prompt_tokens), params)
        if refused := self.engine.submit(request):
            self._admission.leave(ticket)
            outcome.status, outcome.error = 400, refused.message
            return
        self._flying[request.request_id] = outcome, ticket
        self._deadlines.append((arrival.time_s + self._timeout_s, request.request_id))

    def run_until(self, time_s: float) -> None:
        """All that happens before `time_s`; a step or stretch that crosses it goes on beyond."""
        while self._deadlines and self._deadlines[0][0] <= time_s:
            deadline_s, request_id = self._deadlines.popleft()
            if request_id in self._flying:
                self._run(deadline_s)
                self._give_up(request_id, deadline_s)
        self._run(time_s)
        self._changed()

    def catch_up(self, time_s: float) -> None:
        """Brings its counters to now, as far as steps have begun."""
        if self._stretch is not None:
            self._end_stretch(time_s)
            self._changed()

    def _run(self, time_s: float) -> None:
        engine = self.engine
        while True:
            if self._stretch is not None:
                if self._stretch.end_s(self._stretch.steps) > time_s:
                    return
                engine.skip(self._stretch, self._stretch.steps)
                self._stretch = None
            if engine.clock.seconds >= time_s or engine.is_at_rest:
                return
            self._stretch = engine.stretch()
            if self._stretch is None:
                self._turn()

    def _turn(self) -> None:
        engine, swaps = self.engine, self.engine.num_swaps
        match engine.turn():
            case CountedBatch(joined=joined, ended=ended):
                self._take(joined, ended)
            case Step(outputs=outputs):
                self._take_outputs(outputs)
        if engine.num_swaps != swaps:
            self._on_swap(engine.clock.seconds)

    def _take(self, joined: Sequence[Request], ended: Sequence[Request]) -> None:
        for request in joined:
            assert request.scheduled_s is not None
            self._started(request.id, request.scheduled_s - request.arrival_s)
        for request in ended:
            self._end(request.id, "length")

    def _take_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        for output in outputs:
            if output.tokens:
                self._started(output.request_id, output.queued_s)
            if output.finish_reason is not None:
                self._end(output.request_id, output.finish_reason)

    def _started(self, request_id: str, queued_s: float) -> None:
        """Notes a token, which may be the first one."""
        outcome, ticket = self._flying[request_id]
        if outcome.ttft_s is None:
            outcome.ttft_s = self.engine.clock.seconds - outcome.intended_s
            outcome.queue_s = queued_s
            self._admission.started(ticket, 0)

    def _end(self, request_id: str, reason: str) -> None:
        outcome, ticket = self._flying.pop(request_id)
        self._admission.leave(ticket)
        outcome.status, outcome.finish_reason = 200, reason
        outcome.e2e_s = self.engine.clock.seconds - outcome.intended_s
        outcome.output_tokens = outcome.max_tokens
        if reason != "length":
            outcome.error = f"ended with {reason}"

    def _give_up(self, request_id: str, now_s: float) -> None:
        """The client leaves."""
        if request_id not in self._flying:
            return
        self._cut(now_s)
        self.engine.abort(request_id)
        outcome, ticket = self._flying.pop(request_id)
        self._admission.leave(ticket)
        outcome.timed_out, outcome.error = True, f"unfinished after {self._timeout_s:g} s"

    def _cut(self, time_s: float) -> None:
        """Ends the stretch with the step that is under way, and brings an idle clock to now."""
        self._end_stretch(time_s)
        self.engine.clock.seconds = max(self.engine.clock.seconds, time_s)

    def _end_stretch(self, time_s: float) -> None:
        if self._stretch is not None:
            if steps := self._stretch.begun_before(time_s):
                self.engine.skip(self._stretch, steps)
            self._stretch = None

    def _enter(self, arrival: Arrival) -> Ticket:
        ticket = self._admission.enter()
        try:
            self._admission.queue(ticket, [arrival.prompt_tokens])
        except ApiError:
            self._admission.leave(ticket)
            raise
        return ticket


@lru_cache(maxsize=4096)
def _prompt(num_tokens: int) -> list[int]:
    return [0] * num_tokens
