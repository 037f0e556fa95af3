"""The rates of mlx-lm on this GPU, as JSON on the last line: MODEL PROMPT_TOKENS ANSWER_TOKENS [SEQUENCES...].

One stream through mlx-lm's own generate_step, which computes a step ahead; several sequences as a batch in lock-step over
its model and cache, a step ahead too. After one of each that does not count.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

REPEATS = 3


def main() -> None:
    model, _ = load_model(Path(sys.argv[1]))
    prompt_tokens, answer_tokens = int(sys.argv[2]), int(sys.argv[3])
    one_stream(model, prompt_tokens, answer_tokens)
    streams = [one_stream(model, prompt_tokens, answer_tokens) for _ in range(REPEATS)]
    rates = {
        "one": statistics.median(decode for decode, _ in streams),
        "prefill": statistics.median(prefill for _, prefill in streams),
        "bytes_per_s": copied_per_second(),
    }
    for sequences in sys.argv[4:]:
        count = int(sequences)
        batch(model, count, prompt_tokens, 8)
        rates[sequences] = statistics.median(batch(model, count, prompt_tokens, answer_tokens) for _ in range(REPEATS))
    print(json.dumps(rates))


def one_stream(model, prompt_tokens: int, answer_tokens: int) -> tuple[float, float]:
    """Tokens a second of decoding, and of the prompt."""
    prompt = mx.random.randint(100, 40000, (prompt_tokens,))
    mx.eval(prompt)
    start = time.perf_counter()
    first = start
    for number, _ in enumerate(generate_step(prompt, model, max_tokens=answer_tokens)):
        if number == 0:
            first = time.perf_counter()
    end = time.perf_counter()
    return (answer_tokens - 1) / (end - first), prompt_tokens / (first - start)


def batch(model, count: int, prompt_tokens: int, answer_tokens: int) -> float:
    """Tokens a second of decoding, of all sequences."""
    cache = make_prompt_cache(model)
    prompts = mx.random.randint(100, 40000, (count, prompt_tokens))
    tokens = mx.argmax(model(prompts, cache=cache)[:, -1], -1)
    mx.eval(tokens)
    start = time.perf_counter()
    for _ in range(answer_tokens - 1):
        following = mx.argmax(model(tokens[:, None], cache=cache)[:, -1], -1)
        mx.async_eval(following)
        mx.eval(tokens)
        tokens = following
    mx.eval(tokens)
    return count * (answer_tokens - 1) / (time.perf_counter() - start)


def copied_per_second() -> float:
    """Bytes that are read and written a second."""
    source = mx.zeros((1 << 30,), dtype=mx.bfloat16)
    mx.eval(source)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        mx.eval(source + 1)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times)


if __name__ == "__main__":
    main()
