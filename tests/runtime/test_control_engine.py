"""The controller in a whole engine on the demo model: budget, pins, admission, held requests."""

from collections.abc import Callable
from dataclasses import replace

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, Policy, SchedulerConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import build_engine
from morphserve.runtime.engine import Engine
from morphserve.runtime.messages import Snapshot, Submit
from morphserve.runtime.request import Demands, SamplingParams

QUICK = replace(
    load_policy("performance"),
    window_s=0.0,
    entry_windows=1,
    quiet_s=0.0,
    dwell_s=0.0,
    cooldown_s=0.0,
    tail_s=60.0,
    max_flips_per_minute=1000,
)
STEPS = 5000  # more than any of these needs


def start(bundle: str, policy: Policy = QUICK) -> Engine:
    limits = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256, max_model_len=256)
    cache = CacheConfig(memory_budget=26 * 2**20)
    return build_engine(EngineConfig("demo", policy, bundle, cache=cache, scheduler=limits))


def submit(engine: Engine, names: str, max_tokens: int = 40, **demands: Variant) -> None:
    """A request for each letter; no two prompts begin alike."""
    for name in names:
        prompt = [(31 * ord(name) + 7 * i) % 4000 + 5 for i in range(60)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        assert engine.submit(Submit(name, prompt, params, Demands(**demands))) is None


def run(engine: Engine, steps: int = STEPS) -> dict[str, str]:
    """Steps until idle, or so many; the finish reason of each request that ended."""
    ended: dict[str, str] = {}
    for _ in range(steps):
        if not engine.has_work:
            break
        step = engine.step()
        for output in step.outputs if step else []:
            if output.finish_reason:
                ended[output.request_id] = output.finish_reason
    return ended


def run_until(engine: Engine, reached: Callable[[Snapshot], bool]) -> Snapshot:
    """Steps until the state is so, with no swap under way."""
    for _ in range(STEPS):
        engine.step()
        state = engine.snapshot()
        if reached(state) and not state.swapping:
            return state
    raise AssertionError(f"not reached: {state}")


def run_to_rung(engine: Engine, rung: int) -> Snapshot:
    return run_until(engine, lambda state: state.rung == rung)


def run_to_pressure(engine: Engine) -> Snapshot:
    """Until layers are INT4 and have made tokens."""
    return run_until(engine, lambda state: state.generated_tokens.get(Variant.INT4, 0) > 0)


def decisions(engine: Engine) -> list[str]:
    return [event.text for event in engine.take_events() if event.kind == "decision"]


def test_a_spent_quality_budget_brings_full_precision_back_while_requests_wait(
    bundle: str,
) -> None:
    engine = start(bundle, replace(QUICK, max_demoted_token_share=0.3))
    submit(engine, "abcdefghijklmnop")
    run_to_pressure(engine)
    state = run_to_rung(engine, 0)
    assert state.waiting > 0
    assert state.blocks_used <= state.blocks_full
    assert any("tokens were made with INT4 layers: back to rung 0" in d for d in decisions(engine))
    assert set(run(engine).values()) == {"length"}
    made = engine.snapshot().generated_tokens
    assert sum(made.values()) == 16 * 40
    assert made[Variant.FULL] > state.generated_tokens[Variant.FULL]


def test_a_spent_budget_is_said_once_while_pressure_goes_unanswered(bundle: str) -> None:
    engine = start(bundle, replace(QUICK, max_demoted_token_share=0.05))
    submit(engine, "abcdefghijklmnop")
    run_to_pressure(engine)
    run_to_rung(engine, 0)
    run(engine, 10)
    assert engine.snapshot().waiting > 0
    told = [text for text in decisions(engine) if text.endswith("stays at rung 0")]
    assert len(told) == 1
    assert "the quality budget is spent" in told[0]
    assert "open again at 4%" in told[0]


def test_a_pinned_rung_holds_through_calm_until_it_is_freed(bundle: str) -> None:
    engine = start(bundle)
    engine.pin(5)
    run_to_rung(engine, 5)
    submit(engine, "a")
    assert run(engine) == {"a": "length"}
    assert engine.snapshot().rung == 5
    assert engine.snapshot().pinned
    engine.pin(None)
    run_to_rung(engine, 0)
    texts = [event.text for event in engine.take_events() if event.kind == "pin"]
    assert texts == ["held at rung 5", "the controller decides again"]


def test_a_pin_at_full_precision_holds_through_pressure_until_it_is_freed(bundle: str) -> None:
    engine = start(bundle)
    engine.pin(0)
    submit(engine, "abcdefghijklmnop")
    run(engine, 20)
    assert engine.snapshot().waiting > 0
    assert engine.snapshot().swaps == 0
    engine.pin(None)
    assert run_to_pressure(engine).rung > 0


def test_on_the_way_back_nothing_is_admitted_that_the_target_has_no_room_for(bundle: str) -> None:
    engine = start(bundle)
    engine.pin(12)
    run_to_rung(engine, 12)
    submit(engine, "abcdefghij", max_tokens=100)
    run(engine, 10)
    state = engine.snapshot()
    assert state.blocks_full < state.blocks_used < state.blocks_capacity
    engine.pin(0)
    submit(engine, "k")
    state = run_until(engine, lambda state: state.waiting == 0)
    assert state.blocks_used <= state.blocks_full
    assert set(run(engine).values()) == {"length"}
    assert engine.snapshot().rung == 0


def test_requests_held_for_full_precision_bring_it_back_and_press_nobody(bundle: str) -> None:
    engine = start(bundle)
    engine.pin(6)
    run_to_rung(engine, 6)
    submit(engine, "ab")
    run(engine, 5)
    before = engine.snapshot()
    submit(engine, "cdefghijklmnop", min_precision=Variant.FULL)
    run(engine, 1)
    held = engine.snapshot()
    assert held.held == 14
    assert held.demand == before.demand
    engine.take_events()
    engine.pin(None)
    assert set(run(engine).values()) == {"length"}
    (told,) = decisions(engine)
    assert "14 waiting for a higher precision" in told
    assert told.endswith("back to rung 0")


def test_requests_that_need_full_precision_do_not_morph_the_server_for_memory(bundle: str) -> None:
    engine = start(bundle)
    submit(engine, "abcdefghijklmnop", min_precision=Variant.FULL)
    run(engine, 5)
    assert engine.snapshot().waiting > 0
    assert set(run(engine).values()) == {"length"}
    assert decisions(engine) == []
    assert engine.snapshot().swaps == 0
