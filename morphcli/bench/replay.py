"""The load of a plan, sent from as many processes as it needs, which begin together."""

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import msgspec

from morphserve.configs.errors import MorphError
from morphserve.morphcli.bench.client import Outcome, Plan, PlannedRequest, Ready, Start

_LEAD_S = 0.3  # from the start of all processes to the first possible send
_WINDOW_S = 5  # over which the peak of a plan is averaged
_TOKENS_PER_S = 2000  # that one process reads without lagging, if each is a piece of its own
_MOST_PROCESSES = 8


class ReplayFailed(MorphError):
    """The load generator died, or not even the first request was answered."""


def num_processes(requests: Sequence[PlannedRequest], num_cores: int) -> int:
    """Processes that the peak of `requests` needs; at most half of the cores, or one."""
    tokens: Counter[int] = Counter()
    for request in requests:
        tokens[int(request.send_s // _WINDOW_S)] += request.output_tokens
    peak_per_s = max(tokens.values(), default=0) / _WINDOW_S
    needed = 1 + int(peak_per_s // _TOKENS_PER_S)
    return max(1, min(needed, num_cores // 2, len(requests), _MOST_PROCESSES))


def replay(
    plan: Plan, on_outcome: Callable[[Outcome], None], processes: int = 1
) -> tuple[float, list[Outcome]]:
    """Send `plan` from processes of its own; `on_outcome` is called as each request ends.

    Returns the wall clock at time 0 of the plan, and the outcomes in its order.
    """
    clients: list[subprocess.Popen[bytes]] = []
    try:
        clients += [_client() for _ in range(processes)]
        for i, client in enumerate(clients):
            _send(client, msgspec.structs.replace(plan, requests=plan.requests[i::processes]))
        messages = _messages(clients)
        for _ in clients:
            assert isinstance(next(messages), Ready)
        start = Start(time.time() + _LEAD_S)
        for client in clients:
            _send(client, start)
        outcomes = []
        for _ in plan.requests:
            outcome = next(messages)
            assert isinstance(outcome, Outcome)
            outcomes.append(outcome)
            on_outcome(outcome)
    finally:
        for client in clients:
            _stop(client)
    return start.epoch_s, sorted(outcomes, key=lambda outcome: outcome.index)


def _client() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "morphserve.morphcli.bench.client"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _send(client: subprocess.Popen[bytes], message: Plan | Start) -> None:
    assert client.stdin is not None
    try:
        client.stdin.write(msgspec.json.encode(message) + b"\n")
        client.stdin.flush()
    except BrokenPipeError as error:
        raise _died([client]) from error


def _messages(clients: Sequence[subprocess.Popen[bytes]]) -> Iterator[Ready | Outcome]:
    """What all `clients` write, as it comes; raises ReplayFailed when all of them have ended."""
    rests: dict[int, bytes] = defaultdict(bytes)
    with selectors.DefaultSelector() as open_pipes:
        for client in clients:
            assert client.stdout is not None
            open_pipes.register(client.stdout, selectors.EVENT_READ)
        while open_pipes.get_map():
            for key, _ in open_pipes.select():
                data = os.read(key.fd, 64 * 1024)
                if not data:
                    open_pipes.unregister(key.fileobj)
                *lines, rests[key.fd] = (rests[key.fd] + data).split(b"\n")
                for line in lines:
                    yield msgspec.json.decode(line, type=Ready | Outcome)
    raise _died(clients)


def _died(clients: Sequence[subprocess.Popen[bytes]]) -> ReplayFailed:
    codes = {client.wait() for client in clients} - {0}
    return ReplayFailed(f"the load generator ended early (exit code {max(codes, default=0)})")


def _stop(client: subprocess.Popen[bytes]) -> None:
    client.kill()
    client.wait()
    for pipe in (client.stdin, client.stdout):
        with contextlib.suppress(BrokenPipeError):  # what was not sent, nobody reads
            assert pipe is not None
            pipe.close()
