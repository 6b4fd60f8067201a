"""How a server would fare under a schedule, from measured costs; nothing is computed or served."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from morphserve.configs.schema import SchedulerConfig
from morphserve.morphcli.traces.schedule import Schedule
from morphserve.quantize.manifest import Variant
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.costs import CostModel
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Server:
    """A server that holds its layers and its KV cache as they are."""

    costs: CostModel
    variants: Sequence[Variant]  # of each layer
    num_blocks: int
    block_tokens: int
    max_model_len: int
    limits: SchedulerConfig
    slowdown: float = 1.0  # of steps, by what else runs on the machine


def first_tokens(server: Server, schedule: Schedule, patience_s: float) -> list[float]:
    """Seconds to the first token of each request that has one, in order of arrival.

    The scheduler is the one that serves; only the clock is a model. Ends early once a request has
    waited for `patience_s`: those without a first token are missing then.
    """
    pool = BlockPool(range(server.num_blocks))
    scheduler = Scheduler(
        server.limits, pool, server.block_tokens, server.max_model_len, eos_token_ids=()
    )
    coming = deque(_requests(schedule))
    found: dict[str, float] = {}
    now_s = 0.0
    while coming or scheduler.running or scheduler.waiting:
        while coming and coming[0].arrival_s <= now_s:
            scheduler.add(coming.popleft())
        batch = scheduler.schedule()
        if not batch:
            if not coming:
                break
            now_s = coming[0].arrival_s
            continue
        spans = [(piece.start, piece.end) for piece in batch]
        now_s += server.slowdown * server.costs.step_seconds(server.variants, spans)
        for request, _ in scheduler.update(batch, [0] * sum(piece.samples for piece in batch)):
            found.setdefault(request.id, now_s - request.arrival_s)
        if scheduler.waiting and now_s - scheduler.waiting[0].arrival_s > patience_s:
            break
    return list(found.values())


def _requests(schedule: Schedule) -> list[Request]:
    """Requests as long as those of the schedule; no two begin alike."""
    return [
        Request(
            id=str(i),
            prompt=[i] * arrival.prompt_tokens,
            params=SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True),
            arrival_s=arrival.time_s,
        )
        for i, arrival in enumerate(schedule.arrivals)
    ]
