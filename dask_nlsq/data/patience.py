"""How long and how often a store is asked, and which of its clients' errors may pass."""

import asyncio
import errno
import sys
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from ..base.config import setting

BACKOFF = 0.2  # seconds before the second try, doubled before each other one
TRANSIENT = {errno.EAGAIN, errno.EINTR, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH, errno.ESTALE, errno.ETIMEDOUT}
CLIENTS = {"aiohttp": "ClientError", "obstore.exceptions": "BaseError", "botocore.exceptions": "BotoCoreError"}
NEVER_PASSES = ("NotFound", "Permission", "Unauth", "NotSupported")  # in the names of those clients' errors


class Patience(NamedTuple):
    """How long and how often a store is asked for something; a store that stalls is waited for without end otherwise."""

    deadline: float | None  # seconds of one try
    tries: int

    async def get(self, ask: Callable[[], Awaitable]):
        """What ``ask()`` gives. What may pass is tried again, with a pause in between; what a codec says is final."""
        for attempt in range(1, self.tries + 1):
            try:
                return await asyncio.wait_for(ask(), self.deadline)
            except client_errors(OSError) as err:  # TimeoutError is an OSError
                if attempt == self.tries or not _may_pass(err):
                    if isinstance(err, TimeoutError) and not err.args:
                        raise TimeoutError(f"no answer within {self.deadline:g} s") from None
                    raise
                await asyncio.sleep(BACKOFF * 2 ** (attempt - 1))
        raise AssertionError


def patience() -> Patience:
    return Patience(setting("read-deadline"), 1 + setting("read-retries"))


def said(err) -> str:
    """Its first line: some clients' errors go on for pages."""
    return f"{type(err).__name__}: {err}".partition("\n")[0]


def client_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What the clients of object stores raise, as far as they are loaded, and ``others``."""
    return others + tuple(getattr(sys.modules[module], name) for module, name in CLIENTS.items() if module in sys.modules)


def _may_pass(err) -> bool:
    if not isinstance(err, client_errors()):
        return isinstance(err, (TimeoutError, ConnectionError)) or err.errno in TRANSIENT
    status = getattr(err, "status", 500)  # of an HTTP response
    return status >= 429 and not any(word in type(err).__name__ for word in NEVER_PASSES)


def is_absent(err: FileNotFoundError) -> bool:
    """Whether nothing is there: fsspec says so as well where a server gave another answer than 404, or none."""
    cause = err.__cause__
    failed = isinstance(cause, client_errors(OSError)) and not isinstance(cause, FileNotFoundError)
    return not failed or getattr(cause, "status", None) == 404
