"""A page in a headless Chromium, spoken to by its debugging protocol."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager

from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZE = 1100, 1000  # pixels of the window


class Browser:
    def __init__(self, loop, socket):
        self.loop, self.socket, self.count = loop, socket, 0

    def send(self, method, **params):
        self.count += 1

        async def ask():
            await self.socket.write_message(json.dumps(dict(id=self.count, method=method, params=params)))
            while (answer := json.loads(await self.socket.read_message())).get("id") != self.count:
                pass
            return answer["result"]

        return self.loop.run_sync(ask, timeout=30)

    def value(self, expression):
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, height) -> bytes:
        """Of the upper ``height`` pixels, as PNG."""
        clip = dict(x=0, y=0, width=SIZE[0], height=height, scale=1)
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", clip=clip)["data"])


@contextmanager
def opened(url, profile):
    """The page at ``url``; ``profile`` is a directory for the browser's own files."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={SIZE[0]},{SIZE[1]}"]
    process = subprocess.Popen([CHROMIUM, *options, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loop = IOLoop(make_current=False)
    try:
        port = profile / "DevToolsActivePort"
        wait(lambda: port.exists() and port.read_text(), "the browser did not start")
        pages = f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"

        def page():
            with urllib.request.urlopen(pages) as answer:
                return [each for each in json.loads(answer.read()) if each["type"] == "page" and "nlsq" in each["url"]]

        wait(page, "the browser opened no page")
        socket = loop.run_sync(lambda: websocket_connect(page()[0]["webSocketDebuggerUrl"], max_message_size=2**26))
        yield Browser(loop, socket)
        loop.run_sync(socket.close)
    finally:
        process.kill()
        process.wait()
        loop.close()


def wait(condition, message, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, message() if callable(message) else message
        time.sleep(0.05)
    return found
