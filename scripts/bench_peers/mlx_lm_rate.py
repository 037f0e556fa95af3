"""Tokens per second of mlx-lm on MLX's own CPU backend, in f32: one load, one measurement, one line of JSON.

    python mlx_lm_rate.py MODEL_DIR --steps K       decode: one sequence
    python mlx_lm_rate.py MODEL_DIR --prefill P     one prompt of P tokens

f32 is what mlx-pipe computes in, and the fastest that this backend has on a CPU. How many threads it takes is MLX's
affair: it has no option for that.
"""

import argparse
import json
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

PROMPT = 4  # tokens before it decodes; few, for it is slow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, default=1, choices=[1])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prefill", type=int, metavar="TOKENS")
    options = parser.parse_args()

    mx.set_default_device(mx.cpu)
    model, config = load_model(options.model)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    cache = make_prompt_cache(model)

    def step(tokens: list[int]) -> None:
        mx.eval(model(mx.array([[token % config["vocab_size"] for token in tokens]]), cache=cache)[:, -1])

    if options.prefill:
        step([1])
        cache = make_prompt_cache(model)
        started = time.monotonic()
        step([7919 * position + 1 for position in range(options.prefill)])
        rate = options.prefill / (time.monotonic() - started)
    else:
        step([7919 * position + 1 for position in range(PROMPT)])
        step([1])
        started = time.monotonic()
        for position in range(options.steps):
            step([7919 * position + 1])
        rate = options.steps / (time.monotonic() - started)
    print(json.dumps({"tokens_per_s": rate}))


if __name__ == "__main__":
    main()
