"""A headless Chromium, spoken to through two pipes in its DevTools protocol. Needs no package."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def executable():
    """Return the browser's path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A tab. `console` and `requests` are what it has said and asked for since it was opened."""

    def __init__(self, send, events):
        self._send, self._events = send, events
        for domain in ("Page", "Runtime", "Log", "Network"):
            send(f"{domain}.enable")

    def open(self, url):
        self._send("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def run(self, expression):
        """Evaluate JavaScript and return its value."""
        found = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression, seconds=30):
        deadline = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.02)

    def look_like(self, width, height, dark=False, touch=False, media="screen"):
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2,
            mobile=touch,
        )
        self._send("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def centre(self, selector):
        """Scroll something into view and return where its middle is."""
        return self.run(
            f"(async () => {{ const one = document.querySelector({json.dumps(selector)});"
            "one.scrollIntoView({block: 'center'});"
            "for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);"  # it has heard of it
            "const box = one.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )

    def point_at(self, selector):
        x, y = self.centre(selector)
        self._send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector):
        x, y = self.centre(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, selector):
        x, y = self.centre(selector)
        self._send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self._send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, path, whole=True):
        found = self._send("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self):
        return base64.b64decode(self._send("Page.printToPDF", preferCSSPageSize=True)["data"])

    @property
    def console(self):
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self._events if event["method"] in names]

    @property
    def requests(self):
        sent = [event for event in self._events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@contextlib.contextmanager
def browse():
    """Start the browser and open a tab."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        (to_read, write), (read, to_write) = os.pipe(), os.pipe()
        # It speaks through descriptors 3 and 4: a shell puts the pipes there.
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(
            ["bash", "-c", command, executable(), *flags],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": profile},  # it leaves folders there
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        try:
            with os.fdopen(write, "wb", 0) as out, os.fdopen(read, "rb", 0) as answers:
                yield _first_tab(out, answers)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _first_tab(out, answers):
    events, waiting = [], bytearray()
    numbers = iter(range(1, 1 << 30))

    def message():
        while b"\0" not in waiting:
            chunk = answers.read(1 << 16)
            assert chunk, "the browser has ended"
            waiting.extend(chunk)
        line, _, rest = bytes(waiting).partition(b"\0")
        waiting[:] = rest
        return json.loads(line)

    def send(method, session=None, **params):
        number = next(numbers)
        content = {"id": number, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        out.write(json.dumps(content).encode() + b"\0")
        while (answer := message()).get("id") != number:
            events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    targets = send("Target.getTargets")["targetInfos"]
    target = next(one["targetId"] for one in targets if one["type"] == "page")
    session = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    return Page(lambda method, **params: send(method, session, **params), events)
