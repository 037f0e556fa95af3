"""What every part of scripts/bench uses: where things are, random checkpoints, medians, the machine's name."""

import os
import platform
import statistics
import subprocess
import sys
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
