"""Which device serves, and what is said where the one that was asked for cannot."""

import logging
import sys
from collections.abc import Callable

import pytest
import torch

from morphserve.configs.errors import ConfigError
from morphserve.configs.load import load_policy
from morphserve.configs.schema import (
    CPU_DEFAULTS,
    CUDA_DEFAULTS,
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
)
from morphserve.runtime import device as device_module
from morphserve.runtime.device import open_device
from morphserve.runtime.device.cuda import CudaDevice
from morphserve.runtime.device.host import HostDevice

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes the tests' machine one with so many GPUs."""

    def make(gpus: int, capability: tuple[int, int] = (9, 0), triton: bool = True) -> None:
        cuda = torch.cuda
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(device_module, "num_gpus", lambda: gpus)
        monkeypatch.setattr(cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(cuda, "get_device_name", lambda name: f"GPU of {name}")
        monkeypatch.setattr(cuda, "set_device", lambda _: None)
        find = device_module.importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name: find(name) if name != "triton" or triton else None,
        )

    return make


def test_auto_is_the_first_gpu_that_can_serve_else_the_cpu(machine: Machine) -> None:
    machine(gpus=2)
    found = open_device("auto")
    assert isinstance(found, CudaDevice)
    assert (found.name, found.location) == ("GPU of cuda:0", torch.device("cuda", 0))
    assert open_device("cuda:1").name == "GPU of cuda:1"
    assert isinstance(open_device("cpu"), HostDevice)
    machine(gpus=0)
    assert isinstance(open_device("auto"), HostDevice)


def test_a_gpu_that_cannot_serve_is_told_of_once(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine(gpus=1, triton=False)
    assert isinstance(open_device("auto"), HostDevice)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "the CPU serves, though there is a GPU: its kernels need triton" in caplog.text


@pytest.mark.parametrize(
    ("name", "machine_has", "said"),
    [
        ("gpu", {"gpus": 1}, "there is no device 'gpu': use auto, cpu, cuda, or cuda:1"),
        ("cuda:", {"gpus": 1}, "there is no device 'cuda:'"),
        ("cuda", {"gpus": 0}, "torch sees no GPU: look at `nvidia-smi`"),
        ("cuda:3", {"gpus": 2}, "the last GPU that torch sees is cuda:1"),
        ("cuda", {"gpus": 1, "triton": False}, "`pip install triton`; or serve with --device cpu"),
        ("cuda", {"gpus": 1, "capability": (7, 5)}, "its compute capability is 7.5, and the kerne"),
    ],
)
def test_a_device_that_cannot_be_used_is_one_sentence_with_the_way_out(
    machine: Machine, name: str, machine_has: dict[str, object], said: str
) -> None:
    machine(**machine_has)
    with pytest.raises(ConfigError) as raised:
        open_device(name)
    assert said in str(raised.value)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is made with CUDA")
def test_a_torch_without_cuda_is_named() -> None:
    with pytest.raises(ConfigError, match="is made without CUDA"):
        open_device("cuda")


def test_the_cpu_needs_neither_triton_nor_cuda() -> None:
    import subprocess

    code = (
        "import sys, torch; from morphserve.runtime.device import open_device; "
        "import morphserve.runtime.build; open_device('cpu').link(); "
        "print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "False"]


def test_what_nobody_set_is_the_devices_to_choose() -> None:
    policy = load_policy("off")
    limits = SchedulerConfig(max_num_seqs=8)
    unset = frozenset({"block_tokens", "min_run_bytes", "max_num_batched_tokens"})
    config = EngineConfig("", policy, cache=CacheConfig(), scheduler=limits, unset=unset)
    settled = config.settled(CUDA_DEFAULTS)
    assert (settled.cache.block_tokens, settled.cache.min_run_bytes) == (32, 2 * 2**20)
    assert (settled.scheduler.max_num_seqs, settled.scheduler.max_num_batched_tokens) == (8, 2048)
    assert settled.settled(CPU_DEFAULTS) == settled
    assert config.settled(CPU_DEFAULTS) == EngineConfig("", policy, scheduler=limits)


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ((None, None), (64, 512)),
        ((600, None), (600, 600)),
        ((None, 8), (8, 8)),
        ((9, 8), (9, 8)),
    ],
)
def test_a_default_suits_the_limit_that_was_given(
    given: tuple[int | None, int | None], limits: tuple[int, int]
) -> None:
    assert CPU_DEFAULTS.limits(*given) == limits
