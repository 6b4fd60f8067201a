"""Where routers send requests."""

from collections import Counter

import pytest

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.simulate.router import ROUTERS, ReplicaLoad, make_router


def idle(**changes: int) -> ReplicaLoad:
    return ReplicaLoad(
        **{"running": 0, "waiting": 0, "used_blocks": 0, "full_blocks": 100} | changes
    )


def test_round_robin_gives_each_its_turn() -> None:
    router = make_router("round-robin")
    assert [router.choose([idle()] * 3, 100) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_round_robin_goes_on_when_a_replica_is_gone() -> None:
    router = make_router("round-robin")
    assert [router.choose([idle()] * 3, 100) for _ in range(3)] == [0, 1, 2]
    assert [router.choose([idle()] * 2, 100) for _ in range(3)] == [1, 0, 1]


def test_least_loaded_counts_running_and_waiting() -> None:
    replicas = [idle(running=3), idle(running=1, waiting=1), idle(waiting=3)]
    assert make_router("least-loaded").choose(replicas, 100) == 1


def test_least_loaded_prefers_the_shorter_queue_among_equals() -> None:
    replicas = [idle(waiting=1, queued_tokens=900), idle(waiting=1, queued_tokens=20)]
    assert make_router("least-loaded").choose(replicas, 100) == 1


def test_pressure_is_judged_by_what_full_precision_holds() -> None:
    """The larger replica is less pressed, though it holds more."""
    replicas = [idle(used_blocks=60), idle(used_blocks=80, full_blocks=200)]
    assert make_router("pressure-aware").choose(replicas, 16) == 1


def test_a_large_request_goes_where_it_takes_the_least_share() -> None:
    replicas = [idle(used_blocks=10), idle(used_blocks=60, full_blocks=400)]
    assert make_router("pressure-aware").choose(replicas, 16) == 0
    assert make_router("pressure-aware").choose(replicas, 1600) == 1


def test_what_waits_presses_more_than_what_runs() -> None:
    replicas = [idle(used_blocks=20), idle(waiting=1, queued_tokens=20 * 16)]
    assert make_router("pressure-aware").choose(replicas, 16) == 0


def test_requests_are_spread_before_a_morphed_replica_gets_more() -> None:
    replicas = [idle(used_blocks=50, rung=8), idle(used_blocks=60)]
    assert make_router("pressure-aware").choose(replicas, 16) == 1


def test_a_morphed_replica_is_used_once_the_others_are_fuller() -> None:
    replicas = [idle(used_blocks=50, rung=8), idle(used_blocks=90)]
    assert make_router("pressure-aware").choose(replicas, 16) == 0


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_fills_equal_replicas_evenly(name: str) -> None:
    router, counts = make_router(name), Counter[int]()
    for _ in range(40):
        held = [counts[i] for i in range(4)]
        replicas = [idle(running=n, used_blocks=4 * n) for n in held]
        counts[router.choose(replicas, 64)] += 1
    assert set(counts.values()) == {10}


def test_an_unknown_router_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="round-robin, least-loaded, pressure-aware"):
        make_router("random")
