"""Parameters that are functions of others, and quantities that are derived from them: ``expr`` of a fit.

Text is parsed into Python's syntax tree. `_meaning` accepts a few of its nodes, so text is never evaluated as code. Errors
come from the delta method, ``G C G^T`` with the derivatives G of all values with respect to the fitted parameters.
"""

import ast
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..base.text import near
from ..base.x64 import float64

LONGEST = 500  # characters of an expression: longer ones are better written as a function
MOST_POWER = 64  # integer exponent up to which a power is a product
CONSTANTS = {"pi": jnp.pi, "e": jnp.e}
OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
ONE = ["abs", "exp", "log", "log10", "sqrt", "sin", "cos", "tan", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"]
TWO = ["arctan2", "hypot", "minimum", "maximum"]
ARGUMENTS = dict.fromkeys(ONE, 1) | dict.fromkeys(TWO, 2)  # of the functions, all of them of jax.numpy

Rule = str | Callable


class Ties:
    """Names and what they are functions of, in an order in which they can be computed.

    Parameters
    ----------
    names : sequence of str
        Of all parameters of the model.
    expr : dict
        Expression or function by name, of a parameter that is tied, or of a derived quantity.

    Raises
    ------
    ValueError
        Unknown names, circles, and invalid expressions.
    """

    def __init__(self, names: Sequence[str], expr: Mapping[str, Rule]):
        self.names, known = tuple(names), tuple(dict.fromkeys((*names, *expr)))
        untied = [name for name in names if name not in expr]
        constants = CONSTANTS.keys() - {*known}
        # in one order, so that all processes pickle the same bytes
        needs = {name: sorted(_needs(name, rule, known, untied) - constants) for name, rule in expr.items()}
        try:
            order = TopologicalSorter(
                {name: [n for n in needed if n in expr] for name, needed in needs.items()}
            ).static_order()
            self.expr = {name: expr[name] for name in order}
            self.needs = {name: needs[name] for name in self.expr}
        except CycleError as err:
            raise ValueError(f"`expr` is circular: {' -> '.join(err.args[1][::-1])}") from None
        self.tied = tuple(name for name in names if name in expr)
        self.derived = tuple(name for name in expr if name not in names)
        with float64():
            jax.eval_shape(self.complete, [1.0] * len(names))  # the user's functions, tried

    def __eq__(self, other):
        return isinstance(other, Ties) and (self.names, self.expr) == (other.names, other.expr)

    def __hash__(self):
        return hash((self.names, tuple(self.expr.items())))

    @property
    def texts(self) -> dict[str, str]:
        """Each as text; functions by their names."""
        return {name: rule if isinstance(rule, str) else f"{_called(rule)}(...)" for name, rule in self.expr.items()}

    def of_only(self, names: Sequence[str]) -> list[str]:
        """Those that are functions of these parameters alone."""
        found: list[str] = []
        for name, needed in self.needs.items():
            found += [name] if {*needed} <= {*names, *found} else []
        return found

    def every(self, params: Sequence) -> dict[str, Any]:
        """Values of all names, from those of the parameters of the model; values of tied ones are ignored."""
        given = zip(self.names, params, strict=True)
        untied = {name: value for name, value in given if name not in self.tied}  # what a function of a dict sees
        values: dict[str, Any] = dict(untied)
        for name, rule in self.expr.items():
            values[name] = _value(name, rule, values, untied)
        return values

    def complete(self, params: Sequence) -> list:
        """The parameters with values for those that are tied."""
        values = self.every(params)
        return [values[name] for name in self.names]

    def at(self, params, free: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """`spread` as NumPy's arrays."""
        with float64():
            values, spread = self.spread(params, free)
            return np.array(values), np.array(spread)

    def spread(self, params, free: Sequence[int]):
        """Values of parameters and derived quantities, (p + d,), and their derivatives by the ``free`` ones, (p + d, f)."""
        params, places = jnp.asarray(params), jnp.array(free)

        def values(fitted):
            found = self.every([*params.at[places].set(fitted)])
            return jnp.stack([found[name] for name in (*self.names, *self.derived)])

        return values(params[places]), jax.jacfwd(values)(params[places])


def _called(function) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _needs(name: str, rule: Rule, known: Sequence[str], untied: Sequence[str]) -> set[str]:
    """Names that a rule needs."""
    if isinstance(rule, str):
        needed = parsed(rule)[1]
        if unknown := [each for each in sorted(needed) if each not in known and each not in CONSTANTS]:
            hint = near(unknown[0], known, "; ")
            raise ValueError(f"`expr` for {name!r} names {unknown[0]!r}, the parameters are {', '.join(known)}{hint}")
        return {*needed}
    arguments = [*inspect.signature(rule).parameters]
    if arguments and all(each in known for each in arguments):
        return {*arguments}
    if len(arguments) == 1:
        return {*untied}  # a dict of them
    raise ValueError(
        f"`expr` for {name!r} is a function of {', '.join(arguments) or 'nothing'}: its arguments must be named like "
        f"parameters, {', '.join(known)}; or it takes a single argument, a dict of them"
    )


def _value(name: str, rule: Rule, values: Mapping[str, Any], untied: Mapping[str, Any]):
    if isinstance(rule, str):
        return parsed(rule)[0]({**CONSTANTS, **values})
    arguments = [*inspect.signature(rule).parameters]
    try:
        by_name = all(each in values for each in arguments)
        found = jnp.asarray(rule(*(values[each] for each in arguments)) if by_name else rule(dict(untied)), jnp.float64)
    except (TypeError, KeyError, jax.errors.JAXTypeError) as err:
        raise ValueError(
            f"`expr` for {name!r} is {_called(rule)}, which fails ({type(err).__name__}: {str(err).splitlines()[0]}): it "
            "must return a number, with jax.numpy, from the untied parameters"
        ) from None
    if found.shape != ():
        raise ValueError(
            f"`expr` for {name!r} is {_called(rule)}, which returned shape {found.shape}: it must be one number"
        )
    return found


@lru_cache
def parsed(text: str) -> tuple[Callable[[Mapping], Any], frozenset[str]]:
    """An expression as a function of values by name, and the names in it.

    Raises
    ------
    ValueError
        What is none.
    """
    names: set[str] = set()
    if len(text) > LONGEST:
        raise ValueError(
            f"`expr` has {len(text)} characters, {text[:40]}...: write what is longer than {LONGEST} as a function"
        )
    try:
        return _meaning(ast.parse(text.strip(), mode="eval").body, text, names), frozenset(names)
    except (SyntaxError, RecursionError, MemoryError, OverflowError) as err:
        raise ValueError(f"`expr` {text!r} cannot be read: {err.args[0] if err.args else type(err).__name__}") from None


def _is_small(power: int) -> bool:
    return not isinstance(power, bool) and abs(power) <= MOST_POWER


def _meaning(node, text: str, names: set[str]) -> Callable[[Mapping], Any]:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            number = float(number)
            return lambda values: jnp.asarray(number, jnp.float64)
        case ast.Name(id=name):
            names.add(name)
            return lambda values: values[name]
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if _is_small(power):
            base = _meaning(left, text, names)
            return lambda values: base(values) ** power
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            one, two = (_meaning(each, text, names) for each in (left, right))
            return lambda values: OPERATORS[type(op)](one(values), two(values))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            inner = _meaning(operand, text, names)
            return lambda values: OPERATORS[type(op)](inner(values))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if len(args) == ARGUMENTS.get(name):
            function, inside = getattr(jnp, name), [_meaning(each, text, names) for each in args]
            return lambda values: function(*(each(values) for each in inside))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor):
        raise ValueError(f"`expr` {text!r} has {ast.unparse(node)!r}: write powers with **")
    raise ValueError(
        f"`expr` {text!r} has {ast.unparse(node)!r}: it may contain numbers, names, pi, e, + - * / **, and the functions "
        f"{', '.join(ONE)} of one value and {', '.join(TWO)} of two; for anything else give a function"
    )
