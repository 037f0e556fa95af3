"""This program on two ranks of one thread, doing what the peer does.

The peer's clock starts when all prompts are in the cache and some steps are done. A run of ours has no such moment, so
the same prompts are answered twice, once with as many tokens as the peer leaves untimed and once with the timed ones as
well. What counts is the difference of the two runs, in seconds, tokens and bytes.
"""

import json
from pathlib import Path

from bench_common import run

RANKS = 2
OPTIONS = ("--threads", "1")  # the rest by default
PROMPT = 16  # tokens that every sequence has behind it, as in bench_peers/llama_cpp_rate.py
UNTIMED_STEPS = 3  # as there


def decode(model: Path, sequences: int, steps: int) -> dict:
    """tokens_per_s of so many sequences together; sent_bytes a token, of each rank to the next; tokens lost to ends."""
    few, many = (
        answer(model, sequences, PROMPT, 1 + UNTIMED_STEPS + timed)  # the first token is the prompt's
        for timed in (0, steps)
    )
    tokens = many["sampled_tokens"] - few["sampled_tokens"]
    sent_bytes = [late["sent_bytes"] - early["sent_bytes"] for early, late in zip(few["ranks"], many["ranks"])]
    return {
        "tokens_per_s": tokens / (many["active_s"] - few["active_s"]),
        "sent_bytes": [sent / tokens for sent in sent_bytes],
        "bytes_per_token": sum(sent_bytes) / tokens,
        "missing_tokens": sequences * steps - tokens,
    }


def prompt(model: Path, tokens: int) -> dict:
    """first_token_s of one prompt; load_s until the last rank was ready."""
    report = answer(model, 1, tokens, 1)
    return {"first_token_s": report["time_to_first_token_s"], "load_s": report["load_s"]}


def answer(model: Path, sequences: int, prompt_tokens: int, answer_tokens: int) -> dict:
    """The report of a run that answers so many prompts at once."""
    requests = [
        {"prompt": token_ids(sequence, prompt_tokens), "max_tokens": answer_tokens} for sequence in range(sequences)
    ]
    return run(RANKS, model, requests, *OPTIONS)


def token_ids(sequence: int, tokens: int) -> list[int]:
    """Any, others for each sequence."""
    return [(7919 * position + 104729 * sequence + 1) % 151936 for position in range(tokens)]


def hidden_bytes(model: Path) -> int:
    """Bytes of a hidden vector on its way between ranks, in f32 as it is by default."""
    return 4 * json.loads((model / "config.json").read_text())["hidden_size"]
