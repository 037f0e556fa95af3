"""scripts/bench pipeline: many sequences in flight on this machine, what the pipeline itself costs, what it costs idle.

Three tables. The cases of each take turns, in the other order every second time, so that a machine that changes its
mind does so for all of them. Cases that are compared must sample the same tokens, or the program ends with an error.
"""

import os
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bench_ranks
from bench_common import ROOT, checkpoint, mpi_command, run, spread
from bench_others import least_disturbed, sentence, watched

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 16, 128, 128
LONGEST = ("--context", "512")  # memory for no more than these sequences hold
# The plan's own cut is for decoding. Here every second token is one of a prompt, for which the head is not used.
CUT = ("--layers", "0-15,16-27")


@dataclass(frozen=True)
class Case:
    """One way to answer the same prompts."""

    name: str
    title: str
    ranks: int
    options: tuple[str, ...]
    at_least: float | None = None  # so many times its rate is what we want of the case that is compared with it


IN_FLIGHT = Case(
    "(1)",
    "2 ranks of one thread, two groups of 8",
    2,
    ("--threads", "1", "--max-batch", "8", "--steps-in-flight", "2", *CUT, *LONGEST),
)
BASELINES = [
    Case(
        "(i)",
        "the same ranks, one group of 8, the other 8 prompts after it",
        2,
        ("--threads", "1", "--max-batch", "8", "--steps-in-flight", "1", "--max-sequences", "8", *CUT, *LONGEST),
        at_least=1.8,
    ),
    Case(
        "(ii)",
        "the same ranks in lock-step, one group of 16",
        2,
        ("--threads", "1", "--max-batch", "16", "--steps-in-flight", "1", *CUT, *LONGEST),
    ),
    Case("(iii)", "one rank of two threads, one group of 16", 1, ("--threads", "2", "--max-batch", "16", *LONGEST)),
    Case("(iv)", "2 ranks of one thread, all else by default", 2, ("--threads", "1")),
    Case("(v)", "2 ranks, all by default", 2, ()),
]
# What can be measured alone.
PARTS = (*(case.name.strip("()") for case in BASELINES), "stream", "idle")
MOST_IDLE = 0.12  # of the ranks' time in (1), while there was something to do

STREAM_TOKENS, STREAM_ANSWER = 32, 64
STREAM_RANKS, STREAM_AT_LEAST = 3, 0.92

IDLE_RANKS, IDLE_S, IDLE_MOST_PER_CENT = 3, 5.0, 2.0
LOAD_S = 120.0  # a start that takes longer hangs


class Measured:
    """The reports of all cases so far, and how much others disturbed them."""

    def __init__(self):
        self.reports = defaultdict(list)  # by case
        self.others = []

    def take(self, case: Case, model: Path, requests: list[dict]) -> None:
        """Runs a case once more; twice where others disturbed it, for it takes minutes."""
        report, others = least_disturbed(lambda: run(case.ranks, model, requests, *case.options), most_tries=2)
        if report["failed"]:
            sys.exit(f"bench: {case.name} {case.title}: {report['failed']} requests failed")
        self.reports[case].append(report)
        self.others += [] if others is None else [others]

    def values(self, case: Case, field: str) -> list[float]:
        """One figure of all reports of a case."""
        return [report[field] for report in self.reports[case]]

    def ratio(self, case: Case, baseline: Case, field: str) -> float:
        """How many times the baseline's figure, by medians."""
        return statistics.median(self.values(case, field)) / statistics.median(self.values(baseline, field))

    def assert_same_tokens(self) -> None:
        """Ends the program if two runs did not sample the same tokens: then their rates compare nothing."""
        digests = {case: set(self.values(case, "digest")) for case in self.reports}
        if len(set.union(*digests.values())) > 1:
            told = "\n".join(f"{case.name} {case.title}: {', '.join(sorted(all))}" for case, all in digests.items())
            sys.exit(f"bench: the same prompts were answered with different tokens. Digests:\n{told}")


def measure(repeats: int, only: list[str] | None = None) -> None:
    """Measures everything, or these parts only (a baseline by its number), and prints the tables."""
    parts = only or PARTS
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"bench: pipeline has no part {unknown[0]}; it has {', '.join(PARTS)}")
    shape = checkpoint("qwen3-1.7b", 8)
    subprocess.run([ROOT / "scripts/fetch-demo-model"], check=True, stdout=sys.stderr)
    if baselines := [case for case in BASELINES if case.name.strip("()") in parts]:
        print("\n".join(sequences_in_flight(shape, baselines, repeats)), flush=True)
    if "stream" in parts:
        print("\n".join(["", *cost_of_the_pipeline(shape, repeats)]), flush=True)
    if "idle" in parts:
        print("\n".join(["", *idle(shape, repeats)]))


def prompt(sequence: int, tokens: int) -> list[int]:
    """Token ids that every vocabulary has, others for each sequence."""
    return [(7919 * position + 10473 * sequence) % 40000 + 100 for position in range(tokens)]


def in_turns(cases: list[Case], repeats: int, what: str) -> Iterator[Case]:
    """Every case so many times, forth and back."""
    for number in range(repeats):
        for case in cases if number % 2 == 0 else reversed(cases):
            print(f"{number + 1}/{repeats} {what}: {case.name} {case.title}", file=sys.stderr)
            yield case


# ---- many sequences -----------------------------------------------------------------------------


def sequences_in_flight(model: Path, baselines: list[Case], repeats: int) -> list[str]:
    """The first table: many prompts at once, beside these baselines."""
    requests = [{"prompt": prompt(number, PROMPT_TOKENS), "max_tokens": ANSWER_TOKENS} for number in range(PROMPTS)]
    measured = Measured()
    run(2, model, [{"prompt": [1], "max_tokens": 1}])  # fills the page cache
    for case in in_turns([IN_FLIGHT, *baselines], repeats, "in flight"):
        measured.take(case, model, requests)
        measured.assert_same_tokens()
    lines = [
        f"| {PROMPTS} prompts of {PROMPT_TOKENS} tokens, {ANSWER_TOKENS} out, 1.7B shape, 8 bits | tokens/s "
        "| stages idle, % | first token, s | (1) over it | goal | reached |",
        "|---|---|---|---|---|---|---|",
        in_flight_row(measured),
        *(baseline_row(case, measured) for case in baselines),
    ]
    sampled = statistics.median(measured.values(IN_FLIGHT, "sampled_tokens"))
    return [*lines, "", *in_flight_notes(baselines, repeats, sampled), "", sentence(measured.others)]


def figures(case: Case, measured: Measured) -> list[str]:
    """What every row begins with."""
    idle_per_cent = [100 * share for share in measured.values(case, "idle_share")]
    return [
        f"{case.name} {case.title}",
        spread(measured.values(case, "tokens_per_s"), 1),
        spread(idle_per_cent, 1),
        spread(measured.values(case, "time_to_first_token_s")),
    ]


def in_flight_row(measured: Measured) -> str:
    """The case that all others are baselines of; its goal is how little its ranks wait."""
    reached = statistics.median(measured.values(IN_FLIGHT, "idle_share")) <= MOST_IDLE
    cells = [*figures(IN_FLIGHT, measured), "", f"idle <= {100 * MOST_IDLE:.0f} %", yes(reached)]
    return f"| {' | '.join(cells)} |"


def baseline_row(case: Case, measured: Measured) -> str:
    """A baseline, and how many times its rate (1) does."""
    ratio = measured.ratio(IN_FLIGHT, case, "tokens_per_s")
    goal = f">= {case.at_least:g}x" if case.at_least else "-"
    verdict = yes(ratio >= case.at_least) if case.at_least else "-"
    return f"| {' | '.join([*figures(case, measured), f'{ratio:.2f}x', goal, verdict])} |"


def in_flight_notes(baselines: list[Case], repeats: int, sampled: float) -> list[str]:
    """What one has to know to read the first table."""
    asked = PROMPTS * ANSWER_TOKENS
    ended = "all that were asked for" if sampled == asked else f"**of {asked}: some answers ended before**"
    return [
        f"Medians of {repeats} and their range, in turns; ratios are of medians. Tokens/s: sampled tokens over the",
        "time in which there was a sequence to work on, prompts included. First token: median of the prompts, most of",
        f"which wait for others. {sampled:.0f} tokens were sampled, {ended}; the same ones in every",
        "run of every case. Options:",
        "",
        *(f"- {case.name} `{' '.join(case.options)}`" for case in [IN_FLIGHT, *baselines] if case.options),
    ]


# ---- one stream ---------------------------------------------------------------------------------


def cost_of_the_pipeline(shape: Path, repeats: int) -> list[str]:
    """The second table: one stream on several ranks, each with all cores, beside one rank."""
    threads = ("--threads", str(os.cpu_count()))
    several = Case("pipeline", f"one stream, {STREAM_RANKS} ranks", STREAM_RANKS, threads)
    one = Case("alone", "one stream, 1 rank", 1, threads)
    requests = [{"prompt": prompt(0, STREAM_TOKENS), "max_tokens": STREAM_ANSWER}]
    lines = [
        f"| one stream, {STREAM_TOKENS} tokens in, {STREAM_ANSWER} out, tokens/s | {STREAM_RANKS} ranks | 1 rank "
        "| ratio | goal | reached |",
        "|---|---|---|---|---|---|",
    ]
    others = []
    # A run of the small model is over in a second, and one of them says little.
    for title, model, times in [("1.7B shape, 8 bits", shape, 1), ("SmolLM2-135M-Instruct", demo_model(), 5)]:
        measured = Measured()
        for case in in_turns([several, one], repeats * times, title):
            measured.take(case, model, requests)
        measured.assert_same_tokens()
        others += measured.others
        lines.append(stream_row(title, several, one, measured))
    notes = [
        f"Medians of {repeats} ({5 * repeats} for the small model) and their range, in turns. Every rank has all",
        f"{os.cpu_count()} cores of the machine, for with one stream only one rank computes at a time. Tokens after",
        "the first of the answer over the time that they took.",
    ]
    return [*lines, "", *notes, "", sentence(others)]


def stream_row(title: str, several: Case, one: Case, measured: Measured) -> str:
    """One model."""
    rate = "decode_tokens_per_s"
    ratio = measured.ratio(several, one, rate)
    sampled = measured.reports[one][0]["sampled_tokens"]
    cells = [
        title if sampled == STREAM_ANSWER else f"{title} (**ended after {sampled} tokens**)",
        spread(measured.values(several, rate), 1),
        spread(measured.values(one, rate), 1),
        f"{ratio:.2f}x",
        f">= {STREAM_AT_LEAST:g}x",
        yes(ratio >= STREAM_AT_LEAST),
    ]
    return f"| {' | '.join(cells)} |"


def demo_model() -> Path:
    """The published model, as scripts/fetch-demo-model leaves it."""
    return ROOT / "models/SmolLM2-135M-Instruct"


# ---- nothing to do ------------------------------------------------------------------------------


def idle(model: Path, repeats: int) -> list[str]:
    """The third table: ranks that have loaded and wait for a first prompt."""
    if not bench_ranks.are_known():
        return ["Idle ranks: not measured, for this system does not tell the time of a process in /proc."]
    shares, others = [], []
    for number in range(repeats):
        print(f"{number + 1}/{repeats} idle", file=sys.stderr)
        per_cent, disturbed = watched(lambda: idle_per_cent(model))
        shares.append(per_cent)
        others.append(disturbed)
    title = f"{IDLE_RANKS} ranks without a prompt, 1.7B shape: CPU time, % of a core, over {IDLE_S:.0f} s"
    lines = [f"| {title} | median of {repeats} | goal | reached |", "|---|---|---|---|"]
    for rank in range(IDLE_RANKS):
        values = [share[rank] for share in shares]
        reached = yes(max(values) < IDLE_MOST_PER_CENT)
        lines.append(f"| rank {rank} | {spread(values, 1)} | < {IDLE_MOST_PER_CENT:g} % | {reached} |")
    notes = [
        "User and system time of all threads of the process, from a second after the last rank had loaded. The goal is",
        "for the most of all runs.",
    ]
    return [*lines, "", *notes, "", sentence(others)]


def idle_per_cent(model: Path) -> list[float]:
    """CPU time of every rank, in per cent of a core, while standard input is open and says nothing."""
    command = mpi_command(IDLE_RANKS, model, "--context", "64", "-v")
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    too_late = threading.Timer(LOAD_S, started.terminate)
    too_late.start()
    try:
        wait_until_loaded(started)
        too_late.cancel()
        time.sleep(1.0)  # what a start leaves to do
        ranks = bench_ranks.rank_processes(started.pid, IDLE_RANKS)
        before, clock = [bench_ranks.cpu_s(rank) for rank in ranks], time.monotonic()
        time.sleep(IDLE_S)
        after, passed = [bench_ranks.cpu_s(rank) for rank in ranks], time.monotonic() - clock
        return [100 * (late - early) / passed for early, late in zip(before, after)]
    finally:
        too_late.cancel()
        started.terminate()  # mpirun passes it on to its ranks
        started.communicate()


def wait_until_loaded(started: subprocess.Popen) -> None:
    """Reads what the ranks say until each has said that it has its weights."""
    loaded, told = 0, []
    for line in started.stderr:
        told.append(line)
        loaded += " INFO rank " in line and " loaded " in line
        if loaded == IDLE_RANKS:
            return
    sys.exit(f"bench: {IDLE_RANKS} ranks ended before they had loaded:\n{''.join(told)}")


def yes(reached: bool) -> str:
    """The last column."""
    return "yes" if reached else "no"
