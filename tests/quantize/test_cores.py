"""How many threads compute where a process does not get the whole machine."""

import os
from pathlib import Path

import pytest

from morphserve.quantize.cores import cpu_quota, default_threads, own_cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_hardware_threads_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4}, raising=False)
    for cpu, siblings in enumerate(["0,4", "1,5", "2,6", "3,7", "0,4"]):
        write(tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list", f"{siblings}\n")
    assert own_cores(tmp_path) == 2
    assert own_cores(tmp_path / "absent") == 3


@pytest.mark.parametrize(
    ("group", "limit"),
    [
        (".", {"cpu.max": "150000 100000"}),
        ("outer", {"cpu.max": "150000 100000"}),
        ("outer/inner", {"cpu.max": "150000 100000"}),
        ("cpu/outer", {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}),
    ],
)
def test_the_narrowest_group_limits_the_time(
    tmp_path: Path, group: str, limit: dict[str, str]
) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    write(own, "4:memory:/other\n3:cpu,cpuacct:/outer/inner\n0::/outer/inner\n")
    write(root / "outer" / "inner" / "cpu.max", "max 100000")
    write(root / "cpu" / "cpu.cfs_quota_us", "-1")
    write(root / "other" / "cpu.max", "10000 100000")
    assert cpu_quota(root, own) is None
    for name, text in limit.items():
        write(root / group / name, text)
    assert cpu_quota(root, own) == 1.5
    assert cpu_quota(root / "absent", own / "absent") is None


def test_threads_keep_to_the_cores_and_to_the_time_that_are_granted() -> None:
    cores = own_cores()
    assert default_threads(None) == default_threads(cores + 0.5) == cores
    assert default_threads(0.2) == default_threads(1.9) == 1
