"""`morph doctor`: what it finds here, and what it says of machines that lack something."""

import dataclasses
import json
import resource
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from morphserve.morphcli import doctor
from morphserve.morphcli.app import app
from morphserve.morphcli.doctor import Mark
from morphserve.runtime.kernels import native
from morphserve.runtime.kernels.native import NativeUnavailable

NAMES = [
    *("python", "torch", "transformers", "tokenizers", "cpu", "cores", "memory", "kernels"),
    *("OMP_WAIT_POLICY", "huge pages", "open files", "gpu", "port", "demo model"),
]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_machine_that_runs_these_tests_can_serve() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line[0] in "✓!✗"]
    assert all(line[2:].startswith(name) for line, name in zip(lines, NAMES, strict=True))
    assert "✗" not in result.stdout


def test_findings_are_one_json_document() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "--port", "8123"])
    findings = json.loads(result.stdout)
    assert [f["name"] for f in findings] == [n if n != "port" else "port 8123" for n in NAMES]
    assert {f["mark"] for f in findings} <= {"good", "note"}
    assert all(f["remedy"] for f in findings if f["mark"] != "good")


def test_what_is_needed_and_missing_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEMO_MODEL", "no/such/model")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "✗ demo model       there is no model folder no/such/model" in result.stdout
    assert "can serve" not in result.stdout


def test_an_old_python_and_a_missing_library_are_needed() -> None:
    assert doctor.python((3, 10, 4)).mark is Mark.MISSING
    assert doctor.python((3, 11, 0)).mark is Mark.GOOD
    absent = doctor.library("no-such-distribution")
    assert (absent.mark, absent.remedy) == (Mark.MISSING, "pip install no-such-distribution")


@pytest.mark.parametrize(
    ("flags", "extensions", "lacking"),
    [
        ("flags : avx2 avx512bw avx512_bf16 avx512_vnni", ": AVX2, AVX-512, BF16, VNNI", ""),
        ("flags : avx2 avx512bw avx512_vnni amx_bf16", ": AVX2, AVX-512, VNNI", "BF16"),
        ("flags : fpu avx2", ": AVX2", "AVX-512, BF16, VNNI"),
        ("flags : fpu sse4_2", "no vector extension that helps", "AVX-512, BF16, VNNI"),
        ("Features : fp asimd asimddp bf16", ": NEON", "AVX-512, BF16, VNNI"),
    ],
)
def test_the_cpu_is_judged_by_the_instructions_that_kernels_use(
    tmp_path: Path, flags: str, extensions: str, lacking: str
) -> None:
    finding = doctor.cpu(write(tmp_path / "cpuinfo", f"processor : 0\n{flags}\n"))
    assert finding.found.endswith(extensions)
    assert finding.mark is (Mark.NOTE if lacking else Mark.GOOD)
    assert finding.remedy == (f"kernels run slower without {lacking}" if lacking else "")


def test_a_limit_on_processor_time_is_told_with_the_threads_that_keep_to_it() -> None:
    finding = doctor.cores(0.5, "")
    assert finding.mark is Mark.GOOD
    assert finding.found.endswith("may be used, with time for 0.5; threads by default: 1")
    assert "with time" not in doctor.cores(None, "").found


def test_more_threads_than_cores_are_a_note_with_the_number_to_use() -> None:
    finding = doctor.cores(1.5, "999")
    assert finding.mark is Mark.NOTE and finding.remedy.endswith("--threads 1")
    assert finding.found.endswith("with time for 1.5; OMP_NUM_THREADS is 999")


def test_of_a_list_of_thread_counts_the_outermost_is_meant() -> None:
    assert doctor.cores(None, "1,4").found.endswith("threads by default: 1")
    assert doctor.cores(1.0, "4,2").remedy.endswith("slow each other down: serve with --threads 1")


@pytest.mark.parametrize("omp", ["0", "many", ",2", "²"])
def test_what_is_no_count_of_threads_is_told(omp: str) -> None:
    finding = doctor.cores(1.0, omp)
    assert finding.mark is Mark.NOTE and finding.found.endswith(f"OMP_NUM_THREADS is {omp}")
    assert finding.remedy == "that is no number of threads: serve with --threads 1"


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_groups_limit_counts_as_memory(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, str(2**30))
    finding = doctor.memory(tmp_path)
    assert finding.mark is Mark.NOTE and "its group may hold 1.0 GiB" in finding.found


def test_kernels_that_do_not_build_say_what_runs_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    finding = doctor.kernels()
    assert finding.mark is Mark.NOTE
    assert "no C compiler" in finding.found and "torch runs instead" in finding.remedy

    def fail() -> None:
        raise NativeUnavailable("cc failed: no luck")

    assert doctor.kernels(fail).found == "cc failed: no luck"


def test_kernels_that_are_compiled_at_every_start_are_a_note_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", "")))
    finding = doctor.kernels()
    assert finding.mark is Mark.NOTE and "compiled at every start: " in finding.found
    assert "set XDG_CACHE_HOME" in finding.remedy
    assert caplog.text == ""  # it would run across what doctor prints


def test_settings_of_the_system_are_judged(tmp_path: Path) -> None:
    assert doctor.waiting("passive").mark is Mark.GOOD
    assert doctor.waiting("ACTIVE").mark is Mark.NOTE
    assert doctor.huge_pages(write(tmp_path / "a", "always [madvise] never")).mark is Mark.GOOD
    assert doctor.huge_pages(write(tmp_path / "n", "always madvise [never]")).mark is Mark.NOTE
    assert doctor.huge_pages(tmp_path / "absent").found == "not known"
    assert doctor.open_files(1024).remedy.endswith("ulimit -n 4096")
    assert doctor.open_files(resource.RLIM_INFINITY).mark is Mark.GOOD


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = doctor.free_port(port)
    assert finding.name == f"port {port}" and finding.mark is Mark.NOTE
    assert "--port" in finding.remedy


H200 = doctor.Gpu("NVIDIA H200", (9, 0), 138 * 2**30, 140 * 2**30)


def test_a_gpu_is_told_with_what_its_kernels_need(tmp_path: Path) -> None:
    write(tmp_path / "version", "580.65.06\n")
    first, *rest = doctor.gpu(lambda: [H200], tmp_path)
    assert first.mark is Mark.GOOD
    assert first.found == "NVIDIA H200, 138.0 GiB free of 140.0 GiB, driver 580.65.06"
    assert [finding.name for finding in rest] == ["triton", "locked memory"]


def test_a_gpu_that_is_too_old_is_left_to_others(tmp_path: Path) -> None:
    found = next(doctor.gpu(lambda: [dataclasses.replace(H200, capability=(7, 5))], tmp_path))
    assert found.mark is Mark.NOTE
    assert found.remedy == "its compute capability is 7.5, the kernels need 8.0: the CPU serves"


def test_a_driver_without_a_gpu_for_torch_is_worth_a_look(tmp_path: Path) -> None:
    (finding,) = doctor.gpu(list, tmp_path)
    assert finding.mark is Mark.NOTE and "a torch that is made with CUDA" in finding.remedy
    (finding,) = doctor.gpu(list, tmp_path / "none")
    assert (finding.mark, finding.found) == (Mark.GOOD, "none that torch sees: the CPU serves")


def test_a_torch_that_does_not_load_is_missing() -> None:
    def broken() -> list[doctor.Gpu]:
        raise OSError("libcudart.so.13: cannot open shared object file")

    (finding,) = doctor.gpu(broken)
    assert finding.mark is Mark.MISSING and "libcudart" in finding.found


def test_a_limit_of_locked_memory_is_told() -> None:
    assert doctor.locked_memory(resource.RLIM_INFINITY).mark is Mark.GOOD
    finding = doctor.locked_memory(8 * 2**20)
    assert (finding.mark, finding.found) == (Mark.NOTE, "at most 8 MiB")
