"""llama.cpp on two RPC servers of one thread, as its own programs would start it; new ones for every measurement."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bench_peers
from bench_peers.programs import PEERS_PYTHON

from . import build

SERVERS = 2
START_S = 20.0  # a server that takes longer does not come
CLIENT = Path(__file__).resolve().parent / "llama_cpp_rpc.py"


def decode(gguf: Path, sequences: int, steps: int) -> dict:
    """tokens_per_s of so many sequences together; bytes_per_token over the network, both directions."""
    return client(gguf, "--sequences", str(sequences), "--steps", str(steps))


def prompt(gguf: Path, tokens: int) -> dict:
    """first_token_s of a prompt, once the weights are there; load_s until they are."""
    return client(gguf, "--prefill", str(tokens))


def client(gguf: Path, *arguments: str) -> dict:
    """What the measuring client says, beside two servers of its own."""
    rate_program = Path(bench_peers.__file__).resolve().parent
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(build.LIBRARIES), "PYTHONPATH": str(rate_program)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    with servers() as addresses:
        command = [PEERS_PYTHON, CLIENT, gguf, "--servers", ",".join(addresses), *arguments]
        done = subprocess.run(command, text=True, capture_output=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def servers() -> Iterator[list[str]]:
    """Addresses of servers that listen until the block ends."""
    ports = free_ports(SERVERS)
    with tempfile.TemporaryFile("w+") as log:
        started = [
            subprocess.Popen([build.SERVER, "-t", "1", "-p", str(port)], stdout=log, stderr=subprocess.STDOUT)
            for port in ports
        ]
        try:
            for port, server in zip(ports, started):
                wait_until_listening(port, server, log)
            yield [f"127.0.0.1:{port}" for port in ports]
        finally:
            for server in started:
                server.terminate()
            for server in started:
                server.wait()  # only then does the system count its time as ours


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def wait_until_listening(port: int, server: subprocess.Popen, log) -> None:
    """Returns once a connection is taken."""
    given_up = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < given_up:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)
    log.seek(0)
    sys.exit(f"bench: the RPC server at port {port} does not listen:\n{log.read()}")
