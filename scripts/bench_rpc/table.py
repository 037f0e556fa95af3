"""The measurements, and the page that is made of them."""

import statistics
from collections import defaultdict
from collections.abc import Callable

from bench_common import spread
from bench_others import least_disturbed, sentence

from .build import PACKAGE
from .cases import HEADER_BYTES_GOAL, PROMPT_GOAL, PROMPT_TOKENS, TOGETHER, TOGETHER_GOALS


class Measured:
    """All figures so far, in the order in which they came."""

    def __init__(self):
        self.figures = defaultdict(list)  # by side and what was measured
        self.others = []

    def take(self, side: str, what: int | str, measure: Callable[[], dict]) -> None:
        """Measures once more, and again where others disturbed it."""
        figures, others = least_disturbed(measure, most_tries=2)
        self.figures[side, what].append(figures)
        self.others += [] if others is None else [others]

    def values(self, side: str, what: int | str, figure: str) -> list[float]:
        """One figure, of all runs that know it."""
        return [figures[figure] for figures in self.figures[side, what] if figures[figure] is not None]


def page(measured: Measured, hidden_bytes: int, repeats: int) -> str:
    """One table, and below it what the figures are."""
    lines = ["| 1.7B shape, 8 bits | ours | llama.cpp RPC | ratio | goal | reached |", "|---|---|---|---|---|---|"]
    lines += [decode_row(sequences, measured) for sequences in TOGETHER]
    lines += [first_token_row(measured), load_row(measured), first_token_with_load_row(measured)]
    lines += [bytes_row(sequences, measured) for sequences in TOGETHER]
    lines += [header_row(sequences, measured, hidden_bytes) for sequences in TOGETHER]
    lines += ["", *notes(measured, hidden_bytes, repeats), "", sentence(measured.others)]
    return "\n".join(lines).rstrip()


def row(title: str, ours: list[float], theirs: list[float], goal: str, reached: Callable, digits: int = 1) -> str:
    """One line; `reached` is asked about the ratio of medians."""
    ratio = statistics.median(ours) / statistics.median(theirs) if theirs else None
    cells = [
        title,
        spread(ours, digits),
        spread(theirs, digits) if theirs else "-",
        f"{ratio:.2f}x" if ratio is not None else "-",
        goal,
        "-" if goal == "-" or ratio is None else "yes" if reached(ratio) else "no",
    ]
    return f"| {' | '.join(cells)} |"


def decode_row(sequences: int, measured: Measured) -> str:
    """Rate of so many sequences."""
    ours, theirs = (measured.values(side, sequences, "tokens_per_s") for side in ("ours", "theirs"))
    title = "one stream" if sequences == 1 else f"{sequences} sequences together"
    goal = f">= {TOGETHER_GOALS[sequences]:g}x" if sequences in TOGETHER_GOALS else "-"
    return row(f"{title}, tokens/s", ours, theirs, goal, lambda ratio: ratio >= TOGETHER_GOALS[sequences], 2)


def first_token_row(measured: Measured) -> str:
    """A long prompt, the weights being there."""
    ours, theirs = (measured.values(side, "prompt", "first_token_s") for side in ("ours", "theirs"))
    title, goal = f"prompt of {PROMPT_TOKENS} tokens to its first token, s", f"< {PROMPT_GOAL:g}x"
    return row(title, ours, theirs, goal, lambda ratio: ratio < PROMPT_GOAL, 2)


def load_row(measured: Measured) -> str:
    """From the start to the weights being there."""
    ours, theirs = (measured.values(side, "prompt", "load_s") for side in ("ours", "theirs"))
    return row("start until all weights are there, s", ours, theirs, "-", bool, 2)


def first_token_with_load_row(measured: Measured) -> str:
    """The two before, one after the other."""
    ours, theirs = (
        [figures["load_s"] + figures["first_token_s"] for figures in measured.figures[side, "prompt"]]
        for side in ("ours", "theirs")
    )
    return row("both, s", ours, theirs, "-", bool, 2)


def bytes_row(sequences: int, measured: Measured) -> str:
    """All that a token moves, over all hops."""
    ours, theirs = (measured.values(side, sequences, "bytes_per_token") for side in ("ours", "theirs"))
    return row(f"bytes between processes a token, {together(sequences)}", ours, theirs, "-", bool, 0)


def header_row(sequences: int, measured: Measured, hidden_bytes: int) -> str:
    """What a token costs on each hop beside its hidden vector; ours alone."""
    runs = [figures["sent_bytes"] for figures in measured.figures["ours", sequences]]
    hops = [[sent[rank] - hidden_bytes for sent in runs] for rank in range(len(runs[0]))]
    told = ", ".join(f"rank {rank}: {spread(header_bytes)}" for rank, header_bytes in enumerate(hops))
    reached = "yes" if max(max(header_bytes) for header_bytes in hops) < HEADER_BYTES_GOAL else "no"
    title = f"bytes a token and hop beyond the hidden vector, {together(sequences)}"
    return f"| {title} | {told} | - | - | < {HEADER_BYTES_GOAL} | {reached} |"


def together(sequences: int) -> str:
    """So many sequences, in short."""
    return "one stream" if sequences == 1 else f"{sequences} together"


def notes(measured: Measured, hidden_bytes: int, repeats: int) -> list[str]:
    """What one has to know to read the table."""
    missing = max(figures["missing_tokens"] for number in TOGETHER for figures in measured.figures["ours", number])
    ended = f" **Up to {missing} tokens fewer than asked for were sampled in a run of ours.**" if missing else ""
    return [
        f"Medians of {repeats} and their range, in turns; ratios are ours over theirs, of medians. Both on this",
        "machine: two ranks of one thread (`--threads 1`, all else by default), and two `ggml-rpc-server -t 1` of",
        f"{PACKAGE}'s llama.cpp, all layers on them, settings as they come. Tokens/s: generated tokens",
        "over the time of generating them, every sequence with a prompt of 16 tokens and 3 untimed steps behind it;",
        f"ours is the difference of a longer and a shorter run.{ended} The first token of theirs is that of a",
        "context which has computed 64 tokens before; ours is the first that a run computes. Starting: theirs sends",
        "the weights to the servers, ours reads them. Bytes: ours as the ranks hand them to MPI, over both hops; a",
        f"hidden vector has {hidden_bytes:,}. Theirs as the loopback interface counts them: with TCP's headers, the",
        "logits for the client (four bytes for each word of the vocabulary), and whatever else this machine says to",
        "itself meanwhile.",
    ]
