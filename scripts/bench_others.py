"""How much of the machine other programs took while we measured: what spoils a figure and is easily missed."""

import os
import resource
import time
from collections.abc import Callable

from bench_common import spread

DISTURBED_CORES = 0.1  # more than this used by others: measure again


def least_disturbed(measure: Callable, most_tries: int = 3) -> tuple:
    """What `measure` returns and the cores that others used: of a few tries the one that others disturbed least.

    A pool of threads that spin while they wait, like llama.cpp's, loses most of its rate to one busy neighbour;
    ours beside it would look better than it is."""
    tries = [watched(measure)]
    while len(tries) < most_tries and (tries[-1][1] or 0) > DISTURBED_CORES:
        tries.append(watched(measure))
    return min(tries, key=lambda result: result[1] or 0)


def watched(measure: Callable) -> tuple:
    """What `measure` returns, and how many cores others used meanwhile; None where the system does not tell (macOS).

    All of the machine's time that was not idle, less that of the processes which `measure` started and waited for."""
    machine, children, started = machine_s(), children_s(), time.monotonic()
    value = measure()
    if machine is None:
        return value, None
    spent = machine_s() - machine - (children_s() - children)
    return value, max(0.0, spent / (time.monotonic() - started))


def machine_s() -> float | None:
    """Seconds of all cores that were not idle since the system started."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:]]
    except FileNotFoundError:
        return None
    idle, waiting = ticks[3:5]
    return (sum(ticks[:8]) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def children_s() -> float:
    """Seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def sentence(others: list[float]) -> str:
    """What the page says of it: cores that others used in each measurement. Empty where the system does not tell."""
    if not others:
        return ""
    said = f"Cores that other programs used meanwhile: {spread(others)}."
    if max(others) > DISTURBED_CORES:
        said += f" **More than {DISTURBED_CORES}: these figures are not to be trusted.**"
    return said
