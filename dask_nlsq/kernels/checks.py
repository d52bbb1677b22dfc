"""Checks of a model and its Jacobian before any data are swept; in which parameters its derivatives show it to be linear."""

import hashlib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ..base.x64 import float64
from ..model.function import (
    Model,
    advice,
    check_jac_shape,
    check_shape,
    evaluate,
    evaluate_jac,
    function_name,
    not_of_any_length,
)
from .blocks import Layouts, assemble_x


def check_model(model: Model, layouts: Layouts, n: int, n_params: int) -> None:
    """Trace the model on ``n`` points, without data, so that it fails before anything is read.

    Raises
    ------
    ModelShapeError
        Where it does not return one value per point, or jac one row per point.
    ModelError
        Where it uses NumPy functions, branches on a value, or returns nothing or complex values.
    """
    if (key := ("checked", layouts, n, n_params)) in model.choices:
        return
    x = [jax.ShapeDtypeStruct((n,), np.int64 if layout.integer else np.float64) for layout in layouts.x]
    params = [jax.ShapeDtypeStruct((), np.float64)] * n_params
    with float64(), advice(model):
        value = jax.eval_shape(lambda x, params: evaluate(model, assemble_x(layouts, x), params), x, params)
    check_shape(model, value.shape, n)
    if model.jac is not None:
        with float64(), advice(model, is_jac=True):
            columns = jax.eval_shape(lambda x, params: evaluate_jac(model, assemble_x(layouts, x), params), x, params)
        check_jac_shape(columns.shape, n, n_params)
    model.choices[key] = True  # tracing takes a millisecond, a quarter of a small fit


def fingerprint(model: Model, layouts: Layouts, n_params: int, n: int = 2) -> str:
    """A hash of what the model computes: of its operations and of the arrays that it closes over, not of its text.

    ``n`` is a number of points that it can be evaluated on.
    """
    found = hashlib.blake2b(digest_size=16)
    x = [jax.ShapeDtypeStruct((n,), np.int64 if layout.integer else np.float64) for layout in layouts.x]
    params = [jax.ShapeDtypeStruct((), np.float64)] * n_params
    for evaluated in (evaluate, evaluate_jac) if model.jac is not None else (evaluate,):
        with float64():
            traced = jax.make_jaxpr(lambda x, params, e=evaluated: e(model, assemble_x(layouts, x), params))(x, params)
        found.update(re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr)).encode())  # addresses of functions
        for const in traced.consts:
            found.update(np.asarray(const).tobytes())
    return found.hexdigest()


def check_pointwise(model: Model, layouts: Layouts, sample: tuple[np.ndarray, ...], *starts: np.ndarray) -> None:
    """Compare the model's values at a few points with those at some of the points in another order.

    At each of the ``starts`` (p,), since a parameter that is 0 can hide a term.

    Parameters
    ----------
    sample : tuple of (n,) arrays
        Coordinates of the points.

    Raises
    ------
    ValueError
        Where a value depends on other points than its own.
    """

    if not sample or len(sample[0]) < 2:
        return
    n = len(sample[0])
    parts = [np.arange(n), np.arange(0, n, 2), np.arange(n - 1, 0, -2)]

    def evaluate_parts(sample, params):
        def at(places):
            x = assemble_x(layouts, [c[places] for c in sample])
            return jnp.broadcast_to(evaluate(model, x, tuple(params)), places.shape)

        return [at(places) for places in parts]

    run = model.get(("pointwise", layouts, n), lambda: model.jit(evaluate_parts))
    with float64():
        try:
            found = [list(map(np.asarray, run(sample, params))) for params in starts]
        except (TypeError, ValueError) as err:  # shapes that do not go together
            raise not_of_any_length(model, len(parts[1]), err) from None
    for everything, places, part in (
        (values[0], places, part) for values in found for places, part in zip(parts[1:], values[1:], strict=True)
    ):
        if not np.allclose(part, everything[places], rtol=1e-6, atol=0, equal_nan=True):
            raise ValueError(
                f"the model {function_name(model.f)} is not pointwise: its value at a point changes when it is called "
                "with other points beside it (by a cumulative sum, a mean, a sort, an index into x). The data are "
                "evaluated piece by piece, so each value must depend on its own x only; what needs the whole axis can "
                "be computed from an axis that the model closes over"
            )


CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat",
    "custom_jvp_call",
    "custom_vjp_call",
}  # of programs
SUMS = {"add", "add_any", "sub"}  # of which no part multiplies another
PRODUCTS = {"mul", "div", "dot_general"}  # with a direction, where one of the factors has one
ELEMENTWISE = SUMS | {"mul", "div", "neg", "exp", "log", "pow", "integer_pow", "square", "sqrt", "convert_element_type"}
LINEAR, TRIED = 1e-9, 6  # misfit of a linear model, relative to its values; pairs of parameters that are compared


def is_linear(model: Model, layouts: Layouts, sample: tuple[np.ndarray, ...], start: np.ndarray, places) -> bool:
    """Whether the model is linear in the parameters at ``places``, by `curved`.

    This is a proof, except for models that change in steps, which derivatives do not show. So it is tried at a few points,
    too, for values of either sign.

    Parameters
    ----------
    sample : tuple of (n,) arrays
        Coordinates of the points.
    start : (p,) array
        Values of all parameters; those that are not asked for are varied a little, since a power may be 1 there.
    """
    places = list(places)
    if not sample or curved(model, layouts, len(sample[0]), len(start))[np.ix_(places, places)].any():
        return False
    rng = np.random.default_rng(0)
    one = np.where(start == 0, 0.1, start) * (1 + 0.1 * rng.standard_normal((TRIED, len(start))))
    other = one.copy()
    size = np.maximum(abs(start[places]), 1.0)
    one[:, places], other[:, places] = size * rng.standard_normal((2, TRIED, len(places)))
    share = rng.uniform(0.2, 0.8, (TRIED, 1))

    def values(params):
        x = assemble_x(layouts, list(sample))
        return jax.vmap(lambda each: jnp.broadcast_to(evaluate(model, x, tuple(each)), sample[0].shape))(params)

    run = model.get(("linear", layouts, len(sample[0])), lambda: model.jit(values))
    with float64():
        a, b, between = (np.asarray(run(each)) for each in (one, other, share * one + (1 - share) * other))
    size = np.max([abs(a), abs(b)], axis=(0, 2))
    return bool(np.all(abs(share * a + (1 - share) * b - between) <= LINEAR * size[:, None]))


def linear_places(model: Model, layouts: Layouts, n: int, n_params: int, free: Sequence[int]) -> tuple[int, ...]:
    """Those of the places ``free`` whose parameters the model is linear in, together, by `curved` on ``n`` points."""
    bends, found = curved(model, layouts, n, n_params), list[int]()
    for k in free:
        found += [] if bends[k, [*found, k]].any() else [k]
    return tuple(found)


def curved(model: Model, layouts: Layouts, n: int, n_params: int) -> np.ndarray:
    """Pairs of parameters (p, p) by which the second derivative of the model, on ``n`` points, may be other than zero.

    It is zero where the derivative by one is computed without the value of the other.
    """
    if (key := ("curved", layouts, n_params)) not in model.choices:
        model.choices[key] = _curved(model, layouts, n, n_params)  # tracing takes milliseconds
    return model.choices[key]


def _curved(model: Model, layouts: Layouts, n: int, p: int) -> np.ndarray:
    def derivative(x, params, directions):
        def f(params):
            return evaluate(model, assemble_x(layouts, x), params)

        return jax.jvp(f, (params,), (directions,))[1]

    x = [jax.ShapeDtypeStruct((n,), np.int64 if layout.integer else np.float64) for layout in layouts.x]
    params = [jax.ShapeDtypeStruct((), np.float64)] * p
    try:
        with float64():
            traced = jax.make_jaxpr(derivative)(x, params, params)
    except (TypeError, ValueError, NotImplementedError):  # no derivative, as of a callback: `jac` has them
        return np.ones((p, p), bool)
    inputs = np.zeros((len(x) + 2 * p, 1, 1 + p, 1 + p), bool)
    of_params, of_directions = inputs[len(x) : len(x) + p, 0], inputs[len(x) + p :, 0]
    of_params[:, 0, 1:] = of_directions[:, 1:, 0] = np.eye(p, dtype=bool)
    found = _whole(*_influences(traced.jaxpr, [*inputs]))[0]
    return found[1:, 1:] | found[1:, 1:].T


def _influences(jaxpr, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """What the results of a program depend on, or may, by what its inputs do: (m, 1 + p, 1 + p) of each.

    m is 1, or the length of a vector, such as that of all parameters, whose elements have each their own.
    Row 0 says on which parameters the part without directions depends, row k whether there is one with direction k (column
    0), and on which parameters that depends. The program is linear in the directions, so that a step with one of them has no
    part without; of a loop or a branch it is not known which result is which.
    """
    known, nothing = dict(zip(jaxpr.invars, inputs, strict=True)), np.zeros((1, *inputs[0].shape[1:]), bool)

    def influence(each):
        return nothing if isinstance(each, Literal) else known.get(each, nothing)

    for equation in jaxpr.eqns:
        given, name = [*map(influence, equation.invars)], equation.primitive.name
        # programs within: a call has one, a loop one or two, a branch a tuple of them
        inner = [each for each in jax.tree.leaves([*equation.params.values()]) if isinstance(each, (ClosedJaxpr, Jaxpr))]
        program = getattr(inner[0], "jaxpr", inner[0]) if len(inner) == 1 and name in CALLS else None
        if program is not None and len(program.invars) == len(given) > 0:
            found = _influences(program, given)
        elif (moved := _moved(equation, given)) is not None:
            found = moved
        elif name == "scan":  # as of jnp.polyval
            found = _influences_of_scan(equation.params, [_whole(each) for each in given])
        else:
            given = given if name in ELEMENTWISE else [_whole(each) for each in given]
            given = [*np.broadcast_arrays(nothing, *given)]
            total = np.logical_or.reduce(given)
            if name not in SUMS:
                total[:, 1:] |= total[:, 1:, :1] & total[:, :1]
            if name in PRODUCTS or (name == "select_n" and not any(each[:, 0].any() for each in given[2:])):
                mixed = np.any([each[:, 0].any(axis=1) & each[:, 1:].any(axis=(1, 2)) for each in given], axis=0)
                total[:, 0] &= (mixed | ~total[:, 1:].any(axis=(1, 2)))[:, None]
            found = [total] * len(equation.outvars)
        known |= dict(zip(equation.outvars, found, strict=True))
    return [*map(influence, jaxpr.outvars)]


def _whole(influence):
    return influence.any(axis=0, keepdims=True)


def _moved(equation, given: list[np.ndarray]) -> list[np.ndarray] | None:
    """Of operations that only move elements of vectors: stack them, take some of them; None of others."""
    params, shapes = equation.params, [each.aval.shape for each in equation.invars]
    each = [np.broadcast_to(one, (n[0], *one.shape[1:])) for one, n in zip(given, shapes, strict=True) if len(n) == 1]
    match equation.primitive.name:
        case "stack" if not any(shapes):
            return [np.concatenate(given)]
        case "concatenate" if len(each) == len(given):
            return [np.concatenate(each)]
        case "slice" if each:
            return [each[0][slice(params["start_indices"][0], params["limit_indices"][0], (params["strides"] or [1])[0])]]
        case "split" if each:
            return np.split(each[0], np.cumsum(params["sizes"])[:-1])
        case "squeeze" | "reshape" if shapes[0] == (1,):
            return [given[0]]
    return None


def _influences_of_scan(params, given: list[np.ndarray]) -> list[np.ndarray]:
    """The same of a loop whose turns hand something on: what that depends on grows until a turn adds nothing."""
    first, n = params["num_consts"], params["num_carry"]
    while True:
        found = _influences(params["jaxpr"].jaxpr, given)
        carried = [old | new for old, new in zip(given[first : first + n], found[:n], strict=True)]
        if np.array_equal(carried, given[first : first + n]):
            return found
        given = [*given[:first], *carried, *given[first + n :]]


SEEN = 1e-12  # of the values of the model, that a parameter has to move for its column to be compared
WRONG = 0.5  # of a column's length: an approximation that leaves out small terms is nearer


def check_jac(model: Model, layouts: Layouts, sample: tuple[np.ndarray, ...], names, *starts: np.ndarray) -> None:
    """Compare the columns of ``jac`` with exact derivatives at a few points.

    Parameters
    ----------
    sample : tuple of (n,) arrays
        Coordinates of the points.
    names : sequence of str
    starts : (p,) arrays
        Parameters at which to compare.

    Raises
    ------
    ValueError
        Where a column differs from the derivative by more than half of its length: another sign, order or factor. Where the
        model has no derivative (it rounds, say) nothing is compared.
    """
    if model.jac is None or not sample:
        return
    n = len(sample[0])

    def both(params):
        x = assemble_x(layouts, list(sample))

        def value(params):
            return jnp.broadcast_to(evaluate(model, x, tuple(params)), (n,))

        return value(params), jax.jacfwd(value)(params), evaluate_jac(model, x, tuple(params))

    for start in starts:
        with float64():
            value, exact, given = map(np.asarray, model.jit(both)(jnp.asarray(start)))
        known = np.isfinite(exact).all(axis=1) & np.isfinite(given).all(axis=1)
        lengths, off = np.linalg.norm(exact[known], axis=0), np.linalg.norm((given - exact)[known], axis=0)
        seen = lengths * np.maximum(np.abs(start), 1.0) > SEEN * np.linalg.norm(value[known])
        wrong = seen & (lengths > 0) & (off > WRONG * np.maximum(lengths, np.linalg.norm(given[known], axis=0)))
        if wrong.any():
            k = int(np.argmax(wrong))
            ratio = float(np.sum(given[known, k] * exact[known, k]) / lengths[k] ** 2)
            raise ValueError(
                f"`jac` is not the derivative of the model: its column for {names[k]} is {ratio:.3g} times the derivative, "
                "as far as they agree. Its columns are d f / d parameter, in the order of the parameters; leave `jac` out "
                "for exact derivatives"
            )
