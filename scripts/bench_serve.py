"""scripts/bench serve: what HTTP costs beside standard input, what a server costs idle, and many clients at once.

One table. The same prompts go over standard input and over HTTP in turns, and must be answered with the same tokens.
The client is lean on purpose: it runs on the machine that it measures, and what it takes is taken from the ranks.
"""

import json
import selectors
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import bench_ranks
from bench_common import ROOT, checkpoint, spread
from bench_others import sentence, watched
from bench_pipeline import IDLE_MOST_PER_CENT, IDLE_S, demo_model, prompt, yes

sys.path.append(str(ROOT / "tests"))
import serve_load
from serve_checks import from_stdin
from serve_ranks import Server

STREAMS, PROMPT_TOKENS, ANSWER_TOKENS = 16, 128, 128
RANKS = 3
OPTIONS = ("--context", "512")
MOST_COST = 0.03  # of the throughput of standard input
LIMIT_S = 600.0  # of all answers of one run
CLIENTS, REQUESTS = 64, 20
QUIET_S = 30.0  # before the first request after idle
FIRST_TOKENS_OF = 5  # requests of either kind


@dataclass
class Answered:
    """All answers of one run."""

    tokens: list[list[int]]
    tokens_per_s: float
    client_cores: float = 0.0


@dataclass
class Measured:
    """One model over both ways."""

    stdin: list[Answered] = field(default_factory=list)
    http: list[Answered] = field(default_factory=list)


PARTS = ("throughput", "idle", "clients")


def measure(repeats: int, only: list[str] | None = None) -> None:
    """Measures everything, or these parts only, and prints the table."""
    parts = only or PARTS
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"bench: serve has no part {unknown[0]}; it has {', '.join(PARTS)}")
    if not bench_ranks.are_known():
        sys.exit("bench: this system does not tell of processes in /proc, from which serve's figures come")
    print("| serve, three ranks on this machine | measured | goal | reached |\n|---|---|---|---|", flush=True)
    measures = []
    if "throughput" in parts:
        for title, model in (("1.7B shape, 8 bits", checkpoint("qwen3-1.7b", 8)), ("SmolLM2-135M-Instruct", demo_model())):
            measures.append(lambda title=title, model=model: cost_of_http(title, model, repeats))
    if "idle" in parts:
        measures.append(lambda: at_rest(repeats))
    others: list[float | None] = []
    for one in measures:
        rows, disturbed = watched(one)
        print("\n".join(rows), flush=True)
        others.append(disturbed)
    if "clients" in parts:
        print("\n".join(many_clients()))
    print("\n".join(["", *notes(repeats)]))
    # This program is a client and not its own child, so its time counts as others'. It is little but with many clients.
    print("\n" + sentence([cores for cores in others if cores is not None]))


def row(what: str, found: str, goal: str = "-", reached: bool | None = None) -> str:
    """One row of the table."""
    return f"| {what} | {found} | {goal} | {'-' if reached is None else yes(reached)} |"


def notes(repeats: int) -> list[str]:
    """What one has to know to read it."""
    return [
        f"Medians of {repeats} and their range, in turns; `{' '.join(OPTIONS)}`. {STREAMS} prompts of {PROMPT_TOKENS}",
        f"tokens, {ANSWER_TOKENS} out. Standard input: sampled tokens over the time in which there was a sequence to",
        "work on. HTTP: over the time from the first byte of the first request to the last byte of the last answer, as",
        f"the client sees it, all streamed. Idle: user and system time of all threads, over {IDLE_S:.0f} s. After idle:",
        f"{QUIET_S:.0f} s without a request, then one whose prompt is in no cache; right after: the same just after",
        "another answer.",
    ]


# ---- throughput ---------------------------------------------------------------------------------


def cost_of_http(title: str, model: Path, repeats: int) -> list[str]:
    """The same prompts over both ways, in turns."""
    requests = [{"prompt": prompt(number, PROMPT_TOKENS), "max_tokens": ANSWER_TOKENS} for number in range(STREAMS)]
    measured = Measured()
    over_stdin(model, requests[:1])  # fills the page cache
    for number in range(repeats):
        ways = [
            lambda: measured.stdin.append(over_stdin(model, requests)),
            lambda: measured.http.append(over_http(model, requests)),
        ]
        for way in ways if number % 2 == 0 else reversed(ways):
            print(f"{number + 1}/{repeats} {title}", file=sys.stderr)
            way()
    wanted = measured.stdin[0].tokens
    for answered in [*measured.stdin, *measured.http]:
        if answered.tokens != wanted:
            sys.exit("bench: the same prompts were answered with different tokens, so their rates compare nothing")
    stdin, http = ([one.tokens_per_s for one in way] for way in (measured.stdin, measured.http))
    cost = 1 - statistics.median(http) / statistics.median(stdin)
    client = [100 * one.client_cores for one in measured.http]
    return [
        row(f"{title}: standard input, tokens/s", spread(stdin, 1)),
        row(f"{title}: HTTP, {STREAMS} streams, tokens/s", spread(http, 1)),
        row(f"{title}: what HTTP costs, %", f"{100 * cost:.1f}", f"<= {100 * MOST_COST:.0f}", cost <= MOST_COST),
        row(f"{title}: the client, % of a core", spread(client, 1)),
    ]


def over_stdin(model: Path, requests: list[dict]) -> Answered:
    """All requests as lines of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "report.json"
        answers = from_stdin(requests, *OPTIONS, "--report", str(path), model=model, ranks=RANKS, limit_s=LIMIT_S)
        report = json.loads(path.read_text())
    return Answered([answer["choices"][0]["token_ids"] for answer in answers], report["tokens_per_s"])


def over_http(model: Path, requests: list[dict]) -> Answered:
    """All requests at once, each a stream, of a server that has answered one before."""
    with Server(*OPTIONS, model=model, ranks=RANKS) as server:
        streamed(server.url, [{"prompt": [1, 2, 3], "max_tokens": 2}])
        started, cpu_s = time.monotonic(), time.process_time()
        tokens, _ = streamed(server.url, requests)
        seconds, cpu_s = time.monotonic() - started, time.process_time() - cpu_s
    return Answered(tokens, sum(map(len, tokens)) / seconds, cpu_s / seconds)


def streamed(url: str, requests: list[dict]) -> tuple[list[list[int]], list[float]]:
    """The tokens of each request, and the seconds to its first token. What arrives is read at the end only."""
    address = urlsplit(url)
    arrived: dict[int, bytearray] = {}
    first_s = [0.0] * len(requests)
    end = time.monotonic() + LIMIT_S
    with selectors.DefaultSelector() as selector:
        started = time.monotonic()
        for number, request in enumerate(requests):
            connection = socket.create_connection((address.hostname, address.port), timeout=LIMIT_S)
            body = json.dumps(request | {"stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + body)
            arrived[number] = bytearray()
            selector.register(connection, selectors.EVENT_READ, number)
        while selector.get_map():
            ready = selector.select(timeout=max(0.0, end - time.monotonic()))
            if not ready:
                sys.exit(f"bench: the server has not answered within {LIMIT_S:.0f} s")
            for key, _ in ready:
                part = key.fileobj.recv(1 << 16)
                if not first_s[key.data] and b'"token_ids":[' in part:
                    first_s[key.data] = time.monotonic() - started
                arrived[key.data] += part
                if not part:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    return [tokens_of(bytes(arrived[number])) for number in range(len(requests))], first_s


def tokens_of(answer: bytes) -> list[int]:
    """All sampled ids of a stream. Ends the program if it is none."""
    events = [line[6:] for line in answer.splitlines() if line.startswith(b"data: ")]
    if not answer.startswith(b"HTTP/1.1 200 ") or events[-1:] != [b"[DONE]"]:
        sys.exit(f"bench: expected a whole stream, found {answer[:300]!r}")
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    return [token for choice in choices for token in choice.get("token_ids", [])]


# ---- nothing to do, and the first request after it ------------------------------------------------


def at_rest(repeats: int) -> list[str]:
    """CPU time of every rank without a request; the first token after that, and right after another answer."""
    shares, after_idle, right_after = [], [], []
    with Server(*OPTIONS, ranks=RANKS) as server:
        streamed(server.url, [{"prompt": [1, 2, 3], "max_tokens": 32}])
        time.sleep(1.0)  # what an answer leaves to do
        for _ in range(repeats):
            before, clock = server.cpu_s(), time.monotonic()
            time.sleep(IDLE_S)
            after, passed = server.cpu_s(), time.monotonic() - clock
            shares.append([100 * (late - early) / passed for early, late in zip(before, after)])
        for number in range(FIRST_TOKENS_OF):
            print(f"{number + 1}/{FIRST_TOKENS_OF} after {QUIET_S:.0f} s without a request", file=sys.stderr)
            time.sleep(QUIET_S)
            after_idle.append(1000 * first_token_s(server.url, 2 * number))
            right_after.append(1000 * first_token_s(server.url, 2 * number + 1))
    rows = []
    for rank in range(RANKS):
        values = [share[rank] for share in shares]
        is_reached = max(values) < IDLE_MOST_PER_CENT
        rows.append(row(f"idle, rank {rank}, % of a core", spread(values, 1), f"< {IDLE_MOST_PER_CENT:g}", is_reached))
    rows.append(row("first token after idle, ms", spread(after_idle, 1)))
    rows.append(row("first token right after another answer, ms", spread(right_after, 1)))
    return rows


def first_token_s(url: str, number: int) -> float:
    """Seconds to the first token of a prompt that no other begins like."""
    _, first_s = streamed(url, [{"prompt": prompt(1000 + number, 32), "max_tokens": 4}])
    return first_s[0]


# ---- many clients --------------------------------------------------------------------------------


def many_clients() -> list[str]:
    """tests/serve_load.py, as rows."""
    with Server(*serve_load.OPTIONS, ranks=RANKS) as server:
        outcome = serve_load.storm(server, CLIENTS, REQUESTS)
    told, wanted = outcome.told, CLIENTS * REQUESTS
    growth = outcome.growth_bytes()
    most = serve_load.MOST_GROWTH_BYTES / 1e6
    name = f"{CLIENTS} clients x {REQUESTS} requests"
    stuck = outcome.now["running"] + outcome.now["waiting"]
    return [
        row(f"{name}: answered, in {outcome.seconds:.0f} s", str(told.answered), str(wanted), told.answered == wanted),
        row(f"{name}: errors", str(len(told.errors)), "0", not told.errors),
        row(f"{name}: tokens other than over standard input", str(len(told.others)), "0", not told.others),
        row(f"{name}, {told.left} left in mid-answer: places stuck", str(stuck), "0", outcome.is_idle),
        *(
            row(
                f"{name}: memory of rank {rank} in the last quarter over the second, MB",
                f"{grown / 1e6:+.1f}",
                f"< {most:g}",
                grown < most * 1e6,
            )
            for rank, grown in enumerate(growth)
        ),
    ]
