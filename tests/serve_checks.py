"""What the server's tests in Python share: checks that print a line each, and runs to compare with."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
from bench_common import PROGRAM, ROOT

MODEL = ROOT / "models/SmolLM2-135M-Instruct"


class Checks:
    """Prints a line for each check, and remembers whether one has failed. Ends the program after `limit_s`."""

    def __init__(self, limit_s: int = 100) -> None:
        self.passed = self.failed = 0
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"FAIL  all of it: not done within {limit_s} s"))
        signal.alarm(limit_s)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with all that has to be closed

    def that(self, holds: bool, what: str, found: object = None) -> bool:
        """Notes whether `what` holds; `found` is printed if it does not."""
        self.passed, self.failed = self.passed + bool(holds), self.failed + (not holds)
        print(f"ok    {what}" if holds else f"FAIL  {what}: found {found!r}"[:1000], flush=True)
        return bool(holds)

    def section(self, name: str, run: Callable[[], None]) -> None:
        """Runs some checks; an exception is a failure, and the next section runs all the same."""
        try:
            run()
        except Exception as error:  # whatever it is, the other sections say more
            self.that(False, name, f"{type(error).__name__}: {error}")

    def end(self) -> int:
        """The exit status."""
        print(f"{self.passed} passed, {self.failed} failed", flush=True)
        return 1 if self.failed or not self.passed else 0


def wait_for(what: str, found: Callable[[], object], limit_s: float = 20, pause_s: float = 0.05) -> object:
    """The first true value of `found`.

    Raises TimeoutError if there is none within `limit_s`."""
    end = time.monotonic() + limit_s
    while not (value := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {limit_s} s")
        time.sleep(pause_s)
    return value


def get(url: str, key: str | None = None) -> dict:
    """The JSON at an address."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def mpi_command(ranks: int, *options: str | Path) -> list[str | Path]:
    """The command line of the program on so many ranks of this machine."""
    launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    if os.geteuid() == 0:
        launcher.insert(1, "--allow-run-as-root")
    return [*launcher, PROGRAM, *options]


def from_stdin(
    requests: list[dict], *options: str, model: Path = MODEL, ranks: int = 3, limit_s: float = 120
) -> list[dict]:
    """The answers of a run over standard input, one a request."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    command = mpi_command(ranks, "--model", model, "--device", "cpu", *options)
    done = subprocess.run(command, input=lines, text=True, capture_output=True, timeout=limit_s)
    if done.returncode not in (0, 3):
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]
