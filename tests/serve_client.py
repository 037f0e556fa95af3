#!/usr/bin/env python3
"""Asks a running server with OpenAI's own Python client, and holds the answers against those of standard input.

    tests/serve_client.py URL --key KEY

The server is a real one of three ranks with keys and the model of tests/serve_model.py (scripts/test-serve starts one).
Prints a line for each check; the exit status is 1 if one has failed.
"""

import argparse
import asyncio
import http.client
import json
import math
import re
import sys
import time
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

sys.dont_write_bytecode = True  # nothing beside the tests
import openai
from serve_checks import Checks, from_stdin, get, wait_for

LIMIT_S = 60
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Write a long story about a lighthouse, a storm and a small boat."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Client:
    """The official client, and the checks that it is put to."""

    def __init__(self, url: str, key: str, checks: Checks) -> None:
        self.url, self.key, self.checks = url, key, checks
        self.ask = openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=LIMIT_S, max_retries=0)
        self.model = self.ask.models.list().data[0].id

    def chat(self, messages: list[dict] = FRANCE, **fields: object) -> object:
        return self.ask.chat.completions.create(model=self.model, messages=messages, **fields)

    def complete(self, prompt: object, **fields: object) -> object:
        return self.ask.completions.create(model=self.model, prompt=prompt, **fields)

    def pipeline(self) -> dict:
        return get(f"{self.url}/api/pipeline", self.key)

    def raw(self, path: str, body: bytes, method: str = "POST", **headers: str) -> tuple[int, dict]:
        """Status and JSON of a request that the official client would not send."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=LIMIT_S)
        wanted = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        wanted.update({name.replace("_", "-"): value for name, value in headers.items()})
        try:
            connection.request(method, path, body, wanted)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"{}")
        finally:
            connection.close()

    def models(self) -> None:
        listed = [model.id for model in self.ask.models.list()]
        self.checks.that(len(listed) == 1, "one model is listed", listed)
        found = self.ask.models.retrieve(self.model)
        self.checks.that(found.id == self.model, "the model is found by its id", found)

    def chats(self) -> None:
        answer = self.chat()
        choice = answer.choices[0]
        self.checks.that("Paris" in choice.message.content, "a chat is answered", choice.message.content)
        self.checks.that(choice.finish_reason == "stop", "it ends by itself", choice.finish_reason)
        self.checks.that(choice.message.role == "assistant", "the assistant says it", choice.message.role)
        used = answer.usage
        is_sum = used.total_tokens == used.prompt_tokens + used.completion_tokens
        self.checks.that(is_sum and used.completion_tokens == 8 and used.prompt_tokens == 37, "usage adds up", used)
        short = self.chat(max_completion_tokens=3)
        is_short = short.usage.completion_tokens == 3 and short.choices[0].finish_reason == "length"
        self.checks.that(is_short, "max_completion_tokens bounds it", short)
        parts = [{"role": "user", "content": [{"type": "text", "text": FRANCE[0]["content"]}]}]
        again = self.chat(parts).choices[0].message.content
        self.checks.that(again == choice.message.content, "content in parts is the same as in one text", again)

    def completes(self) -> None:
        text = self.complete("The capital of France is", max_tokens=4).choices[0]
        self.checks.that(text.text.startswith(" Paris"), "a text is continued", text)
        ids = self.complete([504, 3575, 282, 4649, 314], max_tokens=4).choices[0]
        self.checks.that(ids.text == text.text, "so are its token ids, to the same end", ids)
        many = self.complete(["The capital of France is", "One, two, three,"], max_tokens=4)
        is_both = [choice.index for choice in many.choices] == [0, 1] and many.choices[0].text == text.text
        self.checks.that(is_both, "so are several texts at once, in order", many)
        arrays = self.complete([[504, 3575, 282, 4649, 314], [504, 3575]], max_tokens=4)
        is_both = len(arrays.choices) == 2 and arrays.choices[0].text == text.text
        self.checks.that(is_both, "and several arrays of token ids", arrays)

    def streams(self) -> None:
        whole = self.chat(STORY, max_tokens=40).choices[0].message.content
        chunks = list(self.chat(STORY, max_tokens=40, stream=True, stream_options={"include_usage": True}))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        self.checks.that("".join(pieces) == whole, "a streamed answer is the whole one", "".join(pieces))
        self.checks.that(sum(map(bool, pieces)) > 10, "it comes in many pieces", len(pieces))
        last = chunks[-1]
        is_usage = not last.choices and last.usage and last.usage.completion_tokens == 40
        self.checks.that(is_usage, "the last piece has the usage and nothing else", last)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        is_last = reasons[-1] == "length" and not any(reasons[:-1])
        self.checks.that(is_last, "the reason for the end comes once, last", reasons)
        self.checks.that(chunks[0].choices[0].delta.role == "assistant", "the first piece has the role", chunks[0])
        plain = list(self.chat(STORY, max_tokens=3, stream=True))
        self.checks.that(all(chunk.usage is None for chunk in plain), "usage comes only if asked for", plain[-1])
        text = "".join(chunk.choices[0].text for chunk in self.complete("One, two,", max_tokens=8, stream=True))
        self.checks.that(
            text == self.complete("One, two,", max_tokens=8).choices[0].text, "completions stream too", text
        )
        two = list(self.complete(["One, two,", "A, b, c,"], max_tokens=6, stream=True))
        texts = ["".join(chunk.choices[0].text for chunk in two if chunk.choices[0].index == index) for index in (0, 1)]
        alone = [self.complete(prompt, max_tokens=6).choices[0].text for prompt in ("One, two,", "A, b, c,")]
        self.checks.that(texts == alone, "so do several prompts at once", texts)
        body = json.dumps({"messages": FRANCE, "max_tokens": 2, "stream": True}).encode()
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            kind, text = answer.headers["Content-Type"], answer.read()
        is_sse = kind.startswith("text/event-stream") and text.endswith(b"data: [DONE]\n\n")
        self.checks.that(is_sse, "a stream is of server-sent events and ends with [DONE]", (kind, text[-40:]))

    def stops(self) -> None:
        answer = self.chat(STORY, max_tokens=40, logprobs=True).choices[0]
        text, tokens = answer.message.content, [entry.token for entry in answer.logprobs.content]
        # The end of one token and the beginning of the next, where this has not come up before.
        edges = [(place, tokens[place][-2:] + tokens[place + 1][:2]) for place in range(4, len(tokens) - 1)]
        stop = next(edge for place, edge in edges if text.find(edge) >= len("".join(tokens[:place])))
        wanted = text[: text.index(stop)]
        stopped = self.chat(STORY, max_tokens=40, stop=stop).choices[0]
        is_cut = stopped.message.content == wanted and stopped.finish_reason == "stop"
        self.checks.that(is_cut, f"a stop text over a token border ({stop!r}) ends the answer before it", stopped)
        chunks = list(self.chat(STORY, max_tokens=40, stop=["no such text", stop], stream=True))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        self.checks.that(streamed == wanted, "no part of it is streamed", streamed)

    def tells_logprobs(self) -> None:
        answer = self.chat(max_tokens=6, logprobs=True, top_logprobs=5).choices[0]
        entries = answer.logprobs.content
        tops = [[top.logprob for top in entry.top_logprobs] for entry in entries]
        self.checks.that([len(top) for top in tops] == [5] * 6, "top_logprobs has as many as were asked for", tops)
        is_sorted = all(top == sorted(top, reverse=True) for top in tops)
        self.checks.that(is_sorted, "they come best first", tops)
        is_best = all(entry.token == entry.top_logprobs[0].token for entry in entries)
        self.checks.that(is_best, "without temperature the best is taken", entries)
        sums = [sum(map(math.exp, top)) for top in tops]
        self.checks.that(all(0 < total <= 1.0001 for total in sums), "they are logarithms of probabilities", sums)
        text = b"".join(bytes(entry.bytes) for entry in entries).decode()
        self.checks.that(text == answer.message.content, "their bytes are the answer", text)
        old = self.complete("The capital of France is", max_tokens=3, logprobs=2).choices[0].logprobs
        is_old = "".join(old.tokens).startswith(" Paris") and [len(top) for top in old.top_logprobs] == [2] * 3
        self.checks.that(is_old, "completions have them in their own shape", old)
        streamed = list(self.chat(max_tokens=6, logprobs=True, top_logprobs=5, stream=True))
        found = [
            entry for chunk in streamed if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
        ]
        self.checks.that(found == entries, "they are the same in a stream", found)

    def has_seeds(self) -> None:
        def sampled(**fields: object) -> str:
            return self.chat(STORY, max_tokens=24, temperature=1.3, **fields).choices[0].message.content

        self.checks.that(sampled(seed=7) == sampled(seed=7), "the same seed gives the same answer")
        self.checks.that(sampled(seed=7) != sampled(seed=8), "another seed gives another")
        self.checks.that(sampled() != sampled(), "so does none at all, each time")
        narrow = sampled(seed=7, top_p=0.01)
        greedy = self.chat(STORY, max_tokens=24, temperature=0).choices[0].message.content
        self.checks.that(narrow == greedy, "a top_p of next to nothing takes the best", narrow)

    def has_choices(self) -> None:
        answer = self.chat(STORY, max_tokens=16, temperature=1.3, seed=3, n=3)
        texts = [choice.message.content for choice in answer.choices]
        self.checks.that(len(set(texts)) == 3, "n = 3 gives three answers that differ", texts)
        self.checks.that([choice.index for choice in answer.choices] == [0, 1, 2], "they are numbered", answer)
        alone = self.chat(STORY, max_tokens=1)
        is_once = answer.usage.prompt_tokens == alone.usage.prompt_tokens and answer.usage.completion_tokens == 48
        self.checks.that(is_once, "the prompt counts once, all answers count", answer.usage)
        again = self.chat(STORY, max_tokens=16, temperature=1.3, seed=3, n=3, stream=True)
        streamed = ["", "", ""]
        for chunk in again:
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        self.checks.that(streamed == texts, "with the same seed they are the same in a stream", streamed)

    def has_biases(self) -> None:
        first = self.chat(max_tokens=1).choices[0]
        token = first.model_extra["token_ids"][0]
        other = self.chat(max_tokens=1, logit_bias={str(token): -100}).choices[0]
        self.checks.that(other.model_extra["token_ids"][0] != token, "logit_bias -100 forbids a token", other)
        forced = self.chat(max_tokens=4, logit_bias={"7042": 100}).choices[0]
        self.checks.that(forced.model_extra["token_ids"] == [7042] * 4, "logit_bias 100 forces one", forced)
        fields = {"messages": [{"role": "user", "content": "Say: ha ha ha ha ha ha ha ha"}], "max_tokens": 32}
        plain = self.chat(**fields, logit_bias={"7042": 15})
        counts = []
        for penalties in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
            answer = self.chat(**fields, logit_bias={"7042": 15}, **penalties).choices[0]
            counts.append(answer.model_extra["token_ids"].count(7042))
        without = plain.choices[0].model_extra["token_ids"].count(7042)
        self.checks.that(counts[0] < without, "frequency_penalty makes a token rarer", (without, counts))
        self.checks.that(counts[1] <= without, "presence_penalty is taken", (without, counts))

    def has_tools(self) -> None:
        # Three calls to copy: a model this small calls nothing of its own accord.
        messages: list[dict] = []
        for number, city in enumerate(("Rome", "Madrid", "Berlin")):
            function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
            call = {"id": f"call_{number}", "type": "function", "function": function}
            messages += [
                {"role": "user", "content": f"What is the weather in {city}?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
                {"role": "assistant", "content": f"It is sunny in {city}."},
            ]
        messages.append({"role": "user", "content": "What is the weather in Paris?"})
        choice = self.chat(messages, tools=[WEATHER], max_tokens=64).choices[0]
        calls = choice.message.tool_calls or []
        is_called = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
        wanted = [("get_weather", {"city": "Paris"})]
        self.checks.that(is_called == wanted and choice.finish_reason == "tool_calls", "a tool is called", choice)
        name, arguments, reasons = "", "", []
        for chunk in self.chat(messages, tools=[WEATHER], max_tokens=64, stream=True):
            reasons.append(chunk.choices[0].finish_reason)
            for call in chunk.choices[0].delta.tool_calls or []:
                name, arguments = name + (call.function.name or ""), arguments + (call.function.arguments or "")
        found = [(name, json.loads(arguments or "null"))]
        self.checks.that(found == wanted and reasons[-1] == "tool_calls", "in a stream as well", (found, reasons[-1:]))
        result = {"role": "tool", "tool_call_id": calls[0].id if calls else "", "content": "sunny"}
        messages += [choice.message.model_dump(exclude_none=True, exclude={"annotations"}), result]
        answer = self.chat(messages, tools=[WEATHER], max_tokens=32).choices[0].message.content or ""
        self.checks.that("Paris" in answer, "its result is answered", answer)
        no_tools = self.chat(tools=[], max_tokens=8).choices[0].message.content
        self.checks.that("Paris" in no_tools, "an empty list of tools changes nothing", no_tools)

    def metrics(self) -> dict[str, float]:
        """Every sample at /metrics; a line that Prometheus would not read is an error."""
        request = urllib.request.Request(f"{self.url}/metrics", headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            lines = answer.read().decode().splitlines()
        sample = re.compile(r'([a-zA-Z_:][\w:]*(?:\{(?:\w+="[^"\n]*",?)*\})?) (-?\d[\d.e+-]*|\+Inf|NaN)')
        found = {}
        for line in lines:
            if line.startswith(("# HELP ", "# TYPE ")):
                continue
            match = sample.fullmatch(line)
            if match is None or match[1] in found:
                raise ValueError(f"no sample, or one twice: {line}")
            found[match[1]] = float(match[2])
        return found

    def has_metrics(self) -> None:
        wait_for("an idle pipeline", self.is_idle)
        before = self.metrics()
        long = "Metrics count what was computed. " * 60
        used = self.complete(long, max_tokens=5, n=3, temperature=1.0, seed=1).usage
        time.sleep(1)  # the loop tells what it has done twice a second
        after = self.metrics()
        more = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name)}
        checks, answered = self.checks, more.get('mlx_pipe_requests_total{outcome="answered"}')
        checks.that(answered == 1, "an answered request is counted", more)
        checks.that(more.get("mlx_pipe_tokens_total") == used.completion_tokens == 15, "so are its tokens", more)
        computed = more.get("mlx_pipe_computed_prompt_tokens_total", 0)
        is_shared = used.prompt_tokens <= computed < 1.5 * used.prompt_tokens
        checks.that(is_shared, "three choices compute their prompt once", (used.prompt_tokens, computed))
        bounds = {name: after[name] for name in after if name.startswith("mlx_pipe_first_token_seconds_bucket")}
        counts = list(bounds.values())
        is_histogram = counts == sorted(counts) and counts[-1] == after["mlx_pipe_first_token_seconds_count"]
        checks.that(is_histogram, "the histogram of first tokens adds up", bounds)
        ranks = {name for name in after if 'rank="2"' in name}
        checks.that(len(ranks) >= 4, "every rank has its samples", sorted(ranks))

    def fails(
        self, wanted: type[openai.APIStatusError], what: str, param: str | None, ask: Callable[[], object]
    ) -> None:
        """Checks that a question is refused, in which way, and for which field."""
        try:
            found = ask()
        except openai.APIStatusError as error:
            found = (type(error).__name__, error.param, str(error))
            is_told = type(error) is wanted and (param is None or error.param == param) and len(error.message) > 20
            self.checks.that(is_told, f"{what}: {error.status_code}", found)
        else:
            self.checks.that(False, what, found)

    def has_errors(self) -> None:
        bad, chat = openai.BadRequestError, self.chat
        stranger = openai.OpenAI(base_url=f"{self.url}/v1", api_key="not-the-key", max_retries=0, timeout=LIMIT_S)
        self.fails(openai.AuthenticationError, "a wrong key", None, stranger.models.list)
        self.fails(openai.NotFoundError, "an unknown model", None, lambda: self.ask.models.retrieve("gpt-0"))
        self.fails(
            openai.NotFoundError, "an unknown address", None, lambda: self.ask.embeddings.create(model="m", input="x")
        )
        self.fails(bad, "no messages", "messages", lambda: chat([]))
        self.fails(bad, "a temperature below 0", "temperature", lambda: chat(temperature=-1))
        self.fails(bad, "a role that is none", None, lambda: chat([{"role": "captain", "content": "Hi"}]))
        self.fails(bad, "no token at all", "max_tokens", lambda: chat(max_tokens=0))
        self.fails(bad, "top_logprobs of 99", "top_logprobs", lambda: chat(logprobs=True, top_logprobs=99))
        self.fails(bad, "a hundred thousand choices", "n", lambda: chat(n=100_000))
        self.fails(bad, "17 stop texts", "stop", lambda: chat(stop=[str(number) for number in range(17)]))
        self.fails(bad, "a response_format", "response_format", lambda: chat(response_format={"type": "json_object"}))
        self.fails(bad, "an unknown field", "tempreature", lambda: chat(extra_body={"tempreature": 1}))
        self.fails(
            bad,
            "an image",
            None,
            lambda: chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        )
        self.fails(bad, "a prompt longer than the context", None, lambda: self.complete([1] * 100_000))
        self.fails(
            openai.UnprocessableEntityError, "a token beyond the vocabulary", None, lambda: self.complete([9_999_999])
        )
        self.fails(openai.APIStatusError, "a body of 5 MB", None, lambda: self.complete("x" * 5_000_000))
        path, body = "/v1/chat/completions", json.dumps({"messages": FRANCE, "max_tokens": 1}).encode()
        for what, wanted, found in (
            ("a body that is no JSON", 400, self.raw(path, b"{")),
            ("an empty body", 400, self.raw(path, b"")),
            ("a body of another type", 415, self.raw(path, body, Content_Type="text/plain")),
            ("GET where POST is due", 405, self.raw(path, b"", method="GET")),
            ("a page of another origin", 403, self.raw(path, body, Origin="http://elsewhere.example")),
        ):
            has_shape = set(found[1].get("error", {})) >= {"message", "type", "param", "code"}
            self.checks.that(found[0] == wanted and has_shape, f"{what}: {wanted}", found)

    def is_idle(self) -> bool:
        now = self.pipeline()
        return now["running"] == now["waiting"] == now["kv_used_tokens"] == 0

    def cancels(self) -> None:
        wait_for("an idle pipeline", self.is_idle)
        stream = self.chat(STORY, max_tokens=2000, stream=True)
        for _, _ in zip(range(5), stream):
            pass
        wait_for("a running sequence", lambda: self.pipeline()["running"] == 1, 2)
        self.checks.that(True, "an answer under way is running")
        stream.close()
        wait_for("its place", self.is_idle, 2)
        self.checks.that(True, "its place and its cache are free when the client has left")
        impatient = self.ask.with_options(timeout=0.5)
        try:
            answer = impatient.chat.completions.create(model=self.model, messages=STORY, max_tokens=2000)
            self.checks.that(False, "a client gives up", answer)
        except openai.APITimeoutError:
            wait_for("its place", self.is_idle, 2)
            self.checks.that(True, "so are those of a client that gives up on a whole answer")
        streams = [self.chat(STORY, max_tokens=2000, stream=True) for _ in range(24)]
        waiting = self.pipeline()["waiting"]
        for stream in streams:
            stream.close()
        wait_for("all places", self.is_idle, 5)
        self.checks.that(True, f"and those of 24 at once, {waiting} of which wait")
        self.checks.that("Paris" in self.chat().choices[0].message.content, "others are answered as ever")

    def equals_stdin(self) -> None:
        long = "The history of the sea is long. " * 40
        requests: list[dict] = [
            {"messages": FRANCE, "max_tokens": 24},
            {"messages": STORY, "max_tokens": 48, "temperature": 1.1, "seed": 11},
            {
                "messages": STORY,
                "max_tokens": 48,
                "temperature": 0.9,
                "top_p": 0.8,
                "top_k": 40,
                "min_p": 0.02,
                "seed": 12,
            },
            {
                "messages": [{"role": "system", "content": "Be brief."}, *FRANCE],
                "max_tokens": 24,
                "repetition_penalty": 1.2,
            },
            {"prompt": "The capital of France is", "max_tokens": 24, "logprobs": 3},
            {"prompt": [504, 3575, 282, 4649, 314], "max_tokens": 24, "temperature": 1.5, "seed": 2**63},
            {"prompt": long, "max_tokens": 32, "temperature": 0.8, "seed": 5, "stop": [".", "\n"]},
        ]
        paths = ["/v1/chat/completions" if "messages" in request else "/v1/completions" for request in requests]
        wanted = [answer["choices"][0] for answer in from_stdin(requests)]
        alone = [self.raw(path, json.dumps(request).encode())[1] for path, request in zip(paths, requests)]

        async def all_at_once() -> list[dict]:
            asked = zip(paths, requests)
            calls = [asyncio.to_thread(self.raw, path, json.dumps(request).encode()) for path, request in asked]
            return [answer for _, answer in await asyncio.gather(*calls)]

        beside = asyncio.run(all_at_once())
        for place, (request, line) in enumerate(zip(requests, wanted)):
            for how, answers in (("alone", alone), ("beside others", beside)):
                found = answers[place].get("choices", [answers[place]])[0]
                text = found.get("text", found.get("message", {}).get("content"))
                line_text = line.get("text", line.get("message", {}).get("content"))
                is_same = found.get("token_ids") == line["token_ids"] and text == line_text
                is_same = is_same and found.get("finish_reason") == line["finish_reason"]
                is_same = is_same and found.get("logprobs") == line["logprobs"]
                what = ", ".join(name for name in request if name not in ("max_tokens",))
                self.checks.that(is_same, f"as over standard input, {how}: {what}", (text, line_text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="address of the server, such as http://127.0.0.1:8080")
    parser.add_argument("--key", required=True, help="a key that the server knows")
    options = parser.parse_args()
    checks = Checks()
    client = Client(options.url.rstrip("/"), options.key, checks)
    for name, section in (
        ("models", client.models),
        ("chat", client.chats),
        ("completions", client.completes),
        ("streams", client.streams),
        ("stop texts", client.stops),
        ("logprobs", client.tells_logprobs),
        ("seeds", client.has_seeds),
        ("choices", client.has_choices),
        ("biases and penalties", client.has_biases),
        ("tools", client.has_tools),
        ("errors", client.has_errors),
        ("metrics", client.has_metrics),
        ("cancelling", client.cancels),
        ("standard input", client.equals_stdin),
    ):
        checks.section(name, section)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
