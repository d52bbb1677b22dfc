"""Additional diagnostics of a grouped fit: too few counts, dominant groups, interchangeable parameters."""

from itertools import combinations, permutations

import numpy as np

from ..base.x64 import float64
from ..kernels.blocks import Layouts, assemble_x
from ..model.function import Model, evaluate

BIAS = 0.08  # of shared parameters by few counts in a group: this times locals / counts, relative, as measured
TOO_MUCH = 0.3  # standard errors of a bias that is worth a word
PULLING = 20.0  # times its share of the cost, that a group may have
FEW = 10  # groups, of which one has a large share by nature
MOST_LOCALS = 4  # all of whose orders are tried
ALIKE = 1e-9  # relative


def of_groups(shared) -> list[str]:
    """Sentences, of a `SharedResult`."""
    about, lines = shared.groups, []
    if shared.noise.likelihood and about.n_groups:
        counts = shared.totals.weighted / about.n_groups
        n_locals = len(about.locals)
        bias = BIAS * n_locals * np.sqrt(about.n_groups / max(counts, 1.0))
        if bias > TOO_MUCH:
            lines.append(
                f"{counts:.3g} counts in a group are few for {n_locals} locals: they bias the shared parameters by about "
                f"{bias:.1g} standard errors. More groups do not help: join neighbouring ones, or share more parameters"
            )
    if about.n_groups >= FEW and about.largest * about.n_groups > PULLING:
        lines.append(
            f"one group has {about.largest:.1%} of the cost, {about.largest * about.n_groups:.0f} times its share: see "
            "chi2 of result.local, and mask it or use a robust loss if its data are not reliable"
        )
    lines += [
        f"{one} and {other} are interchangeable: only the start determines which is which; bounds fix it"
        for one, other in about.interchangeable
    ]
    return lines


def interchangeable(
    model: Model, layouts: Layouts, sample: tuple[np.ndarray, ...] | None, start, shared, own
) -> list[tuple[int, int]]:
    """Pairs of shared parameters that the model lets change places, if locals do too; by its values at a few points."""
    if not sample or len(own) > MOST_LOCALS:
        return []
    params = np.asarray(start, float) * (1 + 0.1 * np.random.default_rng(1).standard_normal(len(start)))
    params = np.where(params == 0, 0.1 * np.arange(1, len(params) + 1), params)

    def value(params):
        return np.broadcast_to(evaluate(model, assemble_x(layouts, list(sample)), tuple(params)), sample[0].shape)

    found = []
    with float64(), np.errstate(all="ignore"):  # a parameter in the place of another may be far from any sense
        plain = value(params)
        scale = ALIKE * np.max(np.abs(plain), initial=0.0)
        for one, other in combinations(shared, 2):
            swapped = params.copy()
            swapped[[one, other]] = params[[other, one]]
            for order in permutations(own):
                swapped[list(own)] = params[list(order)]
                if np.all(np.abs(value(swapped) - plain) <= scale):
                    found.append((one, other))
                    break
    return found
