"""The start that a ready model guesses: beside values that the user gives, and with equal parts in order.

A guess does not know which of two equal parts, such as the peaks of ``gaussian + gaussian``, is to have which name. Bounds,
and values that are fixed or given in p0, decide on this in `dask_nlsq.model.guesses`. Where equal parts have the same ones,
they may still be exchanged: ties that tell them apart decide, by the sum of squares; otherwise the places of the parts, or
their rates, increase.
"""

import itertools
from collections.abc import Sequence
from math import inf
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..base.x64 import float64
from .function import FixedParameters, Model, intern, own_function
from .guesses import ROUNDS, guess
from .ties import Ties

GOLDEN = (5**0.5 - 1) / 2  # of whose multiples no simple expressions agree by chance


class Guess:
    """What a `ReadyModel` guesses within bounds: parameters (p,) of x (n,), y (n,), and bounds (p, 2), also in `jax.vmap`.

    Two equal bounds hold a parameter. Those that are given here only say which parts are chosen first. ``given`` are the
    places of parameters whose start is known; a caller holds them, too. Tied parameters follow those that are found.
    """

    def __init__(
        self,
        model: Any,
        bounds: Sequence[tuple[float, float]] | None = None,
        given: Sequence[int] = (),
        ties: Ties | None = None,
    ):
        self.model, self.given, self.ties = model, tuple(given), ties
        self.ends = np.array([*model.bounds.values()])  # nan is left out: a map need not fill the points that do not count
        known, freedom = self.ends.tolist() if bounds is None else [*bounds], []
        begins = np.cumsum([0, *(len(term.bounds) for term in model.terms)]).tolist()
        for term, begin in zip(model.terms, begins, strict=False):
            assert term.part is not None  # as `ReadyModel.can_guess` says
            low, high = (-inf, inf) if term.part.place is None else known[begin + term.part.place]
            freedom.append((high - low, int(np.isinf(low)) + int(np.isinf(high))))
        self.order = sorted(range(len(freedom)), key=freedom.__getitem__)
        self.alike, self.told_apart = self._pairs(begins)

    def _pairs(self, begins) -> tuple[list[Any], list[Any]]:
        """Pairs of equal parts, those that ties do not tell apart and others: places of all parameters once the pair is
        exchanged, of those of both parts, and of the place of the first one.
        """
        alike: list[Any] = []
        apart: list[Any] = []
        for (j, one), (k, other) in itertools.combinations(enumerate(self.model.terms), 2):
            if one.kind == other.kind and one.part.place is not None:
                own, its = (range(begins[m], begins[m + 1]) for m in (j, k))
                places = np.arange(begins[-1])
                places[[*own, *its]] = [*its, *own]
                (alike if self._keeps_ties(places) else apart).append((places, [*own], [*its], own[one.part.place]))
        return alike, apart

    def _keeps_ties(self, places) -> bool:
        """Whether ties that hold for some parameters also hold for these in the order of ``places``."""
        if self.ties is None:
            return True
        with float64():
            params = np.array(self.ties.complete([*(0.5 + 0.4 * (GOLDEN * np.arange(1, len(places) + 1) % 1))]))
            return np.allclose(self.ties.complete([*params[places]]), params[places], rtol=1e-9)

    def __call__(self, x, y, ends=None):
        sizes = [len(term.bounds) for term in self.model.terms]
        ends = jnp.asarray(self.ends if ends is None else ends)
        bounds = jnp.split(ends, np.cumsum(sizes)[:-1])
        found = guess([term.part for term in self.model.terms], x, y, bounds, self.order)
        return self.in_order(found, x, y, ends)

    def in_order(self, params, x, y, ends):
        """The parameters (p,) with equal parts exchanged where they are not in order."""
        counts = jnp.isfinite(x) & jnp.isfinite(y)

        def cost(params):
            value = self.model(jnp.where(counts, x, 1.0), *(params if self.ties is None else self.ties.complete([*params])))
            found = jnp.sum(jnp.where(counts, y - value, 0.0) ** 2)
            return jnp.where(jnp.isnan(found), jnp.inf, found)

        def exchanged(params, pairs, is_better):
            def turn(params, pair):
                places, own, its, place = pair
                trial = params[places]
                return jnp.where(jnp.all(ends[own] == ends[its]) & is_better(trial, params, place), trial, params), None

            return lax.scan(turn, params, tuple(map(jnp.array, zip(*pairs, strict=True))))[0] if pairs else params

        params = exchanged(params, self.told_apart * ROUNDS, lambda trial, params, _: cost(trial) < cost(params))
        return exchanged(params, self.alike, lambda trial, params, place: trial[place] < params[place])


def guessed(model: Model, x: np.ndarray, y: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """What the interned `ReadyModel` guesses in float64, (p,), within bounds; compiled once for each length of x and y.

    Parameters that are held have their value, and so have those with two equal bounds.
    """
    f: Any = own_function(model.f)
    ends = np.array([*f.bounds.values()])
    free, ties = [*range(len(ends))], None
    if isinstance(model.f, FixedParameters):
        free, ties = model.f.free, model.f.ties
        ends = np.array([ends[k] if k in model.f.tied else (v, v) for k, v in enumerate(model.f.values)])
    ends[free] = np.stack([lower, upper], axis=1)
    guess = Guess(f, ends.tolist(), ties=ties)
    own = intern(f)
    compiled = own.get(("guess", *guess.order, ties), lambda: own.jit(guess))
    with float64():
        return np.asarray(compiled(x, y, ends))[free]
