"""What `morph doctor` looks at: whether this machine can serve, and how well."""

import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from morphserve.configs.errors import MorphError
from morphserve.configs.load import DEMO_MODEL
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.cores import cpu_quota, default_threads, own_cores, read
from morphserve.quantize.machine import device_name, free_memory
from morphserve.runtime.device import LEAST_CAPABILITY, num_gpus
from morphserve.runtime.kernels.native import REMEDY, NativeUnavailable, Opened, open_library

_PYTHON = (3, 11)
_FILES = 4096  # each connection takes one
_LITTLE_MEMORY = 2 * 2**30
_EXTENSIONS = {  # that the kernels use, as /proc/cpuinfo names them
    "AVX2": ("avx2",),
    "AVX-512": ("avx512bw",),
    "BF16": ("avx512_bf16",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "NEON": ("asimd",),
}
_MADE_FOR = ("AVX-512", "BF16", "VNNI")  # of these


class Mark(StrEnum):
    GOOD = "good"
    NOTE = "note"  # it serves, but not as well as it could
    MISSING = "missing"  # it cannot serve


class Finding(msgspec.Struct, frozen=True):
    """What was found of one thing, and what to do about it."""

    name: str
    mark: Mark
    found: str
    remedy: str = ""


def examine(port: int) -> Iterator[Finding]:
    """Everything, what is needed first."""
    yield python()
    for package in ("torch", "transformers", "tokenizers"):
        yield library(package)
    yield cpu()
    yield cores(cpu_quota(), os.environ.get("OMP_NUM_THREADS", ""))
    yield memory()
    yield kernels()
    yield waiting(os.environ.get("OMP_WAIT_POLICY", ""))
    yield huge_pages()
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield from gpu()
    yield free_port(port)
    yield demo_model()


def python(found: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    text = ".".join(map(str, found))
    if found >= _PYTHON:
        return Finding("python", Mark.GOOD, text)
    return Finding("python", Mark.MISSING, text, "install Python 3.11 or newer")


def library(name: str) -> Finding:
    try:
        return Finding(name, Mark.GOOD, version(name))
    except PackageNotFoundError:
        return Finding(name, Mark.MISSING, "not installed", f"pip install {name}")


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return Finding("cpu", Mark.NOTE, device_name(), "its instruction sets are not known")
    words = {w for line in lines if line.startswith(("flags", "Features")) for w in line.split()}
    has = [name for name, flags in _EXTENSIONS.items() if words.intersection(flags)]
    text = f"{device_name()}: {', '.join(has) or 'no vector extension that helps'}"
    missing = [name for name in _MADE_FOR if name not in has]
    if not missing:
        return Finding("cpu", Mark.GOOD, text)
    return Finding("cpu", Mark.NOTE, text, f"kernels run slower without {', '.join(missing)}")


def cores(quota: float | None, omp: str) -> Finding:
    """`omp` is OMP_NUM_THREADS: a count, or one for each depth of nesting."""
    mine, threads = own_cores(), default_threads(quota)
    text = f"{mine} of {os.cpu_count()} may be used"
    if quota is not None and quota < mine:
        text += f", with time for {quota:g}"
    asked = (omp or str(threads)).partition(",")[0].strip()
    count = int(asked) if asked.isdecimal() else 0
    if 0 < count <= threads:
        return Finding("cores", Mark.GOOD, f"{text}; threads by default: {count}")
    why = "more take turns and slow each other down" if count else "that is no number of threads"
    remedy = f"{why}: serve with --threads {threads}"
    return Finding("cores", Mark.NOTE, f"{text}; OMP_NUM_THREADS is {omp}", remedy)


def memory(root: Path = Path("/sys/fs/cgroup")) -> Finding:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, text = free_memory(), ""
    limit = read(root / "memory.max") or read(root / "memory" / "memory.limit_in_bytes")
    if limit.isdigit() and int(limit) < total:
        text = f"; its group may hold {_gib(int(limit))}"
        used = read(root / "memory.current") or read(root / "memory" / "memory.usage_in_bytes")
        free = min(free, int(limit) - int(used or 0))
    text = f"{_gib(free)} free of {_gib(total)}{text}"
    if free >= _LITTLE_MEMORY:
        return Finding("memory", Mark.GOOD, text)
    return Finding("memory", Mark.NOTE, text, "little is left: set --memory-budget")


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def kernels(load: Callable[[], Opened] = open_library) -> Finding:
    started = time.monotonic()
    try:
        unkept = load().unkept
    except NativeUnavailable as error:
        remedy = "torch runs instead, several times slower: install a C compiler"
        return Finding("kernels", Mark.NOTE, str(error), remedy)
    if unkept is not None:
        return Finding("kernels", Mark.NOTE, f"in C, compiled at every start: {unkept}", REMEDY)
    return Finding("kernels", Mark.GOOD, f"in C, ready in {time.monotonic() - started:.1f} s")


def waiting(policy: str) -> Finding:
    name = "OMP_WAIT_POLICY"
    if policy.upper() == "PASSIVE":
        return Finding(name, Mark.GOOD, policy)
    remedy = "threads that spin slow each other down: leave it unset, or PASSIVE"
    return Finding(name, Mark.NOTE, policy or "not set", remedy)


def huge_pages(
    setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled"),
) -> Finding:
    chosen = read(setting).partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise"):
        return Finding("huge pages", Mark.GOOD, chosen)
    remedy = f"a little slower without: echo madvise > {setting}"
    return Finding("huge pages", Mark.NOTE, chosen or "not known", remedy)


def open_files(limit: int) -> Finding:
    if limit == resource.RLIM_INFINITY or limit >= _FILES:
        shown = "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}"
        return Finding("open files", Mark.GOOD, shown)
    remedy = f"each connection takes one: ulimit -n {_FILES}"
    return Finding("open files", Mark.NOTE, f"at most {limit}", remedy)


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    free: int  # bytes
    total: int


def look_for_gpus() -> list[Gpu]:
    """Those that torch sees; it makes a context on each."""
    import torch

    return [
        Gpu(
            torch.cuda.get_device_name(i),
            torch.cuda.get_device_capability(i),
            *torch.cuda.mem_get_info(i),
        )
        for i in range(num_gpus())
    ]


def gpu(
    look: Callable[[], Sequence[Gpu]] = look_for_gpus, driver: Path = Path("/sys/module/nvidia")
) -> Iterator[Finding]:
    """Each GPU and, where there is one, what its kernels need."""
    try:
        found = look()
    except Exception as error:  # a broken torch raises anything from ImportError to OSError
        yield Finding("gpu", Mark.MISSING, f"torch does not load: {error}", "reinstall torch")
        return
    if not found:
        yield _no_gpu(driver)
        return
    for each in found:
        yield _gpu(each, read(driver / "version").strip() or "of unknown version")
    yield _triton()
    yield locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])


def _no_gpu(driver: Path) -> Finding:
    text = "none that torch sees: the CPU serves"
    if not driver.exists():
        return Finding("gpu", Mark.GOOD, text)
    remedy = (
        "there is an NVIDIA driver: install a torch that is made with CUDA, and look at "
        "`nvidia-smi` and CUDA_VISIBLE_DEVICES"
    )
    return Finding("gpu", Mark.NOTE, text, remedy)


def _gpu(found: Gpu, driver: str) -> Finding:
    text = f"{found.name}, {_gib(found.free)} free of {_gib(found.total)}, driver {driver}"
    if found.capability >= LEAST_CAPABILITY:
        return Finding("gpu", Mark.GOOD, text)
    has, needs = (".".join(map(str, pair)) for pair in (found.capability, LEAST_CAPABILITY))
    remedy = f"its compute capability is {has}, the kernels need {needs}: the CPU serves"
    return Finding("gpu", Mark.NOTE, text, remedy)


def _triton() -> Finding:
    found = library("triton")
    if found.mark is Mark.GOOD:
        return found
    return Finding("triton", Mark.NOTE, found.found, f"the CPU serves without: {found.remedy}")


def locked_memory(limit: int) -> Finding:
    """`limit`: bytes that a process may lock."""
    name = "locked memory"
    if limit == resource.RLIM_INFINITY:
        return Finding(name, Mark.GOOD, "no limit")
    remedy = (
        "if the log says that host memory cannot be locked: `ulimit -l unlimited`, in a container "
        "`--ulimit memlock=-1`"
    )
    return Finding(name, Mark.NOTE, f"at most {limit / 2**20:.0f} MiB", remedy)


def free_port(port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            remedy = "choose another with --port, 0 for any free one"
            return Finding(f"port {port}", Mark.NOTE, error.strerror or str(error), remedy)
    return Finding(f"port {port}", Mark.GOOD, "free")


def demo_model() -> Finding:
    try:
        layers = open_checkpoint(DEMO_MODEL).architecture.num_layers
    except MorphError as error:
        return Finding("demo model", Mark.MISSING, str(error), "reinstall morphserve")
    return Finding("demo model", Mark.GOOD, f"{layers} layers")
