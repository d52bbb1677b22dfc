"""Several trust-region loops share the reads of the data: one sweep answers the next requests of all of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..engine.condensed import Condensed
from ..kernels.blocks import Reduction
from .trust_region import Ask, Asks, T

MOST = 64  # loops at a time: each costs a kernel per block and a matrix per task, and reads are well shared by then


def together(at: Callable[[Sequence[np.ndarray], Reduction], list[Condensed]], loops: Iterable[Asks[T]]) -> list[T]:
    """What each of ``loops`` returns, such as `trust_region.solving`; ``at(points, reduction)`` is one read of the data."""
    left = enumerate(loops)
    running: dict[int, Asks[T]] = {}
    asked: dict[int, Ask] = {}
    found: dict[int, T] = {}

    def go_on(k: int, answer: Any) -> None:
        try:
            asked[k] = running[k].send(answer)
        except StopIteration as end:
            del running[k]
            found[k] = end.value

    while True:
        while len(asked) < MOST and (new := next(left, None)) is not None:
            running[new[0]] = new[1]
            go_on(new[0], None)
        if not asked:
            return [found[k] for k in sorted(found)]
        reduction = next(iter(asked.values())).reduction
        alike = [k for k, each in asked.items() if each.reduction == reduction]
        points = [asked.pop(k).params for k in alike]
        for k, answer in zip(alike, at(points, reduction), strict=True):
            go_on(k, answer)
