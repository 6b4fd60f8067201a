"""The C kernels: compiled for this machine at first use, kept in the user's cache, loaded."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch  # noqa: F401  (its libgomp must be the one that the library finds)

SOURCES = (
    "pool.c",
    "activations.c",
    "linear.c",
    "rope.c",
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
    "kept.h",
    "linear.h",
    "pages.h",
    "pointwise.h",
    "pool.h",
    "vectors.h",
)
FLAGS = (
    *("-std=gnu11", "-O2", "-ftree-vectorize", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)

_ptr, _i32, _i64, _f32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "morph_linear": [_ptr, _ptr, _i64, _ptr, _i32],
    "morph_layers": [_ptr, _i64, *[_ptr] * 4, _i32],
    "morph_embed": [_i32, _ptr, _ptr, _i64, _i64, _ptr],
    "morph_rms_norm": [_ptr, _ptr, _ptr, _f32, _i64, _i64, _ptr, _i32],
    "morph_silu_mul": [_ptr, _i64, _i64, _ptr, _i32],
    "morph_rope_write_kv": [_i32, *[_ptr] * 9, _f32, *[_i64] * 5, _i32],
    "morph_attention": [_i32, *[_ptr] * 6, *[_i64] * 6, _i32],
    "morph_sample": [_ptr, _ptr, _i64, _i64, _ptr, _i32],
    "morph_probe_read": [_ptr, _i64, _ptr],
    "morph_probe_multiply": [_i32, _i64, _ptr],
}


class NativeUnavailable(Exception):
    """The C kernels cannot be built or loaded; the message says why."""


def load_library() -> ctypes.CDLL:
    """The compiled kernels, from the cache or built now. Raises NativeUnavailable."""
    try:
        library = ctypes.CDLL(str(build(cache_folder())))
    except OSError as error:
        raise NativeUnavailable(str(error)) from error
    for name, argtypes in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = argtypes, None
    return library


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "morphserve"


def build(folder: Path) -> Path:
    """The library in `folder`, compiled there unless one of the same key exists.

    Raises NativeUnavailable without a working compiler, OSError where `folder` is not writable.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NativeUnavailable("no C compiler (cc, gcc or clang) was found")
    library = folder / f"kernels-{_key(compiler)}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            # Renamed when whole: a process that compiles at the same time sees all or nothing.
            os.replace(_compile(compiler, Path(scratch)), library)
    return library


def _compile(compiler: str, scratch: Path) -> Path:
    for name in SOURCES + HEADERS:
        (scratch / name).write_bytes(_source(name))
    output = scratch / "kernels.so"
    _run([compiler, *FLAGS, "-o", str(output), *(str(scratch / name) for name in SOURCES), "-lm"])
    return output


def _key(compiler: str) -> str:
    """Of everything that the library's machine code depends on."""
    parts = [_source(name) for name in SOURCES + HEADERS]
    parts += [" ".join(FLAGS).encode(), _run([compiler, "--version"]), _cpu_features()]
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
