"""Steps in flight among swaps, requests that end late and blocks that change hands, on streams."""

from collections.abc import Collection
from dataclasses import dataclass, field
from random import Random

import pytest
from overlap_scenes import TIGHT, Ask, Client, check_answers, engine_of, greedy, sampled
from streamed_engine import Streams, put_on_streams

from morphserve.quantize.manifest import Variant
from morphserve.runtime.device import streams as streams_module

TURNS = 50
RUNGS = (None, 0, 2, 5, 8, 10)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image takes a few steps."""
    monkeypatch.setattr(streams_module, "PIECE_BYTES", 16_000)
    monkeypatch.setattr(streams_module, "PINNED_BYTES_PER_STEP", 64_000)


@dataclass
class Serving:
    """Clients who come, go, and pin rungs at random."""

    seed: int
    without: Collection[str] = ()
    is_pinned: bool = True
    random: Random = field(init=False)
    client: Client = field(init=False)
    moved: int = 0

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.client = Client(engine_of(TIGHT))
        self.streams = Streams(self.random, self.without)
        put_on_streams(self.client.engine, self.streams, is_pinned=self.is_pinned)
        swapper = self.client.engine._parts.swapper
        relocate = swapper._relocate  # type: ignore[attr-defined]

        def counted(moves: dict[int, int]) -> None:
            self.moved += len(moves)
            relocate(moves)

        swapper._relocate = counted  # type: ignore[attr-defined]

    def run(self) -> None:
        for _ in range(TURNS):
            self._act()
            self.client.step()
            self.streams.go_on_for_a_while()
        self.client.engine.pin(0)
        for _ in range(2000):
            if not self.client.engine.has_work and not self.client.engine.snapshot().held:
                break
            self.client.step()
            self.streams.go_on_for_a_while()
        check_answers(self.client)

    def _act(self) -> None:
        random, client = self.random, self.client
        if random.random() < 0.4:
            client.submit(self._ask())
        if random.random() < 0.05 and client.asked:
            client.abort(random.choice(list(client.asked)))
        if random.random() < 0.3:
            client.engine.pin(random.choice(RUNGS))

    def _ask(self) -> Ask:
        random = self.random
        stops = random.choice([(), tuple(range(3, 96, 9))])
        params = random.choice([greedy, sampled])(random.choice([6, 20]), stop_token_ids=stops)
        least = random.choice([Variant.INT4] * 5 + [Variant.INT8])
        return Ask(random.randrange(3), random.choice([5, 17, 30]), params, least)


@pytest.mark.parametrize("is_pinned", [True, False])
def test_answers_are_right_whatever_is_done_late_or_early(is_pinned: bool) -> None:
    moved, swaps = 0, 0
    for seed in range(30):
        serving = Serving(seed, is_pinned=is_pinned)
        serving.run()
        moved += serving.moved
        swaps += serving.client.engine.snapshot().swaps
    assert moved > 40 and swaps > 200


@pytest.mark.parametrize("stream", ["compute", "side"])
def test_swaps_that_fail_beside_a_step_in_flight_change_no_answer(stream: str) -> None:
    failed = 0
    for seed in range(20):
        serving = Serving(seed)
        getattr(serving.streams, stream).fails_at = serving.random.randint(1, 9)
        serving.run()
        events = serving.client.engine.take_events()
        failed += any(event.kind == "swap_failed" for event in events)
    assert failed > 10


def test_without_the_waits_of_copies_for_steps_some_answer_is_wrong() -> None:
    def goes_wrong(seed: int) -> bool:
        try:
            Serving(seed, ["side waits"]).run()
        except AssertionError:
            return True
        return False

    assert any(goes_wrong(seed) for seed in range(40))
