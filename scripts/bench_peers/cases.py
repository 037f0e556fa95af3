"""What is measured, beside whom, and what we want to reach there."""

from dataclasses import dataclass

from .models import MODELS

WHATS = ["decode", "together", "prefill", "mlx-lm"]


@dataclass(frozen=True)
class Goal:
    """At least so many times the peer's rate; or, for decoding one sequence, at least this share of the memory's."""

    times: float | None = None
    of_bandwidth: float | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table: the same work for us and for one peer."""

    model: str
    what: str  # as --only names it
    peer: str
    threads: int
    goal: Goal
    sequences: int = 1
    steps: int = 0  # decoding: so many timed, each with one token of every sequence
    prefill: int = 0  # or a prompt of so many tokens

    @property
    def title(self) -> str:
        work = f"prefill of {self.prefill} tokens" if self.prefill else f"decode, {self.sequences} together"
        if self.sequences == 1 and not self.prefill:
            work = "decode"
        return f"{work}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def arguments(self) -> list[str]:
        """What to measure, as examples/step_rate.rs takes it; the programs for the peers take the same."""
        if self.prefill:
            return ["--prefill", str(self.prefill)]
        return ["--sequences", str(self.sequences), "--steps", str(self.steps)]


def of_model(model: str) -> list[Case]:
    """All cases of one model."""
    small = model == "smollm2-135m"
    alone = Goal(times={"qwen3-1.7b-8bit": 1.15, "qwen3-1.7b-4bit": 1.3, "smollm2-135m": 1.6}[model])
    both = alone if small else Goal(of_bandwidth=0.9)
    steps = 128 if small else 32
    cases = [
        Case(model, "decode", "llama.cpp", threads=1, goal=alone, steps=steps),
        Case(model, "decode", "llama.cpp", threads=2, goal=both, steps=steps),
    ]
    for sequences in (4, 8, 16):
        goal = Goal(times=2.5) if sequences >= 8 else Goal()
        fewer = steps // 2 if sequences < 16 else steps // 4
        cases.append(Case(model, "together", "llama.cpp", 2, goal, sequences=sequences, steps=fewer))
    cases += [Case(model, "prefill", "llama.cpp", threads, Goal(times=2), prefill=512) for threads in (1, 2)]
    if model != "qwen3-1.7b-4bit":  # mlx-lm is slow: few tokens, and one width is enough
        cases.append(Case(model, "mlx-lm", "mlx-lm f32", 2, Goal(times=20), steps=32 if small else 4))
        cases.append(Case(model, "mlx-lm", "mlx-lm f32", 2, Goal(times=20), prefill=64 if small else 16))
    return cases


def chosen(only: list[str]) -> list[Case]:
    """The cases that --only names (MODEL, WHAT or MODEL/WHAT), or all where it names none."""
    everything = [case for model in MODELS for case in of_model(model)]
    if not only:
        return everything
    return [case for case in everything if {case.model, case.what, f"{case.model}/{case.what}"} & set(only)]
