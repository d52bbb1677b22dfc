"""What a sweep is asked for, and how blocks of data answer it."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from dask.sizeof import sizeof
from distributed.metrics import context_meter

from ..base.x64 import float64
from ..data.chunks import LARGEST, Chunk, Preparation, count_each
from ..kernels.blocks import Block, JacMode, KernelSpec, Reduction, tile_size
from ..kernels.rows import N_WEIGHTS, sweep_kernel, weight_kernel
from ..kernels.values import VALUES_LEAD, What, value_kernel
from ..memory.device import said_if_full
from ..model.function import Model, known_model
from ..model.losses import LIKELIHOODS
from .condensed import Segmentation, Sums
from .devices import fetched, wait_for

# blocks on a CPU whose kernels are started before the results of one are waited for: 1e9 points are streamed in 11.0 s in
# place of 11.9; with more, one thread of JAX's pool may take them all before another one is awake
AHEAD = 2


class Objective(NamedTuple):
    """What a fit minimises, whatever the data are. Parameters that are held are part of the model."""

    model: Model
    loss: str = "linear"
    f_scale: float = 1.0

    @property
    def counts(self) -> bool:
        """Whether y must be counts, which are not negative."""
        return self.loss in LIKELIHOODS


@sizeof.register(Objective)
def objective_nbytes(objective: Objective) -> int:
    return objective.model.nbytes if isinstance(objective.model, Model) else 0  # else it travels by itself


def present(objective: Objective) -> Objective:
    """The objective with its model, which may have come by the token alone."""
    model = objective.model
    return objective._replace(model=known_model(model)) if isinstance(model, str) else objective


class Request(NamedTuple):
    """An objective at params (p,), and what all data are to be condensed to there.

    On the way to the data ``objective`` is the number of the one that it stands for, among those that travel with it.
    """

    objective: Objective
    params: np.ndarray
    reduction: Reduction = "gram"
    jac_mode: JacMode = "columns"  # chosen once, so that all workers do the same
    segmentation: Segmentation = Segmentation()
    weigh: bool = False  # sum the weights too, and y with them


def kernel_spec(preparation: Preparation, request: Request, block: Block) -> KernelSpec:
    layouts = preparation.layouts
    if block.clean:
        layouts = layouts._replace(invalid=None)  # axis vectors: half the time of a sweep
    capacity, n_segments = len(block.buffers[0]), request.segmentation.per_block
    kind, p, tile, together = preparation.kind, len(request.params), None, 1
    if not preparation.whole:
        longest = tile_size(kind, p, capacity)
        tile = min(longest, -(-capacity // max(n_segments, 1)))
        together = max(longest // tile, 1)
    return KernelSpec(
        layouts,
        request.reduction,
        request.jac_mode,
        request.objective.loss,
        tile,
        whitened=len(block.buffers) > len(layouts.operands),
        parts=n_segments,
        together=together,
        pairs=p < kind.pairs_up_to,
        reflected=kind.reflected,
    )


def condense_blocks(preparation: Preparation, blocks: Sequence[Block], requests: Sequence[Request]) -> list[list[Sums]]:
    """For each block the sums of each request.

    A block is read by one kernel after the other, on a CPU while it is in the cache. Those of the next blocks are started
    before the results of one are waited for, on a device with memory of its own all.
    """
    kernels: dict[tuple, Callable] = {}
    found: list[list] = []
    ahead = len(blocks) if preparation.kind.own_memory else AHEAD
    with float64(), said_if_full(), ExitStack() as on_error:
        on_error.callback(wait_for, found)  # a kernel may still read a block that is given back
        for block in blocks:
            begun: list[tuple] = []
            for k, request in enumerate(requests):
                like, label, model = (k, len(block.buffers[0]), block.clean), "jax-execute", request.objective.model
                if like not in kernels:
                    n_known = len(model.compiled)
                    kernels[like] = sweep_kernel(model, kernel_spec(preparation, request, block))
                    label = "jax-execute" if n_known == len(model.compiled) else "jax-compile"  # by the first call
                with context_meter.meter(label):  # else Dask counts it as idle
                    sums = kernels[like](request.params, request.objective.f_scale, block)
                    weights = np.zeros((len(sums[-1]), N_WEIGHTS))
                    if request.weigh:
                        weights = weight_kernel(kernel_spec(preparation, request, block))(block)
                    begun.append((*sums, weights))
            found.append(begun)
            if len(found) > ahead:
                with context_meter.meter("jax-execute"):
                    wait_for(found[-1 - ahead])
        on_error.pop_all()
        with context_meter.meter("jax-execute"):
            results = fetched(found) if preparation.kind.own_memory else found
            return [[_sums(*each) for each in begun] for begun in results]


def _sums(matrix, cost, segments, weights) -> Sums:
    return Sums(np.asarray(matrix), float(cost), np.concatenate([segments, weights], axis=1))


def values(preparation: Preparation, chunk: Chunk, request: Request, what: What, *spread) -> np.ndarray:
    """What `value_kernel` computes, for a chunk, in its shape; residuals are NaN where the mask is true."""
    flat = []
    with float64(), said_if_full():
        for block in chunk.blocks:
            kernel = value_kernel(request.objective.model, kernel_spec(preparation, request, block), what)
            found = kernel(request.params, request.objective.f_scale, block, *spread)
            flat.append(np.asarray(found)[..., : block.geometry[0]])
    return np.concatenate(flat, axis=-1).reshape(*VALUES_LEAD[what], *chunk.shape)


def count_not_finite(
    preparation: Preparation, chunks: Iterable[Chunk], request: Request
) -> list[tuple[tuple[int, ...], int]]:
    """Per chunk of y: its index and how many residuals that count are not finite, or too large to be squared."""
    counts = []
    for chunk in chunks:
        bad = ~(abs(values(preparation, chunk, request, "residual")) < LARGEST**2)
        for census, n in zip(chunk.censuses, count_each(bad, chunk.cuts), strict=True):
            counts.append((census.index, n - census.n_masked - census.n_omitted))
    return counts
