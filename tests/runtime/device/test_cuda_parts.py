"""A GPU's device, where there is none: its arithmetic, its calls, and all that it shares."""

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from eager_device import EagerDevice
from step_kernels import StepKernels
from swap_driver import BLOCK_TOKENS, Driver, prompt_of, tiny_model
from tape_graphs import TapeGpu

from morphserve.configs.errors import ConfigError, OutOfBudget
from morphserve.configs.schema import CacheConfig, SchedulerConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.cuda.inputs import Limits
from morphserve.runtime.cuda.runner import CudaRunner
from morphserve.runtime.device import streams
from morphserve.runtime.device.cuda import GRAPH_BYTES, CudaDevice, CudaStream
from morphserve.runtime.device.host import HostDevice
from morphserve.runtime.device.pinning import PAGE_BYTES, pin
from morphserve.runtime.kernels import load_kernels
from morphserve.runtime.runner import Runner

GIB = 2**30


class Cuda(SimpleNamespace):
    """What torch.cuda says of memory."""

    total, free = 100 * GIB, 95 * GIB
    reserved = peak = 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    state = Cuda()
    answers: dict[str, Callable[..., object]] = {
        "set_device": lambda _: None,
        "get_device_name": lambda _: "GPU",
        "mem_get_info": lambda _: (state.free, state.total),
        "memory_reserved": lambda: state.reserved,
        "max_memory_reserved": lambda: state.peak,
        "reset_peak_memory_stats": lambda: None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return state


def test_the_default_budget_is_the_share_without_what_is_not_the_arena(cuda: Cuda) -> None:
    device = CudaDevice(0)
    memory = device.memory(CacheConfig(), activation_bytes=3 * GIB)
    assert memory.fills
    assert memory.total == memory.free() == 90 * GIB - 5 * GIB - 3 * GIB
    half = CacheConfig(gpu_memory_utilization=0.5)
    assert device.memory(half, 0).free() == 45 * GIB
    assert device.memory(half, 0).name == "GPU has left at --gpu-memory-utilization 0.5"


def test_a_budget_that_was_given_may_take_all_that_is_left(cuda: Cuda) -> None:
    memory = CudaDevice(0).memory(CacheConfig(memory_budget=GIB), activation_bytes=3 * GIB)
    assert (memory.total, memory.name) == (92 * GIB, "GPU has left")
    cuda.free = GIB
    assert CudaDevice(0).memory(CacheConfig(), 0).free() == 0


def test_activations_are_the_peak_without_arena_and_workspaces(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CudaDevice(0)
    device.location = torch.device("cpu")
    cuda.reserved = 10

    def run() -> None:
        device.allocate(1000)
        cuda.peak, cuda.reserved = 10 + 1000 + 64 + 300, 10 + 64  # 64 stay: workspaces

    assert device.measure(run) == 300 + GRAPH_BYTES


def test_memory_that_is_not_there_is_refused_with_numbers(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    device = CudaDevice(0)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(OutOfBudget, match="GPU has 97280 MiB free and cannot give 2048 MiB"):
        device.allocate(2 * GIB)


def test_a_step_that_finds_no_memory_is_told_with_what_to_change(cuda: Cuda) -> None:
    def run() -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    device = CudaDevice(0)
    with pytest.raises(OutOfBudget, match="--max-num-batched-tokens .*tried to allocate 3 GiB"):
        device.measure(run)


def test_a_stream_gives_its_work_to_torch_in_order() -> None:
    calls: list[object] = []
    own = SimpleNamespace(
        record_event=lambda: calls.append("record") or "event",
        wait_event=lambda event: calls.append(f"wait for {event}"),
    )
    stream = CudaStream(torch.device("cpu"), own)  # type: ignore[arg-type]
    source, destination = torch.arange(9, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
    stream.copy(destination[2:], source[2:])
    stream.pause()
    stream.wait(stream.record())
    assert destination.tolist() == [0, 0, *range(2, 9)]
    assert calls == ["record", "wait for event"]


class Cudart:
    """Locks so many pieces of memory, and no more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int, /) -> int:
        if pointer in self.locked:
            return 712
        if len(self.locked) == self.room:
            return 2
        self.locked[pointer] = num_bytes
        return 0

    def cudaHostUnregister(self, pointer: int, /) -> int:
        del self.locked[pointer]
        return 0


def test_images_are_locked_in_whole_pages_for_as_long_as_they_live() -> None:
    model = tiny_model(load_kernels("reference"))
    hosts = [image.host for image in model.images[Variant.FULL]]
    cudart = Cudart(room=100)
    assert pin(hosts, cudart, lambda: None)
    assert pin(hosts, cudart, lambda: None), "for another engine, too"
    assert sorted(cudart.locked) == sorted(host.data_ptr() for host in hosts)
    for host in hosts:
        size = cudart.locked[host.data_ptr()]
        assert size % PAGE_BYTES == 0 and len(host) <= size < len(host) + PAGE_BYTES
        storage = host.untyped_storage()
        assert host.data_ptr() + size <= storage.data_ptr() + storage.nbytes()
    del model, hosts, host
    gc.collect()
    assert not cudart.locked


def test_pages_that_cannot_be_locked_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(load_kernels("reference"))
    forgotten: list[None] = []
    hosts = [image.host for image in model.images[Variant.FULL]]
    assert not pin(hosts, Cudart(room=2), lambda: forgotten.append(None))
    assert len(forgotten) == len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert "CUDA error 2" in caplog.text and "--ulimit memlock=-1" in caplog.text


def test_a_share_of_a_gpu_means_nothing_to_the_cpu() -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization is a share of a GPU"):
        HostDevice().memory(CacheConfig(gpu_memory_utilization=0.8), 0)


def test_tokens_do_not_depend_on_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PIECE_BYTES", 5000)
    model = tiny_model(load_kernels("reference"))
    device = EagerDevice()
    drivers = [Driver(m, kv_tokens=120) for m in (model, replace(model, device=device))]
    for driver in drivers:
        for i in range(4):
            driver.add(f"r{i}", prompt_of(i, 9 + 13 * i), max_tokens=24)
        driver.run(lambda turn: [(3, (Variant.INT4, Variant.FULL)[turn // 4 % 2])])
    assert device.side.copied and max(device.side.copied) == 5000
    assert device.compute.copied, "nothing was committed"
    outputs = [{n: r.output for n, r in driver.requests.items()} for driver in drivers]
    assert outputs[0] == outputs[1]


class StandIns(StepKernels):
    name = "triton"


def test_the_devices_own_kernels_run_in_graphs_and_the_reference_without(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("morphserve.runtime.device.cuda.CudaGpu", TapeGpu)
    device, limits = CudaDevice(0), SchedulerConfig(3, 40)
    driver = Driver(tiny_model(StandIns()), kv_tokens=120)
    runner = device.runner(driver.parts.model, limits, ())
    assert isinstance(runner, CudaRunner)
    assert runner._limits == Limits(max_tokens=40, max_seqs=3, max_blocks=256 // BLOCK_TOKENS)
    device.warm_up(runner, driver.parts.layers)
    assert runner.tally.whole > 0
    plain = device.runner(replace(driver.parts.model, kernels=StepKernels()), limits, ())
    assert type(plain) is Runner
    device.warm_up(plain, driver.parts.layers)
