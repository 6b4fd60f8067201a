"""The load generator: sends a plan open-loop from its own process and times the answers.

It runs as `python -m morphserve.morphcli.bench.client`, for one plan or a share of it. On standard
input a line `Plan`, answered by a line `Ready`, then a line `Start`; on standard output then a line
`Outcome` per request, as each ends. Requests leave at their planned times whether or not earlier
ones were answered.
"""

import asyncio
import contextlib
import hashlib
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator
from itertools import pairwise

import msgspec

from morphserve.morphcli.bench.chunks import Choice, Chunk, decode_chunk
from morphserve.morphcli.bench.dialect import Dialect
from morphserve.morphcli.bench.http import HttpError, ServerSentEvents, bearer, post_stream


class PlannedRequest(msgspec.Struct, frozen=True):
    index: int
    send_s: float  # since the start
    prompt: str | list[int]
    prompt_tokens: int
    output_tokens: int


class Plan(msgspec.Struct, frozen=True):
    """One replay against one server."""

    url: str  # http://host:port
    model: str
    timeout_s: float  # per request, from its send
    requests: list[PlannedRequest]
    api_key: str | None = None
    token_ids: bool = False  # asked for; not every server takes such a wish
    graded: bool = False  # answers may end by themselves, and their texts are kept
    dialect: Dialect = Dialect()


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The plan is read."""


class Start(msgspec.Struct, frozen=True):
    """When to begin; all processes of one plan get the same."""

    epoch_s: float  # wall clock at time 0 of the plan


class Outcome(msgspec.Struct, tag=True):
    """What became of one request; times in seconds, as said.

    Latencies count from the intended send: a request that left late is late for its user.
    """

    index: int
    intended_s: float  # since the start of the plan
    sent_s: float  # since the start of the plan
    prompt_tokens: int
    max_tokens: int
    status: int = 0  # HTTP status; 0: no answer
    error: str | None = None  # None: answered to the end
    timed_out: bool = False
    finish_reason: str | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None
    event_times_s: list[float] = []  # one per streamed piece, which may hold several tokens
    output_tokens: int = 0  # 0: the server told none, and streamed no text
    counts_pieces: bool = False  # output_tokens is of streamed pieces: there was no usage block
    tokens_full: int | None = None  # tokens per precision, where the server reports them
    tokens_int4: int | None = None
    text_sha256: str | None = None
    queue_s: float | None = None  # received to first scheduled, where the server reports it
    text: str | None = None  # where it was asked to be kept
    token_ids: list[int] | None = None  # of the output, where the server reports them
    precisions: list[tuple[str, int]] | None = None  # runs of output tokens made at a precision

    @property
    def lag_s(self) -> float:
        """How late the request was sent."""
        return self.sent_s - self.intended_s

    @property
    def gaps_s(self) -> list[float]:
        """Time between each two streamed pieces."""
        return [b - a for a, b in pairwise(self.event_times_s)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; 0 for a single token.

        None: not answered to the end, or the server told no number of tokens.
        """
        if self.ttft_s is None or self.e2e_s is None or not self.output_tokens:
            return None
        if self.output_tokens == 1:
            return 0.0
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


def request_body(plan: Plan, request: PlannedRequest) -> bytes:
    """The JSON of a completion of the planned number of tokens, or of fewer if it is graded."""
    body = plan.dialect.fields(request.prompt, request.output_tokens, exact=not plan.graded)
    body["model"] = plan.model
    if plan.token_ids:
        body["return_token_ids"] = True
    return msgspec.json.encode(body)


async def replay(plan: Plan, started_s: float) -> AsyncIterator[Outcome]:
    """Outcomes in the order in which requests end; `started_s` is on the monotonic clock."""
    bodies = [request_body(plan, request) for request in plan.requests]
    tasks = [
        asyncio.create_task(_one(plan, request, body, started_s))
        for request, body in zip(plan.requests, bodies, strict=True)
    ]
    for done in asyncio.as_completed(tasks):
        yield await done


async def _one(plan: Plan, request: PlannedRequest, body: bytes, started_s: float) -> Outcome:
    due = started_s + request.send_s
    await asyncio.sleep(due - time.monotonic())
    sent = time.monotonic()
    outcome = Outcome(
        request.index,
        request.send_s,
        sent - started_s,
        request.prompt_tokens,
        request.output_tokens,
    )
    try:
        async with asyncio.timeout(plan.timeout_s):
            await _stream(plan, body, due, outcome)
    except TimeoutError:
        outcome.timed_out = True
        outcome.error = f"unfinished after {plan.timeout_s:g} s"
    except (OSError, HttpError, msgspec.MsgspecError) as error:
        outcome.error = str(error) or type(error).__name__
    return outcome


async def _stream(plan: Plan, body: bytes, due: float, outcome: Outcome) -> None:
    text = hashlib.sha256()
    ended = False
    outcome.text = "" if plan.graded else None
    route = plan.dialect.route
    async with post_stream(plan.url, route, body, bearer(plan.api_key)) as answer:
        outcome.status = answer.status
        if answer.status != 200:
            raise HttpError(f"refused with {answer.status}: {(await answer.read())[:200]!r}")
        async for data in ServerSentEvents(answer):
            if ended := data == b"[DONE]":
                break
            _take(decode_chunk(data), time.monotonic() - due, text, outcome)
        # Some servers end without this word.
        ended = ended or (answer.is_complete and outcome.finish_reason is not None)
    if not ended:
        raise HttpError("the connection ended before the answer did")
    if outcome.ttft_s is None:
        raise HttpError("the answer held no token")
    outcome.e2e_s = outcome.event_times_s[-1]
    outcome.text_sha256 = text.hexdigest()[:16]


def _take(chunk: Chunk, at_s: float, text: "hashlib._Hash", outcome: Outcome) -> None:
    if chunk.error is not None:
        raise HttpError(f"error while streaming: {bytes(chunk.error)[:200]!r}")
    for choice in chunk.choices:
        # A token may have no text, as half a character.
        if choice.piece or choice.token_ids or choice.finish_reason:
            outcome.ttft_s = at_s if outcome.ttft_s is None else outcome.ttft_s
            outcome.event_times_s.append(at_s)
            text.update(choice.piece.encode())
            outcome.output_tokens += bool(choice.piece)
            outcome.counts_pieces = True  # until a usage block tells better
            _keep(choice, outcome)
        outcome.finish_reason = choice.finish_reason or outcome.finish_reason
    if chunk.usage is not None:
        outcome.output_tokens, outcome.counts_pieces = chunk.usage.completion_tokens, False
        if (morph := chunk.usage.morph) is not None:
            outcome.tokens_full, outcome.tokens_int4 = morph.full, morph.int4
            outcome.queue_s = morph.queue_s


def _keep(choice: Choice, outcome: Outcome) -> None:
    if outcome.text is not None:
        outcome.text += choice.piece
    if choice.token_ids is not None:
        outcome.token_ids = outcome.token_ids or []
        outcome.token_ids += choice.token_ids
    for precision, count in choice.token_precisions or ():
        runs = outcome.precisions = outcome.precisions or []
        before = runs.pop()[1] if runs and runs[-1][0] == precision else 0
        runs.append((precision, before + count))


async def _main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    _emit(Ready())
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    started_s = time.monotonic() + start.epoch_s - time.time()
    async for outcome in replay(plan, started_s):
        _emit(outcome)


def _emit(message: Ready | Outcome) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def _allow_many_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # refused: the system's own limit is lower
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    _allow_many_connections()
    try:
        asyncio.run(_main())
    except BrokenPipeError:  # the parent is gone: nobody wants the rest
        os._exit(1)
