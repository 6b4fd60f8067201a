"""The C kernels: compiled for this machine at first use, kept in the user's cache, loaded."""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from morphserve.quantize.cores import cpu_quota, default_threads

SOURCES = (
    "pool.c",
    "scratch.c",
    "activations.c",
    "linear.c",
    "multiply_int4.c",
    "multiply_int8.c",
    "multiply_bf16.c",
    "multiply_f32.c",
    "rope.c",
    "queries.c",
    "attention.c",
    "pointwise.c",
    "probe.c",
    "kept.c",
    "sampler.c",
    "forward.c",
)
HEADERS = (
    "activations.h",
    "attend.h",
    "attention.h",
    "codes.h",
    "kept.h",
    "linear.h",
    "multiply.h",
    "pages.h",
    "pointwise.h",
    "pool.h",
    "queries.h",
    "scratch.h",
    "tiles.h",
    "vectors.h",
)
FLAGS = (
    *("-std=gnu11", "-O2", "-march=native", "-pthread", "-fPIC"),
    # Batch invariance rests on the first of these: a compiler may else contract products and sums
    # in one tile and not in another.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# Its own functions are found before those of the same name in another library.
LINKED = ("-shared", *(("-Wl,-Bsymbolic",) if sys.platform == "linux" else ()))
KEPT_S = 30 * 24 * 3600.0  # after a library was last loaded
REMEDY = "set XDG_CACHE_HOME to a folder where libraries can be written and loaded from"

log = logging.getLogger(__name__)

_ptr, _i32, _i64, _f32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "morph_linear": [_ptr, _ptr, _i64, _ptr, _i32],
    "morph_layers": [*[_ptr] * 5, _i64, _i32],
    "morph_forward": [*[_ptr] * 6, _i64, *[_ptr] * 3, _i32],
    "morph_embed": [_i32, _ptr, _ptr, _i64, _i64, _ptr],
    "morph_rms_norm": [_ptr, _ptr, _ptr, _f32, _i64, _i64, _ptr],
    "morph_silu_mul": [_ptr, _i64, _i64, _ptr],
    "morph_rope_write_kv": [_i32, *[_ptr] * 9, _f32, *[_i64] * 5, _i32],
    "morph_attention": [_i32, *[_ptr] * 6, *[_i64] * 6, _i32],
    "morph_sample": [_ptr, _ptr, _i64, _i64, _ptr, _i32],
    "morph_probe_read": [_ptr, _i64, _ptr],
    "morph_probe_multiply": [_i32, _i64, _ptr],
}


class NativeUnavailable(Exception):
    """The C kernels cannot be built or loaded; the message says why."""


class Opened(NamedTuple):
    library: ctypes.CDLL
    unkept: str | None  # why the next start has to compile again; None: it does not


def load_library() -> ctypes.CDLL:
    """The compiled kernels, from the cache or built now. Raises NativeUnavailable."""
    library, unkept = open_library()
    if unkept is not None:
        text = "the C kernels cannot be kept (%s) and are compiled at every start: %s"
        log.warning(text, unkept, REMEDY)
    for name, argtypes in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = argtypes, None
    return library


def open_library() -> Opened:
    """The library, and whether the cache keeps it. Raises NativeUnavailable."""
    try:
        return Opened(_from_cache(cache_folder()), None)
    except (OSError, RuntimeError) as error:  # not writable, not executable; nobody's home
        unkept = str(error)
    try:
        # Not kept, as others could put a library of theirs where we would look for it.
        with tempfile.TemporaryDirectory(prefix="morphserve-") as folder:
            return Opened(ctypes.CDLL(str(build(Path(folder)))), unkept)
    except OSError as error:
        raise NativeUnavailable(str(error)) from error


def _from_cache(folder: Path) -> ctypes.CDLL:
    library = build(folder)
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # a full disk or a crash has cut it off
        library.unlink(missing_ok=True)
    return ctypes.CDLL(str(build(folder)))


def cache_folder() -> Path:
    """Raises RuntimeError where the user has no home."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "morphserve"


def build(folder: Path) -> Path:
    """The library in `folder`, compiled there unless one of the same key exists.

    Raises NativeUnavailable without a working compiler, OSError where `folder` is not writable.
    """
    compiler = find_compiler()
    library = folder / f"kernels-{_key(compiler)}.so"
    if library.exists():
        with contextlib.suppress(OSError):
            library.touch()  # in use
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unused(folder)
        log.info("compiling the CPU kernels for this machine, once")
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            # Renamed when whole: a process that compiles at the same time sees all or nothing.
            os.replace(_compile(compiler, Path(scratch)), library)
    return library


def find_compiler() -> str:
    """Raises NativeUnavailable where there is none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NativeUnavailable("no C compiler (cc, gcc or clang) was found")
    return compiler


def _remove_unused(folder: Path) -> None:
    """Removes what was built for other versions or machines and is no longer loaded."""
    for entry in (*folder.glob("kernels-*.so"), *folder.glob("build-*")):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime > KEPT_S:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _compile(compiler: str, scratch: Path) -> Path:
    for name in SOURCES + HEADERS:
        (scratch / name).write_bytes(_source(name))
    output = scratch / "kernels.so"
    with ThreadPoolExecutor(default_threads(cpu_quota())) as pool:  # several compilers at once
        objects = list(pool.map(lambda name: _compile_one(compiler, scratch / name), SOURCES))
    _run([compiler, *FLAGS, *LINKED, "-o", str(output), *objects, "-lm"])
    return output


def _compile_one(compiler: str, source: Path) -> str:
    made = str(source.with_suffix(".o"))
    _run([compiler, *FLAGS, "-c", "-o", made, str(source)])
    return made


def _key(compiler: str) -> str:
    """Of everything that the library's machine code depends on."""
    parts = [_source(name) for name in SOURCES + HEADERS]
    parts += [" ".join((*FLAGS, *LINKED)).encode(), _run([compiler, "--version"]), _cpu_features()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _source(name: str) -> bytes:
    return resources.files("morphserve.runtime.kernels").joinpath(name).read_bytes()


def _cpu_features() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    wanted = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} failed: {error}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise NativeUnavailable(f"{command[0]} failed: {lines[0] if lines else 'no message'}")
    return done.stdout
