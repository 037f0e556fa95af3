"""Measures llama.cpp with all layers on RPC servers: one load, one measurement, one line of JSON.

    python llama_cpp_rpc.py MODEL.gguf --servers HOST:PORT,... --sequences S --steps K     decode
    python llama_cpp_rpc.py MODEL.gguf --servers HOST:PORT,... --prefill P                 one prompt of P tokens

The steps are those of bench_peers/llama_cpp_rate.py, which must be on PYTHONPATH; $LLAMA_CPP_LIB_PATH says where the
libraries with the RPC back end are. All layers and the head go to the servers, in equal parts where these have equal
memory; the client looks up embeddings. Once a context is made, the weights are there.
"""

import argparse
import ctypes
import json
import os
import time
from pathlib import Path

import llama_cpp_rate
from llama_cpp_rate import PROMPT, UNTIMED_PREFILL, UNTIMED_STEPS, Context


def use_servers(servers: list[str]) -> None:
    """Makes each server a device, which llama.cpp then prefers to the CPU."""
    suffix = "dylib" if os.uname().sysname == "Darwin" else "so"
    libraries = Path(os.environ["LLAMA_CPP_LIB_PATH"])
    rpc, base = (ctypes.CDLL(libraries / f"lib{name}.{suffix}") for name in ("ggml-rpc", "ggml"))
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    base.ggml_backend_register.argtypes = [ctypes.c_void_p]
    llama_cpp_rate.llama_cpp.llama_backend_init()
    for server in servers:
        registry = rpc.ggml_backend_rpc_add_server(server.encode())
        assert registry, f"no RPC server answers at {server}"
        base.ggml_backend_register(registry)


def loopback_bytes() -> int | None:
    """Bytes that have gone over the loopback interface; None where the system does not tell (macOS)."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except FileNotFoundError:
        return None
    counters = next(line.split() for line in lines if line.strip().startswith("lo:"))
    return int(counters[1])  # received, which here is what was sent


def decode(context: Context, sequences: int, steps: int) -> dict:
    """Rate of all sequences together, and what a token of one of them moves."""
    last = PROMPT + UNTIMED_STEPS + steps
    for sequence in range(sequences):
        context.prompt(sequence, PROMPT)
    for position in range(PROMPT, last):
        if position == PROMPT + UNTIMED_STEPS:
            started, before = time.monotonic(), loopback_bytes()
        context.step([(sequence, position, True) for sequence in range(sequences)])
    passed, after = time.monotonic() - started, loopback_bytes()
    tokens = sequences * steps
    return {
        "tokens_per_s": tokens / passed,
        "bytes_per_token": None if before is None else (after - before) / tokens,
    }


def prefill(context: Context, tokens: int) -> dict:
    """Seconds until the client has the logits of the last token, with some work before the clock starts."""
    context.prompt(0, min(tokens, UNTIMED_PREFILL))
    llama_cpp = llama_cpp_rate.llama_cpp
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context.context), True)
    started = time.monotonic()
    context.prompt(0, tokens)
    return {"first_token_s": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--servers", type=lambda text: text.split(","), required=True)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prefill", type=int, metavar="TOKENS")
    options = parser.parse_args()
    started = time.monotonic()
    use_servers(options.servers)
    length = options.prefill or PROMPT + UNTIMED_STEPS + options.steps
    context = Context(options.model, 1, options.sequences, length)
    load_s = time.monotonic() - started
    if options.prefill:
        figures = prefill(context, options.prefill)
    else:
        figures = decode(context, options.sequences, options.steps)
    print(json.dumps({**figures, "load_s": load_s}))


if __name__ == "__main__":
    main()
