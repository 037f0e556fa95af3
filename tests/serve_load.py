#!/usr/bin/env python3
"""Many clients at once against three ranks: no error, no stuck place, flat memory, the tokens of standard input.

    tests/serve_load.py [--clients N] [--requests N]

Starts a server of its own. Prints a line for each check; the exit status is 1 if one has failed. Memory takes some hundred
requests to settle, so with fewer than the default its check may fail without a leak. scripts/bench serve
calls it too.
"""

import argparse
import http.client
import json
import random
import socket
import statistics
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.dont_write_bytecode = True  # nothing beside the tests
sys.path.append(str(Path(__file__).resolve().parent))
from serve_checks import Checks, from_stdin, get, wait_for
from serve_ranks import Server

LIMIT_S = 120  # of one answer, with all others before it
KINDS = 48  # requests that differ
LEAVE_EVERY = 5  # so often a client leaves in the middle of another answer
# So few tokens that the caches are full soon, which is when memory must not grow any more.
OPTIONS = ("--context", "512", "--max-sequences", "16")
MOST_GROWTH_BYTES = 4_000_000  # of a rank, over the second half


def requests_of(kinds: int) -> list[dict]:
    """Requests of many lengths, greedy and sampled, some with a common beginning."""
    dice = random.Random(7)
    shared = [dice.randrange(100, 40_000) for _ in range(192)]
    requests = []
    for number in range(kinds):
        own = [dice.randrange(100, 40_000) for _ in range(dice.choice((1, 7, 40, 150)))]
        prompt = shared[: dice.choice((64, 130, 192))] + own if number % 3 == 0 else own
        request = {"prompt": prompt, "max_tokens": dice.choice((4, 12, 24, 48))}
        if number % 2:
            request |= {"temperature": 1.1, "seed": number, "top_p": 0.95}
        requests.append(request)
    return requests


@dataclass
class Told:
    """What all clients have seen."""

    answered: int = 0
    left: int = 0
    errors: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # answers that are not those of standard input
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """One connection that asks one question after the other."""

    def __init__(self, url: str, number: int, told: Told) -> None:
        self.address, self.told, self.dice = urlsplit(url).netloc, told, random.Random(number)
        self.connection = http.client.HTTPConnection(self.address, timeout=LIMIT_S)

    def ask(self, request: dict) -> list[int]:
        """The sampled tokens; every second time as a stream."""
        stream = self.dice.random() < 0.5
        body = json.dumps(request | {"stream": stream})
        self.connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {text[:200]!r}")
        if not stream:
            return json.loads(text)["choices"][0]["token_ids"]
        events = [line.removeprefix(b"data: ") for line in text.splitlines() if line.startswith(b"data: ")]
        if events[-1] != b"[DONE]":
            raise RuntimeError(f"a stream ended with {events[-1][:200]!r}")
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        return [token for choice in choices for token in choice.get("token_ids", [])]

    def leave(self, request: dict) -> None:
        """Asks on another connection and leaves in the middle of the answer, politely or not."""
        connection = http.client.HTTPConnection(self.address, timeout=LIMIT_S)
        body = json.dumps(request | {"stream": True, "max_tokens": 300})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        if self.dice.random() < 0.7:  # else before it has begun
            connection.getresponse().read(self.dice.randrange(1, 2000))
        if self.dice.random() < 0.5 and connection.sock:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def run(self, requests: list[dict], wanted: list[list[int]], count: int) -> None:
        """Asks `count` of the requests."""
        for number in range(count):
            place = self.dice.randrange(len(requests))
            try:
                found = self.ask(requests[place])
                with self.told.lock:
                    self.told.answered += 1
                    if found != wanted[place]:
                        self.told.others.append(f"request {place}: {found} instead of {wanted[place]}")
                if number % LEAVE_EVERY == 0:
                    self.leave(requests[place])
                    with self.told.lock:
                        self.told.left += 1
            except Exception as error:  # a client goes on whatever happens
                with self.told.lock:
                    self.told.errors.append(f"{type(error).__name__}: {error}")
                self.connection.close()


@dataclass
class Outcome:
    """How it went."""

    told: Told
    seconds: float
    rss_bytes: list[list[int]]  # of every rank, once a second
    is_idle: bool
    now: dict

    def growth_bytes(self) -> list[int]:
        """How much more memory each rank used in the last quarter than in the second."""
        quarter = max(1, len(self.rss_bytes) // 4)
        early, late = self.rss_bytes[quarter : 2 * quarter] or self.rss_bytes, self.rss_bytes[-quarter:]
        medians = [[statistics.median(ranks) for ranks in zip(*part)] for part in (early, late)]
        return [int(after - before) for before, after in zip(*medians)]


def fill_caches(url: str) -> None:
    """Touches all memory that is planned for caches, so that what grows afterwards is something else."""
    dice = random.Random(11)
    prompts = [[dice.randrange(100, 40_000) for _ in range(400)] for _ in range(40)]
    Client(url, 0, Told()).ask({"prompt": prompts, "max_tokens": 8})


def storm(server: Server, clients: int, count: int) -> Outcome:
    """So many clients, each with so many requests one after the other."""
    requests = requests_of(KINDS)
    wanted = [answer["choices"][0]["token_ids"] for answer in from_stdin(requests, *OPTIONS)]
    fill_caches(server.url)
    told, samples = Told(), []
    everybody = [Client(server.url, number, told) for number in range(clients)]
    # Daemons: what hangs is an error after the time below, and must not keep this program.
    threads = [threading.Thread(target=one.run, args=(requests, wanted, count), daemon=True) for one in everybody]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and time.monotonic() - started < LIMIT_S + 2 * count:
        samples.append(server.rss_bytes())
        time.sleep(0.5)
    seconds = time.monotonic() - started
    hanging = sum(thread.is_alive() for thread in threads)
    if hanging:
        told.errors.append(f"{hanging} clients still wait after {seconds:.0f} s")
    samples.append(server.rss_bytes())
    now: dict = {}

    def is_idle() -> bool:
        now.update(get(f"{server.url}/api/pipeline"))
        return now["running"] == now["waiting"] == now["kv_used_tokens"] == 0

    try:
        idle = bool(wait_for("an idle pipeline", is_idle, 10))
    except TimeoutError:
        idle = False
    return Outcome(told, seconds, samples, idle, now)


def check(outcome: Outcome, wanted: int, checks: Checks) -> None:
    """Holds an outcome against what must be."""
    told = outcome.told
    checks.that(not told.errors, f"no error in {wanted} requests", (len(told.errors), told.errors[:3]))
    checks.that(told.answered == wanted, f"all {wanted} are answered, in {outcome.seconds:.0f} s", told.answered)
    checks.that(not told.others, "each with the tokens of standard input", (len(told.others), told.others[:2]))
    checks.that(outcome.is_idle, f"no place is stuck, though {told.left} clients left in mid-answer", outcome.now)
    growth = outcome.growth_bytes()
    for rank, grown in enumerate(growth):
        most = max(sample[rank] for sample in outcome.rss_bytes) / 1e6
        what = f"rank {rank}'s memory is flat: {grown / 1e6:+.1f} MB, {most:.0f} MB at most"
        checks.that(grown < MOST_GROWTH_BYTES, what, grown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64, metavar="N", help="clients at once (default: 64)")
    parser.add_argument("--requests", type=int, default=20, metavar="N", help="requests of each (default: 20)")
    options = parser.parse_args()
    checks = Checks(limit_s=LIMIT_S * 4 + 2 * options.requests)
    with Server(*OPTIONS) as server:
        outcome = storm(server, options.clients, options.requests)
        check(outcome, options.clients * options.requests, checks)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
