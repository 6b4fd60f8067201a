"""The load generator against a server that answers, refuses, hangs up and sleeps."""

import socket

import msgspec
from fake_server import fake_server

from morphserve.morphcli.bench.client import Outcome, Plan, PlannedRequest
from morphserve.morphcli.bench.replay import replay


def plan(url: str, prompts: list[str], *, gap_s: float = 0.0, timeout_s: float = 20.0) -> Plan:
    requests = [PlannedRequest(i, i * gap_s, p, 4, 5) for i, p in enumerate(prompts)]
    return Plan(url, "fake", timeout_s, requests)


def outcomes_of(plan_: Plan) -> list[Outcome]:
    return replay(plan_, lambda _: None)[1]


def test_an_answer_is_recorded_with_its_tokens_and_precisions() -> None:
    with fake_server() as (url, server):
        (outcome,) = outcomes_of(plan(url, ["plain text"]))
    assert (outcome.status, outcome.error, outcome.finish_reason) == (200, None, "length")
    assert (outcome.output_tokens, outcome.tokens_full, outcome.tokens_int4) == (5, 4, 1)
    assert (outcome.queue_s, outcome.counts_pieces) == (0.25, False)
    assert len(outcome.event_times_s) == 3  # pieces of two, two and one token
    assert outcome.ttft_s == outcome.event_times_s[0]
    assert outcome.e2e_s == outcome.event_times_s[-1]
    assert outcome.ttft_s >= outcome.lag_s  # it counts from when the request was due
    assert outcome.tpot_s == (outcome.e2e_s - outcome.ttft_s) / 4
    body = server.bodies[0]
    assert body["ignore_eos"] and body["stream_options"] == {"include_usage": True}
    assert (body["min_tokens"], body["max_tokens"], body["temperature"]) == (5, 5, 0)


def test_ids_and_precisions_are_kept_where_the_server_is_asked_for_them() -> None:
    with fake_server() as (url, server):
        (outcome,) = outcomes_of(msgspec.structs.replace(plan(url, ["plain"]), token_ids=True))
        (unasked,) = outcomes_of(plan(url, ["plain"]))
    assert outcome.token_ids == [0, 1, 2, 3, 4]
    assert outcome.precisions == [("full", 4), ("int4", 1)]  # neighbouring runs are one
    assert unasked.token_ids is unasked.precisions is unasked.text is None
    assert [body.get("return_token_ids") for body in server.bodies] == [True, None]


def test_an_answer_to_be_graded_may_end_by_itself_and_is_kept() -> None:
    with fake_server() as (url, server):
        (outcome,) = outcomes_of(msgspec.structs.replace(plan(url, ["plain"]), graded=True))
    assert outcome.text == "ab" * 5
    assert server.bodies[0]["max_tokens"] == 5
    assert not server.bodies[0].keys() & {"ignore_eos", "min_tokens"}


def test_equal_answers_have_equal_hashes() -> None:
    with fake_server() as (url, _):
        first, second = outcomes_of(plan(url, ["plain", "slow"]))
    assert first.text_sha256 == second.text_sha256 is not None


def test_a_slow_first_token_holds_nobody_up() -> None:
    with fake_server() as (url, server):
        slow, quick = outcomes_of(plan(url, ["slow", "plain"], gap_s=0.1))
    assert slow.ttft_s is not None and slow.ttft_s >= 0.5
    assert [body["prompt"] for body in server.bodies] == ["slow", "plain"]
    assert quick.error is None
    assert (slow.intended_s, quick.intended_s) == (0.0, 0.1)
    assert slow.lag_s >= 0 and quick.lag_s >= 0


def test_a_refusal_is_an_outcome_with_its_status() -> None:
    with fake_server() as (url, _):
        (outcome,) = outcomes_of(plan(url, ["refuse"]))
    assert outcome.status == 503
    assert outcome.ttft_s is None and outcome.e2e_s is None
    assert outcome.error is not None and "the queue is full" in outcome.error


def test_a_dropped_connection_is_a_failure_even_after_tokens() -> None:
    with fake_server() as (url, _):
        (outcome,) = outcomes_of(plan(url, ["drop"]))
    assert outcome.error == "the connection ended before the answer did"
    assert outcome.ttft_s is not None and outcome.e2e_s is None


def test_an_answer_with_a_reason_needs_no_last_word() -> None:
    with fake_server() as (url, server):
        server.ends_with_done = False
        (outcome,) = outcomes_of(plan(url, ["plain"]))
    assert (outcome.error, outcome.finish_reason) == (None, "length")


def test_a_stuck_request_ends_at_its_timeout() -> None:
    with fake_server() as (url, _):
        (outcome,) = outcomes_of(plan(url, ["stuck"], timeout_s=0.3))
    assert outcome.timed_out and outcome.error == "unfinished after 0.3 s"


def test_no_server_is_an_outcome_too() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but not listening: connections are refused
        (outcome,) = outcomes_of(plan(f"http://127.0.0.1:{unused.getsockname()[1]}", ["plain"]))
    assert outcome.status == 0 and outcome.error is not None and not outcome.timed_out
