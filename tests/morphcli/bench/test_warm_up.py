"""The form of request that a server takes, against servers that take less than ours."""

import pytest
from fake_server import fake_server

from morphserve.morphcli.bench.client import Outcome, Plan, PlannedRequest
from morphserve.morphcli.bench.dialect import Dialect
from morphserve.morphcli.bench.prompts import Prompts
from morphserve.morphcli.bench.replay import ReplayFailed, replay
from morphserve.morphcli.bench.warm_up import notes, warm_up

LONG = "long, as long as a prompt of this plan is"


class Decoder:
    """A tokenizer that reads ids as a text of their numbers."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def plan(url: str, *prompts: str | list[int]) -> Plan:
    requests = [PlannedRequest(i, 0.0, p, len(p), 5) for i, p in enumerate(prompts)]
    return Plan(url, "fake", 20.0, requests)


def prompts_of(plan_: Plan) -> Prompts:
    return Prompts(tuple(r.prompt for r in plan_.requests), "short", Decoder())  # type: ignore[arg-type]


def warmed(plan_: Plan) -> Plan:
    return warm_up(plan_, prompts_of(plan_))


def outcomes_of(plan_: Plan) -> list[Outcome]:
    return replay(plan_, lambda _: None)[1]


def test_a_server_that_knows_every_field_is_asked_for_everything() -> None:
    with fake_server() as (url, _):
        warm = warmed(plan(url, "plain"))
        assert warm.dialect == Dialect()
        assert list(notes(warm, outcomes_of(warm))) == []


def test_fields_that_are_refused_are_left_out_and_told() -> None:
    with fake_server() as (url, server):
        server.unknown_fields = {"ignore_eos", "min_tokens"}
        warm = warmed(plan(url, "plain"))
        (outcome,) = outcomes_of(warm)
        assert list(notes(warm, [outcome])) == [
            "output lengths are not forced: the server refuses ignore_eos and min_tokens"
        ]
    assert warm.dialect == Dialect(forces_length=False)
    assert outcome.error is None and "stream_options" in server.bodies[-1]


def test_without_a_usage_block_pieces_are_counted_and_told() -> None:
    with fake_server() as (url, server):
        server.unknown_fields = {"ignore_eos", "stream_options"}
        server.sends_usage = False
        warm = warmed(plan(url, "plain"))
        (outcome,) = outcomes_of(warm)
        assert list(notes(warm, [outcome]))[-1] == (
            "streamed pieces are counted as tokens: the server sends no usage"
        )
    assert warm.dialect == Dialect(forces_length=False, asks_usage=False)
    assert (outcome.output_tokens, outcome.counts_pieces) == (3, True)


def test_a_server_of_chats_alone_is_sent_messages() -> None:
    with fake_server() as (url, server):
        server.routes = {"/v1/chat/completions"}
        warm = warmed(plan(url, "plain"))
        (outcome,) = outcomes_of(warm)
        assert list(notes(warm, [outcome])) == [
            "prompts are longer than planned: as chats, they have a template around them"
        ]
    assert warm.dialect == Dialect(is_chat=True)
    assert (outcome.error, outcome.output_tokens, outcome.counts_pieces) == (None, 5, False)
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "plain"}]
    assert "prompt" not in server.bodies[-1]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_prompts_of_ids_are_sent_as_text_where_ids_are_refused(route: str) -> None:
    with fake_server() as (url, server):
        server.routes, server.takes_ids = {route}, False
        warm = warmed(plan(url, "plain", [7, 8, 9]))
        assert "all prompts are sent as text" in " ".join(notes(warm, []))
    assert [request.prompt for request in warm.requests] == ["plain", "7 8 9"]


def test_ids_stay_ids_where_they_are_taken() -> None:
    with fake_server() as (url, _):
        assert warmed(plan(url, [7, 8, 9])).requests[0].prompt == [7, 8, 9]


def test_a_server_is_warm_from_a_long_prompt_that_is_none_of_the_plan() -> None:
    with fake_server() as (url, server):
        warmed(plan(url, "plain", LONG))
    asked = [body["prompt"] for body in server.bodies]
    assert asked.count("short") == 5 and asked[0] == "short"
    (long,) = set(asked) - {"short"}
    assert LONG.endswith(long) and not LONG.startswith(long)


def test_a_server_that_takes_no_form_is_reported_with_its_reason() -> None:
    with fake_server() as (url, server):
        server.routes, server.unknown_fields = {"/v1/chat/completions"}, {"temperature"}
        with pytest.raises(ReplayFailed, match="Unexpected fields in the request"):
            warmed(plan(url, "plain"))
