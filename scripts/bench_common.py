"""What every part of scripts/bench uses: where things are, random checkpoints, runs, medians, the machine's name."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "mlx-pipe"


def checkpoint(shape: str, bits: int, layers: int | None = None, python: Path | str = sys.executable) -> Path:
    """A random checkpoint of this shape, made if it is not there, by a Python that has numpy."""
    name = f"random-{shape}-{bits}bit" + (f"-{layers}layers" if layers else "")
    out = ROOT / "models" / name
    if not (out / "config.json").exists():
        command = [python, ROOT / "scripts/make-checkpoint", "--shape", shape, "--bits", str(bits)]
        command += ["--layers", str(layers)] if layers else []
        path = os.pathsep.join(filter(None, [str(ROOT / ".mlx/python"), os.environ.get("PYTHONPATH")]))
        subprocess.run([*command, out], check=True, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    return out


def mpi_command(ranks: int, model: Path, *options: str | Path) -> list[str | Path]:
    """The command line of a run on this machine's CPU."""
    launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    if os.geteuid() == 0:
        launcher.insert(1, "--allow-run-as-root")
    return [*launcher, PROGRAM, "--model", model, "--device", "cpu", *options]


def run(ranks: int, model: Path, requests: list[dict], *options: str) -> dict:
    """The report of one run on this machine's CPU."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = mpi_command(ranks, model, "--report", report, *options)
        done = subprocess.run(command, input=lines, text=True, capture_output=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr}")
        return json.loads(report.read_text())


def spread(values: list[float], digits: int = 2) -> str:
    """Median, and the range that it comes from."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def cpu_name() -> str:
    """What the system calls its processor; its architecture where it has no name for it."""
    for command in (["lscpu"], ["sysctl", "machdep.cpu.brand_string"]):
        try:
            lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            label, _, value = line.partition(":")
            if label.strip() in ("Model name", "machdep.cpu.brand_string"):
                return f"{value.strip()} ({platform.machine()})"
    return platform.machine()
