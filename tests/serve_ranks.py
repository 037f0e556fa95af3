"""A server of our own for a test: three ranks on a free port of this machine, and what their processes use."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from serve_checks import MODEL, mpi_command, wait_for  # and where bench_ranks is

import bench_ranks

READY = "mlx-pipe: ready on "
START_LIMIT_S, END_LIMIT_S = 120, 10


class Server:
    """Ranks that serve a model, for the time of a `with`."""

    def __init__(self, *options: str | Path, model: Path = MODEL, ranks: int = 3) -> None:
        self.command = mpi_command(ranks, "serve", "--model", model, "--device", "cpu", "--addr", "127.0.0.1:0")
        self.command += ["--drain-s", "5", *options]
        self.rank_count = ranks
        self.said = tempfile.TemporaryFile("w+")
        self.url = ""

    def __enter__(self) -> "Server":
        self.launcher = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.said, stderr=self.said)
        try:
            self.url = wait_for("a ready server", self.find_url, START_LIMIT_S)
            self.ranks = bench_ranks.rank_processes(self.launcher.pid, self.rank_count)
        except BaseException:
            self.__exit__()
            sys.exit(f"{' '.join(map(str, self.command))}\ndid not become ready:\n{self.log()}")
        return self

    def find_url(self) -> str | None:
        if self.launcher.poll() is not None:
            raise RuntimeError("the server has ended")
        lines = [line for line in self.log().splitlines() if line.startswith(READY)]
        return lines[0].removeprefix(READY) if lines else None

    def log(self) -> str:
        """What all ranks have said so far."""
        self.said.flush()
        self.said.seek(0)
        return self.said.read()

    def __exit__(self, *_: object) -> None:
        # First in order: then mpirun waits for its ranks, and their CPU time is known to be ours.
        for way in (signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL):
            self.launcher.send_signal(way)
            try:
                self.launcher.wait(END_LIMIT_S)
                break
            except subprocess.TimeoutExpired:
                continue

    def rss_bytes(self) -> list[int]:
        """Memory of every rank."""
        return [bench_ranks.rss_bytes(rank) for rank in self.ranks]

    def cpu_s(self) -> list[float]:
        """CPU time of every rank so far."""
        return [bench_ranks.cpu_s(rank) for rank in self.ranks]
