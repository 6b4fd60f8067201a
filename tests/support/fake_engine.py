"""An engine that repeats each prompt, one token per step, and does on command what engines do."""

import math
import sys
import threading
import time
from dataclasses import dataclass

from morphserve.configs.errors import OutOfBudget
from morphserve.configs.schema import EngineConfig
from morphserve.quantize.manifest import Rung, Variant
from morphserve.runtime.engine_process import main
from morphserve.runtime.messages import (
    Event,
    Hello,
    MemoryBytes,
    Refused,
    Snapshot,
    Step,
    Submit,
    TokenLogprobs,
    TokenOutput,
)

# A prompt that begins with one of these ids:
CRASH, REFUSE, INT4, STOP, MUTE, STUCK, CACHED = 4000, 4001, 4002, 4003, 4004, 4005, 4006
NUM_LAYERS = 4
MAX_MODEL_LEN = 2048
QUEUED_S = 0.25  # of every request
HELLO = Hello(
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=64,
    num_layers=NUM_LAYERS,
    ladder=[Rung(layer, Variant.INT4) for layer in (1, 2, 0, 3)],
    capacities=[40, 50, 60, 70, 80],
    block_tokens=16,
    device="a CPU",
    kernels="native",
    threads=2,
    dtype="float32",
    memory=MemoryBytes(
        budget=1_000_000,
        static=200_000,
        staging=50_000,
        layers=400_000,
        page=2048,
        images={Variant.FULL: [100_000] * 4, Variant.INT4: [25_000] * 4},
    ),
    startup_s={"checkpoint": 0.0},
)


@dataclass
class Running:
    prompt: list[int]
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    logprobs: int | None = None
    produced: int = 0

    def next_token(self) -> int:
        return self.prompt[self.produced % len(self.prompt)]

    def told(self, token: int) -> TokenLogprobs:
        """Half for the token, a quarter for the next id, and so on."""
        top = [(token + i, -math.log(2) * (i + 1)) for i in range(self.logprobs or 0)]
        return TokenLogprobs(-math.log(2), top)


class FakeEngine:
    def __init__(self, config: EngineConfig) -> None:
        if config.cache.memory_budget == 1:
            raise OutOfBudget("the budget of 1 B is too small: at least 42 MiB are needed")
        self.config = config
        self.requests: dict[str, Running] = {}
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []
        self.generated = 0
        self.pinned: int | None = None
        self.time_out = False  # whether requests that get no token are given up
        self.events = [Event(1, time.time(), "demote", "layer 1 to INT4: demand 50 of 40 blocks")]
        self.steps = 0

    def hello(self) -> Hello:
        return HELLO

    def submit(self, message: Submit) -> Refused | None:
        if message.prompt[0] == REFUSE:
            return Refused(message.request_id, "it would need 99 blocks, there are 42")
        params = message.params
        self.requests[message.request_id] = Running(
            message.prompt, params.max_tokens, params.stop_token_ids, params.logprobs
        )
        self.submitted.append(message)
        return None

    def abort(self, request_id: str) -> None:
        if self.requests.pop(request_id, None):
            self.aborted.append(request_id)

    def pin(self, rung: int | None) -> None:
        self.pinned = rung
        self.events.append(Event(len(self.events) + 1, time.time(), "pin", f"rung {rung}"))

    def take_events(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> Step | None:
        if not self.requests:
            return None
        time.sleep(0.001)
        self.steps += 1
        firsts = {running.prompt[0] for running in self.requests.values()}
        if CRASH in firsts:
            raise RuntimeError("told to crash")
        if STUCK in firsts:
            threading.Event().wait()
        outputs = [
            self._advance(request_id, running)
            for request_id, running in list(self.requests.items())
            if running.prompt[0] != MUTE
        ]
        if self.time_out:
            outputs += [TokenOutput(request_id, [], "timeout") for request_id in self.requests]
            self.requests.clear()
        return Step(Variant.INT4 if INT4 in firsts else Variant.FULL, outputs)

    def _advance(self, request_id: str, running: Running) -> TokenOutput:
        token = running.next_token()
        running.produced += 1
        self.generated += 1
        reason = None
        if running.produced == running.max_tokens:
            reason = "length"
        if token in running.stop_token_ids or token == STOP and running.produced > 1:
            reason = "stop"
        if reason:
            del self.requests[request_id]
        cached = len(running.prompt) - 1 if running.prompt[0] == CACHED else 0
        return TokenOutput(
            request_id,
            [token],
            reason,
            None if running.logprobs is None else [running.told(token)],
            cached if running.produced == 1 else 0,
            queued_s=QUEUED_S if running.produced == 1 else 0.0,
        )

    def snapshot(self) -> Snapshot:
        return make_snapshot(
            running=len(self.requests),
            generated_tokens={Variant.FULL: self.generated},
            steps=self.steps,
            preemptions=len(self.aborted),
        )


def make_snapshot(**changes: object) -> Snapshot:
    values: dict[str, object] = {
        "time": time.time(),
        "policy": "balanced",
        "layers": [Variant.FULL, Variant.INT4, Variant.FULL, Variant.FULL],
        "swapping": {2: Variant.INT4},
        "rung": 2,
        "target_rung": 2,
        "pinned": False,
        "blocks_used": 30,
        "blocks_cached": 6,
        "blocks_capacity": 60,
        "blocks_full": 40,
        "blocks_max": 80,
        "block_tokens": 16,
        "demand": 50,
        "running": 0,
        "waiting": 3,
        "oldest_wait_s": 0.25,
        "preemptions": 0,
        "prompt_tokens": 100,
        "generated_tokens": {},
        "prefix_queries": 200,
        "prefix_hits": 50,
        "swaps": 5,
        "steps": 0,
        "step_s": 0.01,
        "predicted_step_s": 0.009,
        "held": 1,
    }
    return Snapshot(**values | changes)


if __name__ == "__main__":
    sys.exit(main(FakeEngine))
