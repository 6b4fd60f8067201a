"""A bundle with INT8 is served along a ladder through INT8 to INT4."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, Policy, SchedulerConfig
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import Bundle, open_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Ladder as MeasuredLadder
from morphserve.quantize.manifest import LayerScores, RankedOrder, Ranking, Rung, Variant
from morphserve.quantize.manifest import TextSample as Sample
from morphserve.runtime.build import build_engine
from morphserve.runtime.loader import served_ladder
from morphserve.runtime.messages import Submit
from morphserve.runtime.request import SamplingParams

FULL, INT8, INT4 = Variant.FULL, Variant.INT8, Variant.INT4
LAYERS = list(range(12))
SAMPLE = Sample("text", "", 1, 1, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8-bundle")
    build_bundle(open_checkpoint("demo"), folder, QuantizeSettings("rtn", 64, int8=True))
    return folder


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return open_bundle(str(folder), open_checkpoint("demo"))


def config(folder: Path, policy: Policy, order: str = "bundle") -> EngineConfig:
    return EngineConfig(
        model="demo",
        bundle=str(folder),
        policy=policy,
        dtype="bfloat16",
        order=order,
        cache=CacheConfig(memory_budget=26 * 2**20),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256, max_model_len=256),
    )


def ranked(bundle: Bundle, rungs: list[Rung]) -> Bundle:
    order = RankedOrder("back-to-front", LAYERS[::-1], [], [], [], [])
    costs = [0.0] * len(rungs)
    ranking = Ranking(
        calibration=SAMPLE,
        selection=SAMPLE,
        evaluation=SAMPLE,
        replaced=[],
        layers=[LayerScores({}, {})] * 12,
        orders=[order],
        chosen=order.name,
        ladder=MeasuredLadder("measured", rungs, [0] * len(rungs), costs),
    )
    return bundle.with_ranking(ranking)


def both(layers: list[int]) -> list[Rung]:
    return [Rung(layer, variant) for variant in (INT8, INT4) for layer in layers]


def test_without_a_profile_every_layer_goes_to_int8_before_one_goes_to_int4(
    folder: Path, bundle: Bundle
) -> None:
    ladder = served_ladder(config(folder, load_policy("balanced")), 12, bundle)
    assert list(ladder.steps) == both(LAYERS)


def test_the_profiles_ladder_is_served_unless_an_order_is_given_by_name(
    folder: Path, tmp_path: Path
) -> None:
    measured = [Rung(i, variant) for i in reversed(LAYERS) for variant in (INT8, INT4)]
    copy = shutil.copytree(folder, tmp_path / "ranked")
    bundle = ranked(open_bundle(str(copy), open_checkpoint("demo")), measured)
    policy = load_policy("balanced")
    assert list(served_ladder(config(folder, policy), 12, bundle).steps) == measured
    by_name = served_ladder(config(folder, policy, "front-to-back"), 12, bundle)
    assert list(by_name.steps) == both(LAYERS)


@pytest.mark.parametrize("policy", ["static:5", "off"])
def test_policies_that_never_swap_know_int4_alone(
    folder: Path, bundle: Bundle, policy: str
) -> None:
    ladder = served_ladder(config(folder, load_policy(policy)), 12, bundle)
    assert list(ladder.steps) == [Rung(i, INT4) for i in LAYERS]


def test_static_layers_take_int4_of_a_bundle_with_int8(folder: Path) -> None:
    engine = build_engine(config(folder, load_policy("static:5")))
    state = engine.snapshot()
    assert state.layers == [INT4] * 5 + [FULL] * 7
    assert state.rung == state.target_rung == 5
    assert state.blocks_capacity == state.blocks_max > state.blocks_full
    assert engine.hello().memory.images.keys() == {FULL, INT4}


def test_the_share_of_a_policy_bounds_int4_layers_alone(folder: Path) -> None:
    policy = replace(load_policy("performance"), max_demoted_share=0.25)
    capacities = build_engine(config(folder, policy)).hello().capacities
    assert len(capacities) == 1 + 12 + 3
    assert capacities == sorted(set(capacities)), "a rung frees nothing"


def test_an_engine_climbs_to_int8_then_to_int4_and_returns(folder: Path) -> None:
    engine = build_engine(config(folder, load_policy("performance")))
    hello = engine.hello()
    assert hello.memory.images.keys() == {FULL, INT8, INT4}
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    for i in range(4):
        assert engine.submit(Submit(f"r{i}", list(range(100, 160)), params)) is None
    for rung in (3, 12, 14, 24, 13, 5, 0):
        engine.pin(rung)
        for _ in range(200):
            engine.step()
            state = engine.snapshot()
            if state.rung == rung and not state.swapping:
                break
        for _ in range(3):
            engine.step()
        assert state.layers == engine._parts.ladder.variants_at(rung)
        assert state.blocks_capacity == hello.capacities[rung]
    while engine.has_work:
        engine.step()
    tokens = engine.snapshot().generated_tokens
    assert tokens[INT8] > 0 and tokens[INT4] > 0
    assert sum(tokens.values()) == 160
    events = engine.take_events()
    assert not [event.text for event in events if event.kind in ("error", "swap_failed")]
