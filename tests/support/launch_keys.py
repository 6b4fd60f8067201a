"""Which launches of a served model would compile a kernel: by Triton's keys, without compiling.

    python tests/support/launch_keys.py HEADS KV_HEADS [MAX_SEQS]

Warms a runner up on torch's device "meta", then gives it steps of all sizes, and prints the kernels
that were not compiled by then. `compiled_late` does it in a fresh process for tests: this one may
hold kernels that are interpreted.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def compiled_late(heads: int, kv_heads: int, max_seqs: int) -> list[str]:
    """Kernels that a step would compile after the warm-up, with the step that does."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT / ".src"), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, __file__, str(heads), str(kv_heads), str(max_seqs)],
        env=kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}")
    return done.stdout.splitlines()


def noted_keys() -> set[tuple[str, str]]:
    """Where kernels note from now on what they would be compiled for, instead of running."""
    from offline_compile import _Driver, _stand_in
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction, compute_cache_key

    keys: set[tuple[str, str]] = set()

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        *_, binder = self.device_caches[0]
        stand_ins = map(_stand_in, args)
        named = {name: _stand_in(argument) for name, argument in kwargs.items()}
        _, specialization, options = binder(*stand_ins, debug=False, **named)
        keys.add((self.fn.__name__, compute_cache_key({}, specialization, options)))

    JITFunction.run = note
    driver.set_active(_Driver(90))
    return keys


def main(heads: int, kv_heads: int, max_seqs: int = 256) -> None:
    import torch
    from cuda_launches import EIGHT_B, KERNELS, _full, _meta, _quantised

    from morphserve.runtime.cuda import sampler
    from morphserve.runtime.cuda.inputs import Limits
    from morphserve.runtime.cuda.runner import CudaRunner
    from morphserve.runtime.kernels import LayerWeights, Linear
    from morphserve.runtime.model import Model, StaticWeights
    from morphserve.runtime.request import Request, SamplingParams
    from morphserve.runtime.scheduler import Slice

    keys = noted_keys()
    sampler._Readback.wait = lambda self: torch.zeros(self._host.shape, dtype=torch.int32)
    shape = replace(EIGHT_B, heads=heads, kv_heads=kv_heads)
    width = (heads + 2 * kv_heads) * shape.head_dim

    def layer(linear: Callable[[int, int], Linear]) -> LayerWeights:
        return LayerWeights(
            input_norm=_meta(shape.hidden),
            post_norm=_meta(shape.hidden),
            qk_norm=None,
            qkv=linear(width, shape.hidden),
            o=linear(shape.hidden, heads * shape.head_dim),
            gate_up=linear(2 * shape.inner, shape.hidden),
            down=linear(shape.hidden, shape.inner),
        )

    def quantised(bits: int) -> LayerWeights:
        return layer(lambda outputs, inputs: _quantised(outputs, inputs, bits, shape.group))

    variants = [layer(_full), quantised(4), quantised(8)]
    table = _full(shape.vocab, shape.hidden)
    page = 2 * kv_heads * shape.head_dim * shape.block_tokens
    model = Model(
        kernels=KERNELS,
        static=StaticWeights(table, _meta(shape.hidden), table),
        layers=variants[:1],
        caches=[_meta(1000, page)],
        cos_sin=_meta(8192, shape.head_dim, dtype=torch.float32),
        shape=shape.attention,
    )
    limits = Limits(max_tokens=2048, max_seqs=max_seqs, max_blocks=8192 // shape.block_tokens)
    runner = CudaRunner(_Gpu(), KERNELS, model, sampler.DeviceSampler(()), limits)
    runner.warm_up([variants], lambda weights: weights)
    known = set(keys)
    assert known, "no launch was noted"

    def step(counts: list[int]) -> None:
        batch = []
        for i, count in enumerate(counts):
            bias = {7: 1.0} if i == 1 else {}
            sampled = SamplingParams(9, i % 2, top_p=0.9, top_k=i % 3, logit_bias=bias)
            blocks = [0] * -(-count // shape.block_tokens)
            request = Request("", [0] * count, sampled, 0.0, blocks=blocks)
            batch.append(Slice(request, 0, count))
        runner.launch(batch)
        for name, _ in sorted(keys - known):
            print(f"{name} for {len(counts)} sequences of {sum(counts)} tokens")
        known.update(keys)

    for layers in ([weights] for weights in variants):
        object.__setattr__(model, "layers", layers)
        for num_seqs in range(1, max_seqs + 1):
            step([1] * num_seqs)
            step([1] * (num_seqs - 1) + [2 + num_seqs % 5])
        for num_tokens in (*range(1, 140), *range(140, 2049, 61), 2048):
            step([num_tokens])


class _Gpu:
    """Runs what it is asked to capture, at once and whenever it is replayed."""

    def __init__(self) -> None:
        import torch

        self.device = torch.device("meta")

    def pinned(self, count: int) -> Any:
        import torch

        return torch.zeros(count, dtype=torch.int32)

    def mark(self) -> "_Gpu":
        return self

    def synchronize(self) -> None:
        pass

    def rehearse(self, run: Callable[[], object]) -> None:
        run()

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        run()
        return lambda: None

    def free_bytes(self) -> int:
        return 0

    def is_lost(self) -> bool:
        return False


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
