"""A web server of a directory that fails and stalls, as object stores do."""

import threading
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple


class Faults(NamedTuple):
    """Shares of the requests for chunks, or for every file, that go wrong; the same ones each time."""

    refused: float = 0.0  # 503
    closed: float = 0.0  # the connection ends within the answer
    stalled: float = 0.0  # no answer
    absent: float = 0.0  # 404
    forbidden: float = 0.0  # 403
    metadata: bool = True


class Server(ThreadingHTTPServer):
    """``answered`` counts what became of requests, by the names of `Faults`, "whole" and "part"."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # who asked has left

    def __init__(self, directory: Path, faults: Faults):
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory, self.faults = directory, faults
        self.ended, self.lock, self.asked, self.answered = threading.Event(), threading.Lock(), {}, {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fate(self, path: str) -> str | None:
        """What is to go wrong: a number from the path and how often it was asked for before, compared to the shares."""
        if not self.faults.metadata and path.endswith((".json", ".zarray", ".zattrs", ".zgroup")):
            return None
        with self.lock:
            self.asked[path] = self.asked.get(path, 0) + 1
            number = zlib.crc32(f"{path} {self.asked[path]}".encode()) / 2**32
        for fault, share in zip(Faults._fields[:-1], self.faults[:-1], strict=True):
            if number < share:
                return fault
            number -= share
        return None

    def count(self, what: str) -> None:
        with self.lock:
            self.answered[what] = self.answered.get(what, 0) + 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        file, fate = self.server.directory / self.path.lstrip("/"), self.server.fate(self.path)
        if not file.is_file():
            fate = fate if fate in ("refused", "stalled", "forbidden") else "absent"
        if fate == "stalled":
            self.server.count(fate)
            self.server.ended.wait()
        if self.server.ended.is_set():  # connections that are kept alive end with the server
            self.close_connection = True
        elif fate in (codes := {"refused": 503, "absent": 404, "forbidden": 403}):
            self.server.count(fate)
            self.send_response(codes[fate])
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.answer(file.read_bytes(), body, fate)

    def answer(self, content, body, fate):
        wanted, total = self.headers.get("Range"), len(content)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            low, high = (total - int(last), total) if not first else (int(first), int(last) + 1 if last else total)
            content = content[low:high]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        if wanted:
            self.send_header("Content-Range", f"bytes {low}-{low + len(content) - 1}/{total}")
        self.end_headers()
        self.server.count(fate or ("part" if wanted else "whole"))
        if fate == "closed":
            content, self.close_connection = content[: len(content) // 2], True
        if body:
            self.wfile.write(content)


@contextmanager
def served(directory: Path, **faults):
    """A `Server` of ``directory`` in a thread; ``faults`` as in `Faults`."""
    server = Server(directory, Faults(**faults))
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
