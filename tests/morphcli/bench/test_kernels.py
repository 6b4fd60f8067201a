"""`morph bench --kernels`: what is measured and told, never how fast it was."""

import ctypes
import io
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner, Result

from morphserve.configs.errors import ConfigError, MorphError
from morphserve.morphcli.app import app
from morphserve.morphcli.bench.kernels import (
    attention,
    linears,
    machine,
    memory,
    race,
    rows,
    run,
    steps,
)
from morphserve.morphcli.bench.kernels.caches import fill
from morphserve.morphcli.bench.kernels.models import Shape, build_variants
from morphserve.morphcli.bench.kernels.race import Task
from morphserve.morphcli.bench.kernels.random_values import bell
from morphserve.morphcli.bench.kernels.result import KernelBench, Machine, Rates
from morphserve.morphcli.bench.kernels.run import bench_kernels
from morphserve.morphcli.bench.kernels.tables import print_bench
from morphserve.quantize.cores import own_cores
from morphserve.quantize.manifest import Variant
from morphserve.runtime.kernels import AttentionShape, FullLinear, QuantizedLinear, load_kernels
from morphserve.runtime.kernels.native import NativeUnavailable, load_library

TINY = Shape("tiny", 2, 64, 128, 4, 2, vocab=264, tied=True)
MACHINE = Machine("cpu", 4, 2, "2", 0.0, 0.0, Rates(1e9, 2e9), {"float32": Rates(1e9, 2e9)})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sizes and times that take no time; one thread, as it was before."""
    for module, values in {
        machine: {"ATTEMPTS": 1, "TURN_S": 1e-4},
        race: {"RACE_S": 0.0, "LEAST_TURNS": 1, "HEATS": 1},
        linears: {"ROWS": (1, 5), "GROUP": 32},
        run: {"SHAPES": ((96, 128), (64, 32)), "MODELS": (TINY,), "SEQUENCES": (1, 3)},
        attention: {"SEQUENCES": (1, 3), "CONTEXT": 40, "SHAPE": AttentionShape(4, 2, 16, 16, 0.0)},
        rows: {"ROWS": (1, 3), "HIDDEN": 64, "INNER": 96, "VOCAB": 300, "SAMPLED_ROWS": 2},
        steps: {"SEQUENCES": (1, 3), "CONTEXT": 40, "STEP_S": 0.0},
    }.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    for module in (machine, memory):
        monkeypatch.setattr(module, "beyond_caches", lambda: 2**15)
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def morph(*words: str) -> Result:
    result = CliRunner().invoke(app, ["bench", *words], env={"COLUMNS": "80"})
    if isinstance(result.exception, MorphError):
        raise result.exception
    return result


def tasks() -> list[Task]:
    return [task for tasks in run._tasks(load_kernels("cpu"), lambda _: None) for task in tasks]


def test_every_kernel_and_step_is_told_as_json() -> None:
    result = morph("--kernels", "--threads", "1", "--json")
    assert result.exit_code == 0
    bench = msgspec.json.decode(result.stdout, type=KernelBench)
    assert bench.machine.threads == 1
    assert bench.machine.cores == own_cores()
    assert bench.machine.read_bytes.one > 0
    assert bench.machine.multiply_adds["float32"].together > 0
    kernels = list(dict.fromkeys(time.kernel for time in bench.kernels))
    assert kernels == [
        *("linear bf16", "linear INT4", "linear INT8"),
        *("attention, decode", "RoPE, KV write", "attention, prompt"),
        *("add, RMSNorm", "SiLU, product", "sampler, greedy", "sampler, top-p"),
    ]
    for time in bench.kernels:
        assert time.seconds > 0
        assert time.torch_seconds is not None and time.torch_seconds > 0
    told = [(time.variant, time.sequences, time.tokens) for time in bench.decode + bench.prefill]
    sizes = [(1, 1), (3, 3), (1, 40)]
    assert told == [(variant, *size) for size in sizes for variant in ("full", "int4")]
    assert bench.notes == []


def test_everything_that_was_measured_is_in_a_table() -> None:
    result = morph("--kernels")
    assert result.exit_code == 0
    for heading in ("what this machine can do", "linear, 96x128", "other kernels", "decode steps"):
        assert heading in result.stdout


def test_our_kernels_and_torch_compute_the_same() -> None:
    for task in tasks():
        if task.kernel == "sampler, top-p":  # drawn
            continue
        task.refresh()
        ours = task.ours(0).float().flatten()
        for route, call in task.torch.items():
            task.refresh()
            error = (call(0).float().flatten() - ours).norm() / ours.norm()
            # bfloat16 activations, or int8 ones with a scale per group, err by less than 1 %.
            assert error < 0.03, (task.kernel, task.rows, route)


def test_drawn_tokens_are_of_the_nucleus_in_either_way() -> None:
    task = next(task for task in tasks() if task.kernel == "sampler, top-p")
    task.refresh()
    logits = 4 * bell(rows.SAMPLED_ROWS, rows.VOCAB, seed=0)
    likely, ids = (logits / rows.TEMPERATURE).softmax(-1).sort(descending=True)
    counts = (likely.cumsum(-1) < rows.TOP_P).sum(-1) + 1
    for call in (task.ours, *task.torch.values()):
        task.refresh()
        for token, row, count in zip(call(0), ids, counts, strict=True):
            assert token in row[:count]


def test_weights_take_turns_that_caches_cannot_hold() -> None:
    weights = linears.make_weights(96, 128, load_kernels("cpu"))
    for forms in (weights.full, weights.int4, weights.int8):
        assert len(forms) * memory.linear_bytes(forms[0]) > 2**15
    places = {form.weight.data_ptr() for form in weights.full if isinstance(form, FullLinear)}
    assert len(places) == len(weights.full)


def test_torch_too_finds_other_keys_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    task = next(task for task in tasks() if task.kernel == "attention, prompt")
    attend, places = F.scaled_dot_product_attention, []

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: bool) -> Tensor:
        places.extend([k.data_ptr(), v.data_ptr()])
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for call in task.torch.values():
        call(0), call(1)
    assert len(set(places)) == len(places) == 12  # K and V, two calls, three routes


def test_keys_are_not_the_values() -> None:
    filled = fill(load_kernels("cpu"), attention.SHAPE, sequences=1, context=40)
    assert not torch.equal(filled.k[0], filled.v[0])


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, TypeError])
def test_where_torch_has_no_operation_ours_is_timed_alone_and_a_note_says_so(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise error("_weight_int4pack_mm_for_cpu")

    monkeypatch.setattr(linears, "_torch_int4", gone)
    monkeypatch.setattr(run, "MODELS", ())
    bench = bench_kernels(1, lambda _: None)
    without = {time.kernel for time in bench.kernels if time.torch_seconds is None}
    assert without == {"linear INT4"}
    [note] = bench.notes
    assert "was left out of linear INT4: it has no such operation" in note


def test_every_layer_of_a_random_model_has_memory_of_its_own() -> None:
    variants = build_variants(TINY, load_kernels("cpu"), sequences=3, context=40)
    for variant, kind in ((Variant.FULL, FullLinear), (Variant.INT4, QuantizedLinear)):
        layers = variants[variant].model.layers
        assert all(isinstance(layer.down, kind) for layer in layers)
        assert len({layer.post_norm.data_ptr() for layer in layers}) == len(layers) == 2


def test_a_step_reads_all_weights_and_all_of_the_context() -> None:
    timer = steps.StepTimer(TINY, load_kernels("cpu"), MACHINE)
    full, int4 = timer.decode(3)
    linear = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128)  # of both layers
    head, attention_products = 3 * 264 * 64, 3 * 2 * 2 * 40 * 64
    assert full.work.multiply_adds == 3 * linear + head + attention_products
    kv = 2 * 2 * 32 * 40 * 3 * 2  # K and V, layers, channels, tokens, sequences, bytes
    norms = 4 * 64 * 4
    assert full.work.num_bytes >= 2 * (linear + 264 * 64) + kv + norms
    assert int4.work.num_bytes < full.work.num_bytes
    assert (full.work.kind, int4.work.kind) == ("bfloat16", "int8")


def test_a_model_without_room_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "free_memory", lambda: 0)
    bench = bench_kernels(1, lambda _: None)
    assert bench.decode == bench.prefill == []
    [note] = bench.notes
    assert note.startswith("tiny was left out: it takes 0.0 GiB of memory")
    console = Console(width=80, file=io.StringIO(), record=True)
    print_bench(bench, console)
    assert "tiny was left out" in console.export_text()


def test_the_probe_reads_every_byte_and_counts_every_product() -> None:
    library, total, done = load_library(), ctypes.c_uint64(), ctypes.c_int64()
    numbers = torch.arange(1024)
    library.morph_probe_read(numbers.data_ptr(), numbers.nbytes, ctypes.byref(total))
    assert total.value == 1023 * 512
    for kind in machine.KINDS.values():
        counts = []
        for rounds in (10, 30):
            library.morph_probe_multiply(kind, rounds, ctypes.byref(done))
            counts.append(done.value)
        assert counts[1] == 3 * counts[0]


def test_every_kind_that_the_processor_multiplies_has_a_rate() -> None:
    flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    expected = ["float32"]
    expected += ["bfloat16"] if "avx512_bf16" in flags else []
    expected += ["int8"] if flags & {"avx512_vnni", "avx_vnni"} else []
    assert list(machine.multiply_rates(1)) == expected


def test_without_a_compiler_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> None:
        raise NativeUnavailable("no C compiler was found")

    monkeypatch.setattr(machine, "load_library", unavailable)
    with pytest.raises(ConfigError, match="no C compiler was found.*install a C compiler"):
        morph("--kernels")
