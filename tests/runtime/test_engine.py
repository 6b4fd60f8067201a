"""The engine as a whole on the demo model: it morphs under pressure, returns, and loses nothing."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from morphserve.configs.errors import ConfigError, OutOfBudget
from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, Policy, SchedulerConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import build_engine
from morphserve.runtime.engine import Engine
from morphserve.runtime.messages import Submit, TokenOutput
from morphserve.runtime.request import Demands, SamplingParams
from morphserve.runtime.runner import Runner
from morphserve.runtime.scheduler import Batch

QUICK = replace(
    load_policy("performance"),
    window_s=0.0,
    entry_windows=1,
    quiet_s=0.0,
    dwell_s=0.0,
    cooldown_s=0.0,
    max_flips_per_minute=1000,
)
PROMPT = list(range(100, 160))
TIGHT = 50 * 2**20  # bytes in float32: the model and a few requests


def config(bundle: str | None, policy: Policy, budget: int | None = TIGHT) -> EngineConfig:
    return EngineConfig(
        model="demo",
        bundle=bundle,
        policy=policy,
        kernels="reference",
        dtype="float32",
        cache=CacheConfig(memory_budget=budget),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256, max_model_len=256),
    )


def submit(engine: Engine, count: int, max_tokens: int, **params: object) -> None:
    for i in range(count):
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)  # type: ignore[arg-type]
        assert engine.submit(Submit(f"r{i}", PROMPT, sampling)) is None


def drain(engine: Engine) -> dict[str, list[int]]:
    """All tokens by request, and the engine stepped until it is idle."""
    tokens: dict[str, list[int]] = {}
    ended = set()
    for _ in range(5000):
        if not engine.has_work:
            break
        step = engine.step()
        for output in step.outputs if step else []:
            tokens.setdefault(output.request_id, []).extend(output.tokens)
            if output.finish_reason:
                ended.add(output.request_id)
    assert ended == tokens.keys()
    return tokens


def test_it_morphs_under_pressure_and_returns_when_it_is_over(bundle: str) -> None:
    engine = build_engine(config(bundle, QUICK))
    submit(engine, 10, max_tokens=24, temperature=0.0)
    engine.step()
    for _ in range(8):
        engine.step()
    pressed = engine.snapshot()
    assert pressed.rung > 0
    assert pressed.blocks_capacity > pressed.blocks_full
    assert pressed.layers.count("int4") > 0
    drain(engine)
    for _ in range(1000):
        engine.step()
        calm = engine.snapshot()
        if set(calm.layers) == {"full"}:
            break
    assert calm.layers == ["full"] * 12
    assert calm.blocks_capacity == calm.blocks_full
    assert calm.blocks_used == 0
    assert 0 < calm.generated_tokens[Variant.INT4] <= calm.num_generated == 240
    assert {"decision", "demote", "promote"} <= {event.kind for event in engine.take_events()}
    assert engine.take_events() == []


def test_static_layers_are_int4_before_the_first_request(bundle: str) -> None:
    engine = build_engine(config(bundle, load_policy("static:5")))
    state = engine.snapshot()
    assert state.layers.count("int4") == 5
    assert state.blocks_capacity == state.blocks_max > state.blocks_full
    submit(engine, 1, max_tokens=3, temperature=0.0)
    assert engine.step().precision is Variant.INT4  # type: ignore[union-attr]


def test_a_policy_that_never_swaps_gives_all_the_budget_to_requests(bundle: str) -> None:
    with_bundle = build_engine(config(bundle, load_policy("off"))).snapshot()
    without = build_engine(config(None, load_policy("off"))).snapshot()
    assert with_bundle.blocks_capacity == without.blocks_capacity
    assert without.blocks_capacity > build_engine(config(bundle, QUICK)).snapshot().blocks_full


def test_seeded_sampling_repeats_alone_and_in_company(bundle: str) -> None:
    def first(count: int, seed: int) -> list[int]:
        engine = build_engine(config(None, load_policy("off")))
        submit(engine, count, max_tokens=12, temperature=0.9, top_p=0.95, top_k=50, seed=seed)
        return drain(engine)["r0"]

    assert first(1, seed=3) == first(5, seed=3)
    assert first(1, seed=3) != first(1, seed=4)


class Breaking:
    """A runner that fails in one step, whenever it is given one of these requests."""

    overlaps = False

    def __init__(self, runner: Runner, nth: int, guilty: set[str]) -> None:
        self._runner, self._nth, self._guilty = runner, nth, guilty
        self.steps = 0

    def launch(self, batch: Batch) -> Any:
        self.steps += self.steps < self._nth
        if self.steps == self._nth and self._guilty & {piece.request.id for piece in batch}:
            raise RuntimeError("injected")
        return self._runner.launch(batch)


def break_step(engine: Engine, nth: int, guilty: set[str]) -> None:
    runner = Breaking(engine._parts.runner, nth, guilty)
    engine._steps._parts = replace(engine._parts, runner=runner)


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on() -> None:
    engine = build_engine(config(None, load_policy("off")))
    parts = engine._parts
    for nth in (1, 2, 5):
        submit(engine, 2, max_tokens=8, temperature=0.0)
        break_step(engine, nth, {"r0", "r1"})
        steps = [engine.step() for _ in range(nth)]
        last = steps[-1]
        assert last is not None
        assert [(o.tokens, o.finish_reason) for o in last.outputs] == [([], "error")] * 2
        assert not engine.has_work
        assert engine.snapshot().blocks_used == 0
        (event,) = [e for e in engine.take_events() if e.kind == "error"]
        assert "injected" in event.text
        assert event.numbers == {"requests": 2, "lost": 2}
        engine._steps._parts = parts
    submit(engine, 1, max_tokens=4, temperature=0.0)
    assert len(drain(engine)["r0"]) == 4


def test_of_a_step_that_fails_for_one_request_the_others_get_their_tokens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = build_engine(replace(config(None, load_policy("off")), kernels="auto"))
    parts = engine._parts
    submit(engine, 3, max_tokens=22, temperature=0.0)
    undisturbed = drain(engine)
    for nth in range(1, 21):
        submit(engine, 3, max_tokens=nth + 2, temperature=0.0)
        break_step(engine, nth, {"r1"})
        caplog.clear()
        tokens = drain(engine)
        assert tokens.keys() == undisturbed.keys()
        assert tokens["r0"] == undisturbed["r0"][: nth + 2]
        assert tokens["r2"] == undisturbed["r2"][: nth + 2]
        assert tokens["r1"] == undisturbed["r1"][: nth - 1]
        assert len([record for record in caplog.records if record.exc_info]) == 1
        parts.pool.check([])
        engine._steps._parts = parts


def test_a_failure_that_does_not_repeat_costs_nobody_anything() -> None:
    engine = build_engine(replace(config(None, load_policy("off")), kernels="auto"))
    submit(engine, 3, max_tokens=6, temperature=0.0)
    undisturbed = drain(engine)
    submit(engine, 3, max_tokens=6, temperature=0.0)
    runner, failures = engine._parts.runner, [RuntimeError("once")]

    class Once:
        overlaps = False

        def launch(self, batch: Batch) -> Any:
            if failures:
                raise failures.pop()
            return runner.launch(batch)

    engine._steps._parts = replace(engine._parts, runner=Once())
    assert drain(engine) == undisturbed


def test_a_first_token_tells_how_much_of_the_prompt_was_cached() -> None:
    engine = build_engine(config(None, load_policy("off")))
    submit(engine, 1, max_tokens=4, temperature=0.0)
    drain(engine)
    submit(engine, 1, max_tokens=4, temperature=0.0)
    first, second = engine.step(), engine.step()
    assert first is not None and second is not None
    assert [output.cached_tokens for output in (*first.outputs, *second.outputs)] == [48, 0]
    drain(engine)
    state = engine.snapshot()
    assert (state.prefix_queries, state.prefix_hits) == (120, 48)
    assert (state.blocks_used, state.blocks_cached) == (0, 3)


def test_the_cache_is_off_when_it_is_told_so() -> None:
    plain = config(None, load_policy("off"))
    off = replace(plain, cache=replace(plain.cache, enable_prefix_caching=False))
    engine = build_engine(off)
    for _ in range(2):
        submit(engine, 1, max_tokens=4, temperature=0.0)
        drain(engine)
    state = engine.snapshot()
    assert (state.prefix_queries, state.prefix_hits, state.blocks_cached) == (0, 0, 0)


def test_a_request_for_full_precision_waits_until_it_is_back(bundle: str) -> None:
    engine = build_engine(config(bundle, QUICK))
    engine.pin(3)
    while engine.step() is None and engine.snapshot().layers.count(Variant.INT4) < 3:
        pass
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    demands = Demands(min_precision=Variant.FULL)
    assert engine.submit(Submit("strict", PROMPT, params, demands)) is None
    assert engine.submit(Submit("any", PROMPT, params)) is None
    while engine.has_work:
        step = engine.step()
        assert step is not None
        assert {output.request_id for output in step.outputs} == {"any"}
    state = engine.snapshot()
    assert (state.held, state.waiting, state.running, state.demand) == (1, 1, 0, 0)
    engine.pin(None)
    outputs: list[TokenOutput] = []
    while not outputs or outputs[-1].finish_reason is None:
        if step := engine.step():
            assert step.precision is Variant.FULL
            outputs += step.outputs
    assert [output.request_id for output in outputs] == ["strict"] * 3
    assert engine.snapshot().held == 0


def test_a_precision_that_a_static_policy_never_has_is_refused(bundle: str) -> None:
    engine = build_engine(config(bundle, load_policy("static:5")))
    demands = Demands(min_precision=Variant.FULL)
    refused = engine.submit(Submit("x", PROMPT, SamplingParams(max_tokens=3), demands))
    assert refused is not None
    assert "policy static:5 keeps layers at a lower precision" in refused.message
    off = build_engine(config(bundle, load_policy("off")))
    assert off.submit(Submit("x", PROMPT, SamplingParams(max_tokens=3), demands)) is None


def test_a_request_that_waits_too_long_is_reported_like_any_other_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = config(None, load_policy("off"))
    limits = replace(plain.scheduler, max_num_seqs=1, queue_timeout_s=1000.0)
    engine = build_engine(replace(plain, scheduler=limits))
    submit(engine, 2, max_tokens=4, temperature=0.0)
    engine.step()
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 1001.0)
    step = engine.step()
    assert step is not None
    ends = {output.request_id: output.finish_reason for output in step.outputs}
    assert ends == {"r0": None, "r1": "timeout"}
    assert engine.snapshot().waiting == 0


def test_a_prompt_longer_than_a_step_is_served_alone() -> None:
    plain = replace(config(None, load_policy("off"), None), kernels="auto")
    long = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    small = replace(plain.scheduler, max_num_batched_tokens=16, max_num_seqs=4)
    engine = build_engine(replace(plain, scheduler=small))
    assert engine.submit(Submit("long", PROMPT, long)) is None
    assert len(drain(engine)["long"]) == 3
    assert engine.snapshot().prompt_tokens == len(PROMPT)


def test_logits_that_are_not_finite_end_the_request_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = build_engine(config(None, load_policy("off")))
    submit(engine, 2, max_tokens=4, temperature=0.7)
    forward = type(engine._parts.runner._model).forward

    def broken(*args: Any) -> torch.Tensor:
        logits = forward(*args)
        logits[0, 7] = float("nan")
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(type(engine._parts.runner._model), "forward", broken)
        step = engine.step()
    assert step is not None
    assert [(o.request_id, len(o.tokens), o.finish_reason) for o in step.outputs] == [
        ("r0", 0, "error"),
        ("r1", 1, None),
    ]


def test_a_swap_that_keeps_failing_is_tried_ever_more_rarely(bundle: str) -> None:
    engine = build_engine(config(bundle, QUICK))

    def fail(destination: torch.Tensor, source: torch.Tensor) -> None:
        raise RuntimeError("injected")

    engine._parts.swapper._link.copy = fail
    submit(engine, 10, max_tokens=24, temperature=0.0)
    assert len(drain(engine)) == 10
    failed = [e for e in engine.take_events() if e.kind == "swap_failed"]
    assert 1 <= len(failed) <= 2 * CacheConfig().staging_slots
    assert engine.snapshot().layers == ["full"] * 12


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ConfigError, match="no kernels 'cuda'"):
        build_engine(replace(config(None, load_policy("off")), kernels="cuda"))


def test_aborted_requests_give_their_blocks_back(bundle: str) -> None:
    engine = build_engine(config(None, load_policy("off")))
    submit(engine, 3, max_tokens=50, temperature=0.0)
    engine.step()
    for i in range(3):
        engine.abort(f"r{i}")
    engine.abort("never seen")
    assert engine.snapshot().blocks_used == 0
    assert not engine.has_work


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (
            list(range(250)),
            10,
            "250 prompt tokens + max_tokens 10 = 260, more than this model's limit",
        ),
        ([], 10, "at least one prompt token"),
        ([5000], 10, "token ids must lie between 0 and 4095"),
    ],
)
def test_requests_that_can_never_run_are_refused_with_the_numbers(
    prompt: list[int], max_tokens: int, message: str
) -> None:
    engine = build_engine(config(None, load_policy("off")))
    refused = engine.submit(Submit("x", prompt, SamplingParams(max_tokens=max_tokens)))
    assert refused is not None
    assert refused.request_id == "x"
    assert message in refused.message


def test_a_budget_that_holds_no_full_request_is_refused_with_both_ways_out(bundle: str) -> None:
    with pytest.raises(OutOfBudget, match=r"raise --memory-budget to .* or lower --max-model-len"):
        build_engine(config(bundle, QUICK, budget=44 * 2**20))


def test_a_policy_that_swaps_needs_a_bundle() -> None:
    with pytest.raises(ConfigError, match="morph quantize demo"):
        build_engine(config(None, QUICK))


def test_outputs_carry_one_token_and_the_finish_reason_at_the_end(bundle: str) -> None:
    engine = build_engine(config(None, load_policy("off")))
    submit(engine, 1, max_tokens=2, temperature=0.0)
    outputs: list[TokenOutput] = []
    while engine.has_work:
        step = engine.step()
        outputs += step.outputs if step else []
    assert [len(o.tokens) for o in outputs] == [1, 1]
    assert [o.finish_reason for o in outputs] == [None, "length"]


def test_a_budget_beyond_the_machine_is_one_sentence() -> None:
    with pytest.raises(OutOfBudget, match="more than this machine has"):
        build_engine(config(None, load_policy("off"), budget=2**60))


def test_preemptions_are_told_once_a_second_at_most(bundle: str) -> None:
    engine = build_engine(config(None, load_policy("off"), budget=44 * 2**20 + 2**19))
    submit(engine, 12, max_tokens=60, temperature=0.0)
    drain(engine)
    told = [e for e in engine.take_events() if e.kind == "preempt"]
    assert told and all(b.time - a.time > 0.9 for a, b in zip(told, told[1:], strict=False))
    counts = [int(event.text.split()[0]) for event in told]
    assert 0 < sum(counts) <= engine.snapshot().preemptions
