"""Several trust-region loops share the reads of the data: one sweep answers the next requests of all of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..engine.condensed import Condensed
from ..kernels.blocks import Reduction
from .trust_region import Asks, T

MOST = 64  # answers of one sweep: each costs a kernel per block and a matrix per task, and the read is well shared by then


def together(at: Callable[[Sequence[np.ndarray], Reduction], list[Condensed]], loops: Iterable[Asks[T]]) -> list[T]:
    """What each of ``loops`` returns, such as `trust_region.solving`; ``at(points, reduction)`` is one read of the data."""
    running = dict(enumerate(loops))
    asked: dict[int, tuple[np.ndarray, Reduction]] = {}
    found: dict[int, T] = {}

    def go_on(k: int, answer: Any) -> None:
        try:
            asked[k] = running[k].send(answer)
        except StopIteration as end:
            found[k] = end.value

    for k in running:
        go_on(k, None)
    while asked:
        reduction = next(iter(asked.values()))[1]
        alike = [k for k, each in asked.items() if each[1] == reduction][:MOST]
        points = [asked.pop(k)[0] for k in alike]
        for k, answer in zip(alike, at(points, reduction), strict=True):
            go_on(k, answer)
    return [found[k] for k in running]
