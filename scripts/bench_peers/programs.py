"""The programs that measure, ours and the peers'. Each measurement is a process of its own: its threads and its memory
are gone before the next one starts."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from bench_common import ROOT

HERE = Path(__file__).resolve().parent
PEERS_DIR = ROOT / ".mlx/peers"
PEERS_PYTHON = PEERS_DIR / "bin/python"

# The versions that were measured; mlx is the one that scripts/setup links us with.
VERSIONS = ["llama-cpp-python==0.3.36", "mlx-lm==0.32.2", "mlx==0.32.2", "gguf==0.19.0"]
PACKAGES = [*VERSIONS, "mlx[cpu]; sys_platform == 'linux'", "numpy"]
# From source and for this very CPU, with no part that only reads pictures.
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}


def install_peers() -> None:
    """The virtual environment of the peers, made once for these versions and build options."""
    wanted = "\n".join([*PACKAGES, json.dumps(BUILD)])
    stamp = PEERS_DIR / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("bench: installing the peers in .mlx/peers; llama.cpp is built, which takes some minutes", file=sys.stderr)
    shutil.rmtree(PEERS_DIR, ignore_errors=True)
    venv.create(PEERS_DIR, with_pip=True)
    command = [PEERS_PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    command += ["--no-binary", "llama-cpp-python", *PACKAGES]
    environment = {**os.environ, **BUILD}
    environment.pop("PYTHONPATH", None)  # what is there is not in the virtual environment
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    stamp.write_text(wanted)


def build_bandwidth() -> Path:
    """bandwidth.c as a program for this very CPU."""
    program = PEERS_DIR / "bandwidth"
    command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-pthread", HERE / "bandwidth.c", "-o", program]
    subprocess.run(command, check=True)
    return program


def build_ours() -> Path | None:
    """Our measuring program; None, and a word about it, in a checkout that has none."""
    if not (ROOT / "examples/step_rate.rs").exists():
        print("bench: there is no examples/step_rate.rs here, so only the peers are measured", file=sys.stderr)
        return None
    command = ["cargo", "build", "--release", "--locked", "--quiet", "--example", "step_rate"]
    subprocess.run(command, cwd=ROOT, check=True)
    return ROOT / "target/release/examples/step_rate"


def bandwidth(program: Path, threads: int) -> float:
    """Bytes per second that so many threads read from memory, in the best of several passes."""
    return last_line([program, str(threads)])["best_bytes_per_s"]


def ours(program: Path | None, pair, case) -> float | None:
    """Tokens per second of mlx-pipe; None where the program or the model is missing."""
    if program is None or pair.checkpoint is None:
        return None
    return last_line([program, pair.checkpoint, "--threads", str(case.threads), *case.arguments])["tokens_per_s"]


def llama_cpp(pair, case) -> float:
    """Tokens per second of llama.cpp."""
    command = [PEERS_PYTHON, HERE / "llama_cpp_rate.py", pair.gguf, "--threads", str(case.threads), *case.arguments]
    return last_line(command)["tokens_per_s"]


def mlx_lm(pair, case) -> float | None:
    """Tokens per second of mlx-lm, which cannot be told a number of threads; None where the model is missing."""
    if pair.checkpoint is None:
        return None
    return last_line([PEERS_PYTHON, HERE / "mlx_lm_rate.py", pair.checkpoint, *case.arguments])["tokens_per_s"]


def last_line(command: list) -> dict:
    """The JSON that a measuring program ends with."""
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


PEERS = {"llama.cpp": llama_cpp, "mlx-lm f32": mlx_lm}  # by the name in a case
