"""scripts/bench peers: our CPU kernels beside llama.cpp and mlx-lm, on this machine, with equal weights and threads.

    cases.py            what is measured, and what we want to reach
    programs.py         the programs that measure, one process a measurement; installs and builds what they need
    models.py           the models, in our form and in the peer's
    table.py            the medians, the ratios and the goals as Markdown
    llama_cpp_rate.py, mlx_lm_rate.py, write_gguf.py    run in the virtual environment of the peers, .mlx/peers
    bandwidth.c         the memory's limit

Ours, the peer and the memory take turns, so that a machine that changes its mind does so for all of them.
"""

import sys

from . import cases, models, programs, table


def parts() -> str:
    """What --only can name, for the help."""
    return f"MODEL is one of {', '.join(models.MODELS)}; WHAT is one of {', '.join(cases.WHATS)}"


def run(repeats: int, only: list[str]) -> None:
    """Measures the cases that were asked for, and prints the table."""
    chosen = cases.chosen(only)
    if not chosen:
        sys.exit(f"bench: --only {' --only '.join(only)} leaves nothing to measure. {parts()}.")
    programs.install_peers()
    bandwidth = programs.build_bandwidth()
    ours = programs.build_ours()
    pairs = {name: models.prepare(name) for name in dict.fromkeys(case.model for case in chosen)}

    measured = table.Measured()
    for number in range(repeats):
        for threads in sorted({case.threads for case in chosen}):
            measured.take(measured.bandwidth(threads), lambda: programs.bandwidth(bandwidth, threads))
        for case in chosen:
            print(f"{number + 1}/{repeats} {case.model}: {case.title}, beside {case.peer}", file=sys.stderr)
            pair = pairs[case.model]
            sides = [
                (measured.ours(case), lambda: programs.ours(ours, pair, case)),
                (measured.peer(case), lambda: programs.PEERS[case.peer](pair, case)),
            ]
            for rates, measure in sides if number % 2 == 0 else reversed(sides):
                measured.take(rates, measure)
    print(table.page(chosen, pairs, measured, repeats))
