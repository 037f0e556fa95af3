"""llama.cpp with its RPC back end: the same source as the peers' llama.cpp, for this very CPU, kept in .mlx/rpc."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench_common import ROOT
from bench_peers.programs import PEERS_PYTHON, VERSIONS

DIRECTORY = ROOT / ".mlx/rpc"
LIBRARIES = DIRECTORY / "build/bin"  # libllama and its back ends, which the client loads
SERVER = LIBRARIES / "ggml-rpc-server"

PACKAGE = next(version for version in VERSIONS if version.startswith("llama-cpp-python=="))
SOURCE = "vendor/llama.cpp"  # in that package
SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "GGML_RPC": "ON",
    "GGML_RPC_RDMA": "OFF",  # it is the network that is counted
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",  # a checkout that is moved keeps it
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
}
TARGETS = ["llama", "ggml-rpc-server"]


def llama_cpp() -> None:
    """Builds it once for this version and these settings."""
    wanted = "\n".join([PACKAGE, json.dumps(SETTINGS), *TARGETS])
    stamp = DIRECTORY / "built"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("bench: building llama.cpp with its RPC back end in .mlx/rpc, which takes some minutes", file=sys.stderr)
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    settings = [f"-D{name}={value}" for name, value in SETTINGS.items()]
    log = DIRECTORY / "log"
    source = unpacked()
    step(["cmake", "-S", source, "-B", DIRECTORY / "build", *settings], log)
    step(["cmake", "--build", DIRECTORY / "build", f"-j{os.cpu_count()}", "--target", *TARGETS], log)
    stamp.write_text(wanted)


def unpacked() -> Path:
    """The source of llama.cpp, out of the package's source archive."""
    command = [PEERS_PYTHON, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "llama-cpp-python", "-d", DIRECTORY / "archive", PACKAGE]
    subprocess.run(command, check=True, stdout=sys.stderr)
    archive = only(DIRECTORY / "archive", "*.tar.gz")
    shutil.unpack_archive(archive, DIRECTORY / "source")
    return only(DIRECTORY / "source", "*") / SOURCE


def only(directory: Path, pattern: str) -> Path:
    """The one path of this pattern."""
    found = list(directory.glob(pattern))
    assert len(found) == 1, f"{directory} has {len(found)} of {pattern}, expected one"
    return found[0]


def step(command: list, log: Path) -> None:
    """Runs a command of the build, and says where its output is if it fails."""
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}; its output is in {log}")
