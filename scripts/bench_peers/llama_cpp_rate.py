"""Tokens per second of llama.cpp in this process alone: one load, one measurement, one line of JSON.

    python llama_cpp_rate.py MODEL.gguf --threads T --sequences S --steps K     decode: S sequences, K steps together
    python llama_cpp_rate.py MODEL.gguf --threads T --prefill P                 one prompt of P tokens

As llama.cpp's own llama-bench does it: any token ids, all settings as they come (f16 cache, flash attention and
repacking where llama.cpp chooses them), nothing sampled, some work before the clock starts. The arguments are those of
our examples/step_rate.rs.
"""

import argparse
import json
import time

import llama_cpp

PROMPT = 16  # tokens that every sequence has behind it before it decodes
UNTIMED_STEPS = 3
UNTIMED_PREFILL = 64  # tokens
BATCH = 512


class Context:
    """A loaded model and its cache."""

    def __init__(self, model: str, threads: int, sequences: int, length: int):
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp cannot load {model}"
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * -(-length // 256) * 256  # llama.cpp rounds up to this itself
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        assert self.context, "llama.cpp makes no context of these settings"
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def step(self, entries: list[tuple[int, int, bool]]) -> None:
        """Computes one batch of (sequence, position, whether its logits are wanted), and waits for it."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for index, (sequence, position, logits) in enumerate(entries):
            batch.token[index] = (7919 * position + 104729 * sequence + 1) % self.vocabulary
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = logits
        assert llama_cpp.llama_decode(self.context, batch) == 0, "llama_decode failed"
        llama_cpp.llama_synchronize(self.context)

    def prompt(self, sequence: int, tokens: int) -> None:
        """Fills a sequence with this many tokens, in batches, with the logits of the last."""
        for start in range(0, tokens, BATCH):
            stop = min(start + BATCH, tokens)
            self.step([(sequence, position, position == tokens - 1) for position in range(start, stop)])


def decode_rate(model: str, threads: int, sequences: int, steps: int) -> float:
    last = PROMPT + UNTIMED_STEPS + steps
    context = Context(model, threads, sequences, last)
    for sequence in range(sequences):
        context.prompt(sequence, PROMPT)
    for position in range(PROMPT, last):
        if position == PROMPT + UNTIMED_STEPS:
            started = time.monotonic()
        context.step([(sequence, position, True) for sequence in range(sequences)])
    return sequences * steps / (time.monotonic() - started)


def prefill_rate(model: str, threads: int, tokens: int) -> float:
    context = Context(model, threads, 1, tokens)
    context.prompt(0, min(tokens, UNTIMED_PREFILL))
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context.context), True)
    started = time.monotonic()
    context.prompt(0, tokens)
    return tokens / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prefill", type=int, metavar="TOKENS")
    options = parser.parse_args()
    if options.prefill:
        rate = prefill_rate(options.model, options.threads, options.prefill)
    else:
        rate = decode_rate(options.model, options.threads, options.sequences, options.steps)
    print(json.dumps({"tokens_per_s": rate}))


if __name__ == "__main__":
    main()
