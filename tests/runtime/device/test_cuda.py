"""A GPU's device on a GPU."""

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from swap_driver import Driver, prompt_of, tiny_model

from morphserve.configs.errors import OutOfBudget
from morphserve.configs.schema import CacheConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.device import open_device
from morphserve.runtime.device.cuda import GRAPH_BYTES, CudaDevice
from morphserve.runtime.kernels import load_kernels
from morphserve.runtime.loader import LoadedModel

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MIB = 2**20


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    found = open_device("cuda")
    assert isinstance(found, CudaDevice)
    yield found
    gc.collect()
    torch.cuda.synchronize()


def model_on(device: CudaDevice) -> LoadedModel:
    return replace(tiny_model(load_kernels("reference")), device=device)


def test_memory_is_told_and_given(device: CudaDevice) -> None:
    memory = device.memory(CacheConfig(), 0)
    assert 0 < memory.free() < torch.cuda.get_device_properties(0).total_memory
    assert device.allocate(3 * MIB).device == device.location
    with pytest.raises(OutOfBudget, match="cannot give"):
        device.allocate(2**50)


def test_activations_are_measured_without_the_arena(device: CudaDevice) -> None:
    def run() -> None:
        device.allocate(64 * MIB)
        torch.empty(100 * MIB, dtype=torch.uint8, device=device.location)

    taken = device.measure(run)
    assert taken is not None and 98 * MIB <= taken - GRAPH_BYTES <= 104 * MIB


def test_images_are_pinned_where_they_are_and_as_long_as_they_live(device: CudaDevice) -> None:
    for _ in range(2):  # the second time perhaps at the same addresses
        model = model_on(device)
        hosts = [image.host for image in model.images[Variant.FULL]]
        device.pin(hosts)
        assert device._is_pinned and all(host.is_pinned() for host in hosts)
        del model, hosts
        gc.collect()


def test_an_error_that_was_handled_is_not_raised_again(device: CudaDevice) -> None:
    host = tiny_model(load_kernels("reference")).images[Variant.FULL][0].host
    device.pin([host])
    device.pin([host])  # it is already, which is an error to CUDA
    assert device._is_pinned
    assert torch.ones(2, device=device.location).sum().item() == 2


def down_and_up(turn: int) -> list[tuple[int, Variant]]:
    to = (Variant.INT4, Variant.FULL)[turn // 12 % 2]
    return [(layer, to) for layer in (3, 0)]


@pytest.mark.parametrize("pinned", [True, False])
def test_layers_are_what_they_should_be_after_swaps(device: CudaDevice, pinned: bool) -> None:
    if not pinned:
        device.pin = lambda images: None  # type: ignore[method-assign]
    driver = Driver(model_on(device), kv_tokens=120)
    for i in range(6):
        driver.add(f"r{i}", prompt_of(i, 9 + 13 * i), max_tokens=40)
    driver.run(down_and_up)
    assert not driver.parts.swapper.failures
    assert driver.moved > 0, "no live block was moved"
    for layer, variant in enumerate(driver.parts.layers.variants):
        slab, image = driver.plan.slabs[layer], driver.model.images[variant][layer]
        found = driver.arena.span(slab.offsets[variant], image.num_bytes)
        assert torch.equal(found.cpu(), image.host)
    still = Driver(tiny_model(load_kernels("reference")), kv_tokens=512)
    first = still.add("r0", prompt_of(0, 9), max_tokens=1)
    still.run(lambda turn: [])
    assert driver.requests["r0"].output[:1] == first.output


def test_starting_and_committing_waits_for_nothing_and_allocates_nothing(
    device: CudaDevice,
) -> None:
    driver = Driver(model_on(device), kv_tokens=120)
    parts = driver.parts
    for to in (Variant.INT4, Variant.FULL):
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert parts.swapper.start(3, to)
            parts.swapper.advance()
            while not parts.swapper.commit_ready():
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
