"""How functions are compiled: with vectors of 512 bits where a processor has them.

By default XLA uses 256 bits. On an AMD EPYC of the 5th generation, which computes with 512 bits at once, a sweep over 3
parameters takes 4.1 ns per point instead of 5.4, a map 5.1 us per pixel instead of 6.3. Processors with shorter vectors
use several. Few users of XLA do so, and its errors stay unseen: its functions have been compared at both lengths, those
that differ keep to 256 bits, and so do versions of JAX of which that is not known. Products of matrices stay in the thread
that calls them, since others work on other blocks: 3 to 5 % of a sweep.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

LONG = dict(xla_cpu_prefer_vector_width=512, xla_cpu_multi_thread_eigen=False)
WRONG = frozenset({"atan"})  # primitives of JAX that return nonsense with long vectors (jaxlib 0.10)
COMPARED = jax.__version_info__ < (0, 11)  # from 0.8 on
SAME_BITS = dict(xla_gpu_deterministic_ops=True)  # else a GPU times its products and takes the fastest one, which may vary


class Compiled:
    """`jax.jit` with the options that suit the program, which the first call shows.

    ``long_sums`` are products and sums over many points, in which a GPU otherwise may have other bits in the next process.
    """

    def __init__(self, function: Callable, long_sums: bool = False):
        self.function, self.long_sums = function, long_sums
        self.run: Callable | None = None
        self.lock = threading.Lock()

    def trace(self, *args) -> Any:
        return jax.jit(self.function).trace(*args)

    def __call__(self, *args):
        if self.run is None:
            with self.lock:  # else each thread would compile
                self.run = self.run or self._jitted(*args)
        return self.run(*args)

    def _jitted(self, *args) -> Callable:
        options = options_of(self.trace(*args).jaxpr) | (SAME_BITS if self.long_sums else {})
        return jax.jit(self.function, compiler_options=options)


def options_of(program: ClosedJaxpr) -> dict[str, Any]:
    """Those with which it has the right values, the fastest ones."""
    names = {each.primitive.name for each in equations(program)}
    return LONG if COMPARED and not names & WRONG else {}


def equations(program: Jaxpr | ClosedJaxpr) -> Iterator[Any]:
    """Those of a program, and of the programs within."""
    for equation in program.eqns:
        yield equation
        for each in jax.tree.leaves([*equation.params.values()]):
            if isinstance(each, ClosedJaxpr | Jaxpr):
                yield from equations(each)
