"""Kernels that call LAPACK for many matrices at once, and how many of them may run at a time.

On a CPU JAX divides such a call among the threads of its pool, and one of these threads waits for the others. Once all
of them wait, none is left to do the work, and the process hangs. So fewer such kernels run than the pool has threads.
"""

import os
import threading
from functools import cache
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from ..base.compile import equations

LAPACK = frozenset(each for name, each in vars(jax.lax.linalg).items() if name.endswith("_p"))


class InTurn:
    """``run``, compiled; where it calls LAPACK for many matrices, it waits for its turn, and for the result.

    ``run.trace(*args)`` has its program as ``jaxpr``.
    """

    def __init__(self, run: Any):
        self.run = run
        self.batched: bool | None = None

    def __call__(self, *args):
        if self.batched is None:
            self.batched = jax.default_backend() == "cpu" and calls_in_batches(self.run.trace(*args).jaxpr)
        if not self.batched:
            return self.run(*args)
        with _turns():
            return jax.block_until_ready(self.run(*args))


def calls_in_batches(program: Jaxpr | ClosedJaxpr) -> bool:
    """Whether a program calls LAPACK for more than one matrix at a time."""
    calls = (each for each in equations(program) if each.primitive in LAPACK)
    return any(getattr(operand.aval, "ndim", 0) > 2 for each in calls for operand in each.invars)


@cache
def _turns() -> threading.BoundedSemaphore:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threading.BoundedSemaphore(max(int(os.environ.get("PJRT_NPROC") or cores) - 1, 1))
