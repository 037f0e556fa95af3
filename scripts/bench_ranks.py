"""The processes of a run's ranks on this machine: which they are, what they use. Linux only: it is read from /proc."""

import os
from pathlib import Path

from bench_common import PROGRAM


def are_known() -> bool:
    """Whether this system tells of processes in /proc."""
    return Path("/proc/self/stat").exists()


def rank_processes(launcher: int, count: int) -> list[int]:
    """Process ids of the launcher's children that are the program, in the order of their ranks."""
    ranks = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = (process / "exe").resolve() == PROGRAM.resolve() and parent(int(process.name)) == launcher
            environment = (process / "environ").read_bytes() if ours else b""
        except OSError:  # it has ended, or is somebody else's
            continue
        for variable in environment.split(b"\0"):
            name, _, value = variable.partition(b"=")
            if name == b"OMPI_COMM_WORLD_RANK":
                ranks[int(value)] = int(process.name)
    assert sorted(ranks) == list(range(count)), f"found the processes of ranks {sorted(ranks)}"
    return [ranks[rank] for rank in sorted(ranks)]


def stat(process: int) -> list[str]:
    """What /proc says of a process, from its state on; its name before that may hold anything."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def parent(process: int) -> int:
    """The process that started this one."""
    return int(stat(process)[1])


def cpu_s(process: int) -> float:
    """User and system time of all threads of a process."""
    user, system = stat(process)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def rss_bytes(process: int) -> int:
    """Memory of a process that is in RAM."""
    return int(stat(process)[21]) * os.sysconf("SC_PAGE_SIZE")
