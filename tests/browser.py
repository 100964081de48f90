"""A real browser for tests of pages: headless Chromium, driven over its DevTools protocol.

Debian: apt-get install chromium. Tests that use it skip where there is none:

    def test_a_page(browser: Browser, tmp_path: Path) -> None:  # the fixture is in conftest.py
        with browser.open(tmp_path / "page.html", width=390, dark=True) as page:
            page.click("#button")
            assert page.js("document.title") == "Clicked"
            page.screenshot(tmp_path / "page.png")
            assert page.errors == [] and page.requests == []

The protocol is spoken over a pair of pipes (`--remote-debugging-pipe`), so neither ports nor packages are needed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # tests in containers run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-quic",
    "--disable-sync",
    "--remote-debugging-pipe",
)
_LIMIT = 60.0  # seconds any one answer may take


def executable() -> str | None:
    """Where a Chromium or Chrome is, or None. CHROMIUM names another one."""
    return shutil.which(os.environ.get("CHROMIUM", "")) or next(filter(None, map(shutil.which, _NAMES)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """One browser for all tests; they skip where there is none."""
    found = executable()
    if found is None:
        pytest.skip("no Chromium or Chrome is installed (Debian: apt-get install chromium)")
    with Browser(found) as started:
        yield started


class Browser:
    """A running Chromium. `open` gives one page after another."""

    def __init__(self, path: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        pipes = f"exec 3<&{to_read} 4>&{to_write}"  # Chromium reads from 3 and writes to 4
        command = ["bash", "-c", f'{pipes}; exec "$@"', "bash", path, *_FLAGS, f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            command, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []  # what happened in the open page, oldest first

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._write)  # Chromium ends when nobody can speak to it any more
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        self._profile.cleanup()

    @contextmanager
    def open(
        self, page: Path | str, *, width: int = 1200, height: int = 900, dark: bool = False, touch: bool = False
    ) -> Iterator["Page"]:
        """Load a file or a URL in a window of that size, in the light or the dark colour scheme."""
        url = page.resolve().as_uri() if isinstance(page, Path) else page
        self.events = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        opened = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            opened.send(f"{domain}.enable")
        opened.resize(width, height, touch=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        opened.send("Emulation.setEmulatedMedia", features=[scheme])
        opened.send("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")
        opened.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        try:
            yield opened
        finally:
            self.send("Target.closeTarget", targetId=target)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call one method of the protocol and return its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        left = json.dumps(message).encode() + b"\0"
        while left:
            left = left[os.write(self._write, left) :]
        while True:
            answer = self._next_message()
            if answer.get("id") != self._last_id:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def wait_for(self, event: str) -> None:
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._next_message())

    def _next_message(self) -> dict[str, Any]:
        deadline = time.monotonic() + _LIMIT
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {_LIMIT:.0f} seconds")
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise RuntimeError("the browser ended")
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


class Page:
    """An open page: ask it things in JavaScript, use it as a person would, look at it."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression (awaited where it is a promise), as plain data."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def resize(self, width: int, height: int, *, touch: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)

    def screenshot(self, path: Path, *, full: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(picture))

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Scroll the first match into view; its x, y, width and height in the window."""
        box = self.js(
            f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const r = "
            f"e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        return box[0], box[1], box[2], box[3]

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse to a place in the first match, as shares of its size."""
        self._mouse("mouseMoved", *self._place(selector, x, y))

    def click(self, selector: str, x: float = 0.5, y: float = 0.5, times: int = 1) -> None:
        place = self._place(selector, x, y)
        self._mouse("mouseMoved", *place)
        for count in range(1, times + 1):
            self._mouse("mousePressed", *place, button="left", buttons=1, clickCount=count)
            self._mouse("mouseReleased", *place, button="left", clickCount=count)

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press at one place in the first match and release at another, both as shares of its size."""
        first, last = self._place(selector, *start), self._place(selector, *end)
        self._mouse("mouseMoved", *first)
        self._mouse("mousePressed", *first, button="left", buttons=1, clickCount=1)
        for i in range(1, 6):
            between = (a + (b - a) * i / 5 for a, b in zip(first, last, strict=True))
            self._mouse("mouseMoved", *between, button="left", buttons=1)
        self._mouse("mouseReleased", *last, button="left", clickCount=1)

    def tap(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Touch the first match with a finger (needs `touch=True`)."""
        left, top = self._place(selector, x, y)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": left, "y": top}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    @property
    def errors(self) -> list[str]:
        """Uncaught exceptions, console errors and warnings, and the browser's own complaints."""
        self.js("0")  # everything that has happened is in the pipe before the answer to this
        found = []
        for event in self._browser.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["exception"].get("description", "exception"))
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(argument.get("value")) for argument in params["args"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found

    @property
    def requests(self) -> list[str]:
        """The URLs asked for beside the page itself; data URLs are in the page already."""
        self.js("0")
        sent = [e["params"] for e in self._browser.events if e.get("method") == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent if params["request"]["url"] != params["documentURL"]]
        return [url for url in urls if not url.startswith("data:")]

    def _place(self, selector: str, x: float, y: float) -> tuple[float, float]:
        left, top, width, height = self.box(selector)
        return left + x * width, top + y * height

    def _mouse(self, kind: str, *place: float, **how: Any) -> None:
        x, y = place
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **how)
