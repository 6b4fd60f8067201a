"""How many cores this process gets."""

import os
from collections.abc import Iterator
from pathlib import Path


def default_threads(quota: float | None) -> int:
    """One per core that this process gets: a thread that waits for its turn holds up all others.

    `quota`: cores' worth of time that it may take, as `cpu_quota` tells.
    """
    cores = own_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def own_cores(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores that this process may run on; hardware threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = (
        read(cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu)
        for cpu in os.sched_getaffinity(0)
    )
    return len(set(siblings))


def cpu_quota(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Cores' worth of time that this process's control groups allow; None: no limit."""
    quotas = [quota for group in _groups(root, own) if (quota := _quota_of(group)) is not None]
    return min(quotas, default=None)


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """Folders of the groups that this process is in, and of those around them.

    A container may see its own group as the root, under another path than the host's.
    """
    yield from (root, root / "cpu")
    for line in read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            mount = root / "cpu" if controllers else root
            group = mount / path.lstrip("/")
            yield from (group, *(outer for outer in group.parents if mount in outer.parents))


def _quota_of(group: Path) -> float | None:
    words = read(group / "cpu.max").split() or [
        read(group / "cpu.cfs_quota_us"),
        read(group / "cpu.cfs_period_us"),
    ]
    quota_us, period_us = words
    return int(quota_us) / int(period_us) if quota_us.isdigit() else None


def read(path: Path) -> str:
    """What a small file of the system holds; nothing where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
