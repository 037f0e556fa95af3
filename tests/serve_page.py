#!/usr/bin/env python3
"""Uses the server's page as a person with a keyboard does, in a headless Chromium, and takes the README's pictures.

    tests/serve_page.py URL --key KEY [--pictures FOLDER]

The server is a real one with keys (scripts/test-serve starts one). Chromium is driven over its DevTools protocol, on a
pair of pipes: no port, no driver program, no package.
"""

import argparse
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

sys.dont_write_bytecode = True  # nothing beside the tests
from serve_checks import Checks, get, wait_for

MAC_CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", MAC_CHROME)
ANSWER_LIMIT_S = 10  # of the browser, to a command
MARKS = {"Enter": ("Enter", 13, "\r"), "Tab": ("Tab", 9, ""), "Escape": ("Escape", 27, ""), " ": ("Space", 32, " ")}
STORY = "Write a long story about a lighthouse, a storm and a small boat. Do not stop early."


class Browser:
    """A headless Chromium with one page, and everything that the page has asked for and complained about."""

    def __init__(self, profile: str) -> None:
        name = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
        if name is None:
            sys.exit("serve_page: there is no chromium; install Debian's package chromium")
        from_us, to_us = os.pipe(), os.pipe()
        # Out of the way of 3 and 4, where Chromium looks for them.
        read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (from_us[0], to_us[1]))
        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu"]
        flags += ["--disable-dev-shm-usage", "--hide-scrollbars", "--lang=en", "--force-color-profile=srgb"]
        # Debian's own build phones nobody, but a page's request to elsewhere must fail rather than leave the machine.
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        shell = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        command = ["bash", "-c", shell, "-", str(read), str(write), name, *flags, "about:blank"]
        self.process = subprocess.Popen(
            command,
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (from_us[0], to_us[1], read, write):
            os.close(end)
        self.to_browser, self.from_browser = from_us[1], to_us[0]
        self.buffer, self.next_id, self.session = bytearray(), 0, None
        self.events: deque[dict] = deque()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        targets = self.call("Target.getTargets", limit_s=30)["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """Ends the browser, whatever it does."""
        self.process.terminate()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, method: str, limit_s: float = ANSWER_LIMIT_S, **parameters: object) -> dict:
        """The result of a DevTools command.

        Raises TimeoutError without an answer within `limit_s`, RuntimeError if it is an error."""
        self.next_id += 1
        message = {"id": self.next_id, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + limit_s
        while True:
            answer = self.next_message(end, method)
            if answer.get("id") != self.next_id:
                self.note(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def next_message(self, end: float, what: str) -> dict:
        while (length := self.buffer.find(b"\0")) < 0:
            if not select.select([self.from_browser], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser does not answer to {what}")
            part = os.read(self.from_browser, 1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self.buffer += part
        message = json.loads(self.buffer[:length])
        del self.buffer[: length + 1]
        return message

    def note(self, event: dict) -> None:
        """Keeps what the page asks for, and what it complains about."""
        details = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(details["request"]["url"])
            case "Runtime.exceptionThrown":
                thrown = details["exceptionDetails"]
                self.complaints.append(thrown.get("exception", {}).get("description", thrown["text"]))
            case "Runtime.consoleAPICalled" if details["type"] in ("error", "warning", "assert"):
                self.complaints.append(str([argument.get("value") for argument in details["args"]]))
            case "Log.entryAdded" if details["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{details['entry']['text']} ({details['entry'].get('url', '')})")

    def value(self, expression: str) -> object:
        """What a JavaScript expression is on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        """Presses and releases a key, with what it types."""
        code, number, text = MARKS.get(key, ("", 0, key))
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Types a text, key by key."""
        for key in text:
            self.press(key)

    def focused(self) -> str:
        """The id of the element that has the focus."""
        return self.value("document.activeElement?.id ?? ''")

    def tab_to(self, element_id: str, back: bool = False) -> None:
        """Presses Tab until the element has the focus.

        Raises RuntimeError if it cannot be reached so."""
        for _ in range(40):
            if self.focused() == element_id:
                return
            self.press("Tab", shift=back)
        raise RuntimeError(f"Tab does not lead to {element_id}")

    def size(self, width: int, height: int) -> None:
        """Makes the window so large, in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def scheme(self, name: str) -> None:
        """Prefers `light` or `dark`."""
        features = [
            {"name": "prefers-color-scheme", "value": name},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        """Writes what is seen now, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", optimizeForSpeed=False)
        path.write_bytes(base64.b64decode(shot["data"]))


class Person:
    """Somebody who uses the page by keyboard."""

    def __init__(self, browser: Browser, url: str, key: str, checks: Checks) -> None:
        self.browser, self.url, self.key, self.checks = browser, url, key, checks

    def pipeline(self) -> dict:
        return get(f"{self.url}/api/pipeline", self.key)

    def last(self, what: str = "body") -> str:
        """The text of the last answer, or its notes."""
        selector = {"body": ".answer > .answer", "notes": ".notes", "trouble": ".trouble"}[what]
        items = f"[...document.querySelectorAll('#turns > li.answer')].at(-1)?.querySelector('{selector}')"
        return self.browser.value(f"{items}?.textContent ?? ''")

    def is_answering(self) -> bool:
        return self.browser.value("document.getElementById('log').getAttribute('aria-busy') === 'true'")

    def ask(self, question: str) -> None:
        self.browser.tab_to("message")
        self.browser.type(question)
        self.browser.press("Enter")

    def wait_until_answered(self, limit_s: float = 60) -> None:
        wait_for("the end of the answer", lambda: not self.is_answering(), limit_s)

    def gives_the_key(self) -> None:
        browser, checks = self.browser, self.checks
        browser.call("Page.navigate", url=f"{self.url}/")
        wait_for("the question for a key", lambda: browser.focused() == "key")
        checks.that(True, "the page asks for the key that the server wants, and puts the focus there")
        with urllib.request.urlopen(f"{self.url}/", timeout=10) as page:
            policy = page.headers["Content-Security-Policy"] or "none"
        is_closed = "default-src 'none'" in policy and "connect-src 'self'" in policy
        checks.that(is_closed, "its policy lets it ask nobody else", policy)
        browser.type("not-the-key")
        browser.press("Enter")
        wait_for("the complaint", lambda: "not know" in browser.value("document.getElementById('key-why').textContent"))
        checks.that(True, "a wrong key is said to be wrong")
        browser.type(self.key)
        browser.press("Enter")
        wait_for("a ready pipeline", lambda: browser.value("document.getElementById('dot').dataset.state") == "ready")
        checks.that(browser.focused() == "message", "with the key the focus is on the message", browser.focused())
        # What is said from here on is not about missing keys.
        refused = [complaint for complaint in browser.complaints if "401" not in complaint]
        checks.that(not refused, "nothing but the refused key is on the console", refused)
        browser.complaints.clear()

    def sees_the_ranks(self) -> None:
        browser, checks = self.browser, self.checks
        ranks = browser.value("[...document.querySelectorAll('.rank')].map(rank => rank.innerText)")
        now = self.pipeline()
        checks.that(len(ranks) == len(now["ranks"]) == 3, "there is a card for each of three ranks", ranks)
        for rank, card in zip(now["ranks"], ranks):
            first, end = rank["layers"]
            layers = f"{first} to {end - 1}" if end - first > 1 else str(first)
            shown = [f"Rank {rank['rank']}", rank["host"], rank["device"], layers, "busy", "wait", "wire"]
            missing = [text for text in shown if text not in card]
            checks.that(
                not missing, f"the card of rank {rank['rank']} has its host, device, layers and shares", missing
            )

    def sees_an_answer_grow(self) -> None:
        browser, checks = self.browser, self.checks
        self.ask("What is the capital of France?")
        self.wait_until_answered()
        checks.that("Paris" in self.last(), "the answer knows the capital of France", self.last())
        notes = self.last("notes")
        told = all(text in notes for text in ("tokens/s", "first token after", "tokens"))
        checks.that(told, "speed, time to the first token and tokens stand beneath it", notes)
        self.ask(STORY)
        lengths = set()
        busiest = rate = 0.0
        while self.is_answering() and len(lengths) < 400:
            lengths.add(len(self.last()))
            shares = "[...document.querySelectorAll('.bar .busy')].map(bar => bar.getBoundingClientRect().width)"
            busiest = max([busiest, *browser.value(shares)])
            rate = max(rate, float(browser.value("document.getElementById('rate').textContent").replace(",", "") or 0))
            if len(lengths) > 15 and busiest > 0 and rate > 0:
                break
            time.sleep(0.05)
        checks.that(len(lengths) > 15, "the text of an answer grows in many pieces", len(lengths))
        checks.that(busiest > 0, "a rank's bar shows that it computes", busiest)
        checks.that(rate > 0, "the tokens a second are shown", rate)

    def stops(self) -> None:
        browser, checks = self.browser, self.checks
        if not self.is_answering():
            self.ask(STORY)
            wait_for("the first piece", self.last)
        browser.press("Escape")
        wait_for("the end", lambda: not self.is_answering(), 5)
        length = len(self.last())
        checks.that("stopped" in self.last("notes"), "Escape stops the answer, and it says so", self.last("notes"))
        checks.that(length > 0, "what there was of the answer stays", length)
        wait_for("a free pipeline", lambda: self.pipeline()["running"] == 0, 5)
        checks.that(len(self.last()) == length, "the server computes nothing more of it")
        self.ask(STORY)
        wait_for("the first piece", self.last)
        browser.tab_to("stop")
        browser.press("Enter")
        wait_for("the end", lambda: not self.is_answering(), 5)
        checks.that("stopped" in self.last("notes"), "so does the button, by keyboard", self.last("notes"))
        checks.that(browser.focused() == "message", "then the focus is on the message again", browser.focused())

    def sets(self) -> None:
        browser, checks = self.browser, self.checks
        browser.tab_to("show-settings")
        browser.press("Enter")
        browser.tab_to("system", back=True)
        browser.type("You speak of ships only.")
        browser.tab_to("temperature")
        browser.type("5")
        before = len(browser.requests)
        self.ask("Hi")
        time.sleep(0.3)
        asked = [url for url in browser.requests[before:] if "completions" in url]
        checks.that(
            not asked and browser.focused() == "temperature", "a temperature of 5 is refused where it stands", asked
        )
        browser.call(
            "Input.dispatchKeyEvent", type="keyDown", key="a", code="KeyA", modifiers=2, commands=["selectAll"]
        )
        browser.type("0")
        browser.tab_to("max-tokens")
        browser.type("5")
        browser.tab_to("message")
        browser.press("Enter")
        self.wait_until_answered()
        notes = self.last("notes")
        checks.that("5 tokens" in notes and "ended at" in notes, "an answer has the most tokens that were set", notes)

    def sees_errors(self) -> None:
        browser, checks = self.browser, self.checks
        browser.complaints.clear()
        browser.tab_to("message")
        browser.call("Input.insertText", text="word " * 20_000)
        browser.press("Enter")
        self.wait_until_answered()
        trouble = self.last("trouble")
        checks.that(len(trouble) > 20, "a prompt longer than the context is answered with the server's reason", trouble)
        refused = [complaint for complaint in browser.complaints if "400" not in complaint and "422" not in complaint]
        checks.that(not refused, "nothing but the refused prompt is on the console", refused)
        conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        browser.call("Network.emulateNetworkConditions", offline=True, **conditions)
        state = "document.getElementById('state-text').textContent"
        wait_for("the notice", lambda: "cannot be reached" in browser.value(state), 10)
        self.ask("Are you there?")
        wait_for("the error", lambda: self.last("trouble"), 5)
        checks.that("lost" in self.last("trouble"), "a server that is away is said to be away", self.last("trouble"))
        browser.call("Network.emulateNetworkConditions", offline=False, **conditions)
        wait_for("the server", lambda: "ready" in browser.value(state), 10)
        for _ in range(40):
            if browser.value("document.activeElement.textContent") == "Try again":
                break
            browser.press("Tab", shift=True)
        browser.press("Enter")
        wait_for("the second try", lambda: not self.is_answering() and self.last(), 30)
        checks.that(not self.last("trouble"), "it can be tried again, by keyboard", self.last("trouble"))
        browser.complaints.clear()

    def is_harmless(self) -> None:
        browser, checks = self.browser, self.checks
        hostile = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
        self.ask(hostile)
        self.wait_until_answered()
        asked = browser.value("[...document.querySelectorAll('.question')].at(-1).innerText")
        checks.that(hostile in asked, "markup in a question is shown as it is", asked)
        text = json.dumps(f"{hostile}\n\n```html\n{hostile}\n```\n\n`<b>` and ~~~\n~~~\n<i>\n")
        made = f"""(() => {{
          const at = document.createElement('div');
          document.getElementById('turns').append(at);
          show(at, {text});
          return at.outerHTML;
        }})()"""
        html = browser.value(made)
        found = browser.value("document.querySelectorAll('#turns img, #turns script, #turns b, #turns i').length")
        is_taken = browser.value("document.title") != "mlx-pipe"
        checks.that(found == 0 and not is_taken, "markup in an answer is text", html)
        checks.that(html.count("<pre") == 2 and "<code>&lt;b&gt;</code>" in html, "code in an answer is code", html)

    def begins_anew(self) -> None:
        browser, checks = self.browser, self.checks
        browser.tab_to("new-chat", back=True)
        browser.press("Enter")
        left = browser.value("document.getElementById('turns').children.length")
        checks.that(
            left == 0 and browser.focused() == "message", "a new chat is empty, with the focus on the message", left
        )

    def names_everything(self) -> None:
        nodes = self.browser.call("Accessibility.getFullAXTree")["nodes"]
        roles = ("button", "textbox", "spinbutton", "list", "log", "complementary", "status")
        wanted = [node for node in nodes if node.get("role", {}).get("value") in roles[:4] and not node.get("ignored")]
        nameless = [
            node["role"]["value"]
            for node in wanted
            if node["role"]["value"] != "list" and not node.get("name", {}).get("value")
        ]
        self.checks.that(len(wanted) > 5 and not nameless, "every control has a name for a screen reader", nameless)
        present = {node.get("role", {}).get("value") for node in nodes}
        self.checks.that(
            set(roles) <= present, "conversation, state and pipeline have their roles", set(roles) - present
        )

    def fits_small_windows(self) -> None:
        browser, checks = self.browser, self.checks
        browser.size(360, 640)
        # The conversation scrolls by itself, and must do so in one direction only.
        log = "document.getElementById('log')"
        width = f"[Math.max(document.documentElement.scrollWidth, {log}.scrollWidth), window.innerWidth]"
        word = "x" * 300
        # A question and an answer that do not break by themselves.
        text = json.dumps(f"{word}\n\n```\n{word}\n```\n\n`{word}`")
        browser.value(f"show(addTurn('{word}').body, {text})")
        for panels in ([], ["settings"], ["pipeline"], ["settings", "pipeline"]):
            for panel in ("settings", "pipeline"):
                browser.value(f"setOpen('{panel}', {json.dumps(panel in panels)})")
            content, window = browser.value(width)
            name = " and ".join(panels) or "no panel"
            checks.that(content <= window == 360, f"360 pixels are wide enough, with {name} open", (content, window))
            wide = browser.value("""[...document.querySelectorAll('body *')]
              .filter(one => one.checkVisibility() && !one.closest('pre, .out-of-sight'))
              .filter(one => one.getBoundingClientRect().right > innerWidth + 1)
              .map(one => one.id || one.className || one.tagName)""")
            checks.that(not wide, f"nothing stands out to the right, with {name} open", wide)
            box = "document.getElementById('message').getBoundingClientRect()"
            box = browser.value(f"[{box}.top, {box}.bottom]")
            checks.that(0 <= box[0] < box[1] <= 640, f"the message can be seen, with {name} open", box)
        browser.value("setOpen('settings', false)")
        browser.size(1200, 800)
        browser.value("setOpen('pipeline', true)")
        self.begins_anew()

    def reads_well(self) -> None:
        """Contrasts as WCAG has them: 4.5 for text."""
        contrast = """(selector => {
          const light = color => {
            const parts = color.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255);
            const linear = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
          };
          const one = document.querySelector(selector);
          let ground = one;
          while (/^rgba\\(.*, 0\\)$/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
          const text = light(getComputedStyle(one).color), behind = light(getComputedStyle(ground).backgroundColor);
          return (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
        })"""
        browser, checks = self.browser, self.checks
        grounds = []
        browser.value("document.getElementById('turns').append(element('li', 'trouble', 'trouble'))")
        for scheme in ("light", "dark"):
            browser.scheme(scheme)
            grounds.append(browser.value("getComputedStyle(document.body).backgroundColor"))
            places = (
                "body",
                "#state-text",
                "#send",
                "#hint",
                "#new-chat",
                ".rank dt",
                "#rate",
                "#welcome p",
                ".trouble",
            )
            low = {place: found for place in places if (found := browser.value(f"{contrast}('{place}')")) < 4.5}
            checks.that(not low, f"all text can be read on its ground, {scheme}", low)
        checks.that(grounds[0] != grounds[1], "light and dark differ", grounds)
        browser.value("document.querySelector('#turns > .trouble').remove()")


def talk_beside(url: str, key: str, over: threading.Event) -> None:
    """Another client, so that the pictures show more than one sequence."""
    body = {"messages": [{"role": "user", "content": STORY}], "max_tokens": 400, "stream": True}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    while not over.is_set():
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            for _ in answer:
                if over.is_set():
                    break


def take_pictures(person: Person, folder: Path) -> None:
    """The page in light and dark, with an answer before and one under way, and three clients beside."""
    browser, over = person.browser, threading.Event()
    folder.mkdir(parents=True, exist_ok=True)
    browser.size(1120, 830)
    person.ask("What is the capital of France?")
    person.wait_until_answered()
    others = [threading.Thread(target=talk_beside, args=(person.url, person.key, over)) for _ in range(3)]
    for other in others:
        other.start()
    try:
        time.sleep(4)  # shares and rates are those of so long
        person.ask("Tell me about the sea in three short paragraphs.")
        count = "Number(document.getElementById('running').textContent)"
        wait_for("some text", lambda: len(person.last()) > 250 and browser.value(count) >= 3, 30)
        for scheme in ("light", "dark"):
            browser.scheme(scheme)
            browser.picture(folder / f"serve-{scheme}.png")
    finally:
        over.set()
        for other in others:
            other.join(timeout=60)
    person.wait_until_answered()
    size = sum((folder / f"serve-{scheme}.png").stat().st_size for scheme in ("light", "dark"))
    person.checks.that(size < 300_000, "both pictures together have less than 300 kB", size)


def is_alone(browser: Browser, url: str) -> list[str]:
    """What the page has asked of anybody but the server."""
    own = urlsplit(url)
    parts = map(urlsplit, browser.requests)
    return [part.geturl() for part in parts if part.scheme != "data" and part.netloc != own.netloc]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="address of the server, such as http://127.0.0.1:8080")
    parser.add_argument("--key", required=True, help="a key that the server knows")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write serve-light.png and serve-dark.png there"
    )
    options = parser.parse_args()
    checks = Checks()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            browser.size(1200, 800)
            browser.scheme("light")
            person = Person(browser, options.url.rstrip("/"), options.key, checks)
            steps: list[tuple[str, Callable[[], None]]] = [
                ("giving the key", person.gives_the_key),
                ("the ranks", person.sees_the_ranks),
                ("an answer", person.sees_an_answer_grow),
                ("stopping", person.stops),
                ("settings", person.sets),
                ("errors", person.sees_errors),
                ("markup", person.is_harmless),
                ("a new chat", person.begins_anew),
                ("names", person.names_everything),
                ("small windows", person.fits_small_windows),
                ("contrast", person.reads_well),
            ]
            for name, step in steps:
                checks.section(name, step)
            if options.pictures:
                browser.call("Page.reload")
                wait_for(
                    "a ready page", lambda: browser.value("document.getElementById('dot')?.dataset.state") == "ready"
                )
                checks.section("pictures", lambda: take_pictures(person, options.pictures))
            checks.that(not browser.complaints, "there is no error on the console", browser.complaints)
            elsewhere = is_alone(browser, options.url)
            checks.that(browser.requests and not elsewhere, "the page asks nobody but its server", elsewhere)
        finally:
            browser.close()
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
