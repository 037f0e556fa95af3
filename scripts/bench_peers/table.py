"""The measurements, and the page that is made of them."""

import statistics
from collections import defaultdict
from collections.abc import Callable

from bench_common import spread
from bench_others import least_disturbed, sentence

from .cases import Case, Goal
from .models import Pair
from .programs import VERSIONS


class Measured:
    """All figures so far, in the order in which they came."""

    def __init__(self):
        self.rates = defaultdict(list)
        self.others = []  # cores that other programs used, a figure for each measurement

    def take(self, rates: list[float], measure: Callable[[], float | None]) -> None:
        """Measures once more, and again where others disturbed it."""
        rate, others = least_disturbed(measure)
        if rate is not None:
            rates.append(rate)
            self.others += [] if others is None else [others]

    def ours(self, case: Case) -> list[float]:
        """Our tokens per second."""
        return self.rates["ours", case]

    def peer(self, case: Case) -> list[float]:
        """The peer's tokens per second."""
        return self.rates["peer", case]

    def bandwidth(self, threads: int) -> list[float]:
        """The memory's bytes per second."""
        return self.rates["bandwidth", threads]


def page(cases: list[Case], pairs: dict[str, Pair], measured: Measured, repeats: int) -> str:
    """One table of all cases, and below it what the figures are."""
    lines = [
        "| model | what | ours, tokens/s | peer | peer, tokens/s | ratio | ours, of bandwidth | goal | reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(case, pairs[case.model], measured) for case in cases]
    lines += ["", "| read from memory | GB/s |", "|---|---|"]
    for threads in sorted({case.threads for case in cases}):
        rates = [rate / 1e9 for rate in measured.bandwidth(threads)]
        lines.append(f"| {threads} thread{'s' if threads > 1 else ''} | {spread(rates, 1)} |")
    lines += ["", *notes(repeats), "", sentence(measured.others)]
    return "\n".join(lines).rstrip()


def notes(repeats: int) -> list[str]:
    """What one has to know to read the table."""
    return [
        f"Medians of {repeats} and their range, each measured in a process of its own, in turns; ratios are of medians.",
        "Of bandwidth: bytes of weights that a token reads x tokens/s, over what as many threads read in their best pass.",
        f"Peers: {', '.join(VERSIONS)}; llama.cpp is",
        "built from source for this CPU and has its settings as they come, mlx-lm takes the threads that it takes.",
    ]


def row(case: Case, pair: Pair, measured: Measured) -> str:
    """One case."""
    ours, peer = measured.ours(case), measured.peer(case)
    ratio = statistics.median(ours) / statistics.median(peer) if ours and peer else None
    share = share_of_bandwidth(case, pair, measured) if ours else None
    cells = [
        case.model,
        case.title,
        rate_text(ours) if ours else "-",
        case.peer,
        rate_text(peer) if peer else "-",
        f"{ratio:.2f}x" if ratio else "-",
        f"{100 * share:.0f} %" if share else "-",
        goal_text(case.goal),
        verdict(case.goal, ratio, share),
    ]
    return f"| {' | '.join(cells)} |"


def rate_text(rates: list[float]) -> str:
    """Tokens per second with as many digits as say something."""
    return spread(rates, 2 if statistics.median(rates) < 10 else 1)


def share_of_bandwidth(case: Case, pair: Pair, measured: Measured) -> float | None:
    """How much of the memory's rate our decoding of one sequence takes; None for any other work."""
    if case.what != "decode":
        return None
    bytes_per_s = pair.weight_bytes() * statistics.median(measured.ours(case))
    return bytes_per_s / statistics.median(measured.bandwidth(case.threads))


def goal_text(goal: Goal) -> str:
    """The goal in words."""
    if goal.times:
        return f">= {goal.times:g}x"
    return f">= {100 * goal.of_bandwidth:.0f} % of bandwidth" if goal.of_bandwidth else "-"


def verdict(goal: Goal, ratio: float | None, share: float | None) -> str:
    """Whether the goal is reached; a dash where there is none, or nothing to say."""
    pairs = [(goal.times, ratio), (goal.of_bandwidth, share)]
    decided = [reached >= wanted for wanted, reached in pairs if wanted and reached is not None]
    return "-" if not decided else "yes" if all(decided) else "no"
