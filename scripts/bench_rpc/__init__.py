"""scripts/bench rpc: this program on two ranks beside llama.cpp's RPC back end on two servers, same machine and shape.

    cases.py            what is measured, and what we want to reach
    build.py            llama.cpp with its RPC back end, built in .mlx/rpc
    theirs.py           two servers of one thread and a client that has no layers, started for every measurement
    llama_cpp_rpc.py    that client; runs in the virtual environment of the peers, .mlx/peers
    ours.py             two ranks of one thread, doing the same
    table.py            the medians, the ratios and the goals as Markdown

Both take turns, so that a machine that changes its mind does so for both.
"""

import sys

from bench_peers import models, programs

from . import build, ours, table, theirs
from .cases import PROMPT_TOKENS, TIMED_STEPS, TOGETHER

def measure(repeats: int) -> None:
    """Measures everything, and prints the table."""
    programs.install_peers()
    build.llama_cpp()
    pair = models.random_qwen3(8)
    measured = table.Measured()
    for number in range(repeats):
        sides = [("ours", ours, pair.checkpoint), ("theirs", theirs, pair.gguf)]
        for name, side, model in sides if number % 2 == 0 else reversed(sides):
            for sequences in TOGETHER:
                print(f"{number + 1}/{repeats} {name}: {sequences} together", file=sys.stderr)
                measured.take(name, sequences, lambda: side.decode(model, sequences, TIMED_STEPS))
            print(f"{number + 1}/{repeats} {name}: a prompt of {PROMPT_TOKENS} tokens", file=sys.stderr)
            measured.take(name, "prompt", lambda: side.prompt(model, PROMPT_TOKENS))
    print(table.page(measured, ours.hidden_bytes(pair.checkpoint), repeats))
