"""Ready-made models: formula, names, bounds, a guess of the start; sums and products of them and of the user's functions.

``curve_fit(gaussian + line, x, y)`` does not need p0: without it, and with ``p0="guess"``, the start is guessed from a
small sample of the data (`dask_nlsq.model.guesses`). The bounds of the model apply unless the user gives others. In a sum,
the name of the part becomes a prefix of its parameters, ``gaussian_center``, with a number if there are several of a kind,
``gaussian1_center``. User functions can be part of a sum or product, ``gaussian * efficiency + line``; their parameters get
names such as ``efficiency_slope``. Such models and products need p0.

Every model is a function of one coordinate x. Its docstring says the units of the parameters, where [x] and [y] are those of
the data.
"""

import inspect
import re
from collections.abc import Callable
from functools import reduce
from math import inf, pi
from numbers import Integral
from operator import add, mul
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..base.text import near, numbered
from ..base.x64 import float64
from .faddeeva import faddeeva_real
from .function import function_name, parameter_names
from .guesses import Part, exponents, frequencies, peaks, rates, steps, two_rates
from .starts import Guess

__all__ = [
    "ReadyModel", "arctan_edge", "damped_sine", "exponential", "g2_double", "g2_single", "gaussian", "line", "lorentzian",
    "moffat", "named", "polynomial", "power_law", "pseudo_voigt", "sigmoid", "stretched_exponential", "voigt",
]  # fmt: skip

POSITIVE, SHARE = (0.0, inf), (0.0, 1.0)
RELAXATION = (0.0, 3.0)  # of exponents: 1 for diffusion, 2 for flow; far above, a single point makes a step
MOST_DEGREES = 20  # of a polynomial: beyond, powers of x are indistinguishable
PUBLIC = "dask_nlsq.models"  # the path of these models that stays
POSITIVE_ONLY = "positive"  # in a recipe: amplitudes are bounded
STEEPEST = 7.0  # logarithm of the largest exponent: exp(-exp(7)) is 0


Tree = int | tuple[str, "Tree", "Tree"]  # the place of a term, or "+" or "*" of two trees


class Term(NamedTuple):
    """A model that is neither a sum nor a product."""

    recipe: tuple  # its name here, and the arguments that make it; of the user's function its name and itself
    function: Callable
    bounds: dict[str, tuple[float, float]]
    part: Part | None  # that its guess needs; None of the user's functions

    @property
    def name(self) -> str:
        return self.recipe[0]

    @property
    def kind(self) -> tuple:
        """The recipe without bounds."""
        return tuple(each for each in self.recipe if each != POSITIVE_ONLY)

    @property
    def label(self) -> str:
        return self.name + "".join(f"({argument})" for argument in self.recipe[1:] if self.part is not None)

    @property
    def positive(self) -> "Term":
        """The same with bounds that keep its amplitude from being negative."""
        part = self.part
        if part is None or part.candidates is None or part.shape is not self.function:
            return self
        ends = [*self.bounds.items()]
        bounds = self.bounds | {name: (max(low, 0.0), high) for name, (low, high) in (ends[k] for k in part.linear)}
        if bounds == self.bounds:
            return self
        return self._replace(recipe=(*self.recipe, POSITIVE_ONLY), bounds=bounds)

    @classmethod
    def of_user(cls, function: Callable) -> "Term":
        """Of a function ``f(x, *params)``, whose signature names its parameters."""
        name, names = function_name(function), parameter_names(function)
        if names is None:
            raise TypeError(f"the parameters of {name} have no names: write it as f(x, a, b), to add or multiply it")
        name = name if name.isidentifier() else "own"
        return cls((name, function), function, dict.fromkeys(names, (-inf, inf)), None)


class ReadyModel:
    """A model ``f(x, *params)`` with named parameters and bounds; also sums and products of such models and user functions.

    Attributes
    ----------
    param_names : tuple of str
    bounds : dict
        ``(lower, upper)`` by name of the parameter.
    """

    def __init__(self, *terms: Term, tree: Tree | None = None):
        self.terms = terms
        self.tree: Tree = _sum_of(len(terms)) if tree is None else tree
        names: list[str] = []
        self.bounds: dict[str, tuple[float, float]] = {}
        for kind, term in zip(numbered([term.name for term in terms]), terms, strict=True):
            prefix = f"{kind}_" if len(terms) > 1 else ""
            names += [prefix + name for name in term.bounds]
            self.bounds |= {prefix + name: ends for name, ends in term.bounds.items()}
        self.param_names = tuple(names)
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(name, positional) for name in ("x", *names)])
        self.__name__ = self._label(self.tree)
        self.__doc__ = "\n\n".join(inspect.cleandoc(term.function.__doc__ or "") for term in terms)
        # by which saved files import it
        self.__module__, self.__qualname__ = PUBLIC, self.__name__ if self.can_guess else f"<{self.__name__}>"

    def __call__(self, *arguments, **named):
        x, *params = self.__signature__.bind(*arguments, **named).args
        return self.value(self.tree, x, params)

    def value(self, tree: Tree, x, params):
        """The value of a part of the model, given all parameters."""
        if isinstance(tree, int):
            begin = sum(len(term.bounds) for term in self.terms[:tree])
            term = self.terms[tree]
            return term.function(x, *params[begin : begin + len(term.bounds)])
        how, one, other = tree
        return OPERATORS[how](self.value(one, x, params), self.value(other, x, params))

    def _label(self, tree: Tree) -> str:
        if isinstance(tree, int):
            return self.terms[tree].label
        how, one, other = tree
        sides = []
        for each in (one, other):
            is_sum = not isinstance(each, int) and each[0] == "+"
            sides.append(f"({self._label(each)})" if how == "*" and is_sum else self._label(each))
        return f" {how} ".join(sides)

    @property
    def positive(self) -> "ReadyModel":
        """The same with amplitudes, heights and areas that are not negative: ``(gaussian + gaussian).positive + line``."""
        return ReadyModel(*(term.positive for term in self.terms), tree=self.tree)

    @property
    def is_sum(self) -> bool:
        """Whether the model has only sums, not products."""
        return len(_summands(self.tree)) == len(self.terms)

    @property
    def can_guess(self) -> bool:
        """Whether it is a sum of ready models."""
        return self.is_sum and all(term.part is not None for term in self.terms)

    @property
    def own_functions(self) -> list[Callable]:
        """The user's functions in the model."""
        return [term.function for term in self.terms if term.part is None]

    @property
    def components(self) -> dict[str, "Component"]:
        """The summands by name: functions of x and of all parameters."""
        trees = _summands(self.tree)
        labels = numbered([self._label(tree).replace(f"({POSITIVE_ONLY})", "") for tree in trees])
        return {label: Component(self, tree) for label, tree in zip(labels, trees, strict=True)}

    def guess(self, x, y) -> np.ndarray:
        """Parameters (p,) from x (n,) and y (n,), to start a fit from; nonfinite points are left out."""
        with float64():
            return np.asarray(Guess(self)(x, y))

    def __add__(self, other):
        return _combined("+", self, other)

    def __radd__(self, other):
        return _combined("+", other, self)

    def __mul__(self, other):
        return _combined("*", self, other)

    def __rmul__(self, other):
        return _combined("*", other, self)

    def __repr__(self):
        return f"{self.__name__}: {', '.join(self.param_names)}"

    def __reduce__(self):  # the same bytes in every process, so that it is compiled once
        recipes = tuple(term.recipe for term in self.terms)
        return (_again, recipes) if self.can_guess else (_composed, (self.tree, *recipes))


class Component:
    """A part of a `ReadyModel` as a function of x and of all its parameters."""

    def __init__(self, model: ReadyModel, tree: Tree):
        self.model, self.tree = model, tree
        self.own_functions = model.own_functions

    def __call__(self, x, *params):
        return self.model.value(self.tree, x, params)


OPERATORS = {"+": add, "*": mul}


def _sum_of(n: int) -> Tree:
    tree: Tree = 0
    for k in range(1, n):
        tree = "+", tree, k
    return tree


def _summands(tree: Tree) -> list[Tree]:
    return [tree] if isinstance(tree, int) or tree[0] == "*" else [*_summands(tree[1]), *_summands(tree[2])]


def _moved(tree: Tree, by: int) -> Tree:
    """With the places of terms behind others."""
    return tree + by if isinstance(tree, int) else (tree[0], _moved(tree[1], by), _moved(tree[2], by))


def _combined(how: str, one: Any, other: Any) -> ReadyModel:
    for each in (one, other):
        if not callable(each):
            raise TypeError(
                f"{each!r} is neither a model nor a function f(x, a, b, ...): only these can be added and multiplied"
            )
    one, other = (each if isinstance(each, ReadyModel) else ReadyModel(Term.of_user(each)) for each in (one, other))
    made = ReadyModel(*one.terms, *other.terms, tree=(how, one.tree, _moved(other.tree, len(one.terms))))
    return ReadyModel(*made.terms) if made.is_sum else made


def _composed(tree: Tree, *recipes) -> ReadyModel:
    terms = (Term.of_user(each[1]) if callable(each[-1]) else _again(each).terms[0] for each in recipes)
    return ReadyModel(*terms, tree=tree)


def named(text: str) -> ReadyModel:
    """The model, or the sum, of this name: ``"gaussian"``, ``"gaussian + line"``, ``"gaussian+polynomial:2"``.

    Raises
    ------
    ValueError
        Unknown name; the message lists the known ones.
    """
    return reduce(add, map(_one, text.split("+")))


def known() -> list[str]:
    """Names of all ready models."""
    return [name for name, each in globals().items() if isinstance(each, ReadyModel)]


def _one(text):
    text = text.strip()
    if text.endswith(f"({POSITIVE_ONLY})"):
        return _one(text.removesuffix(f"({POSITIVE_ONLY})")).positive
    if isinstance(found := globals().get(text), ReadyModel):
        return found
    if degree := re.fullmatch(r"polynomial[(:]?(\d+)\)?", text):
        return polynomial(int(degree[1]))
    hint = near(text, known(), "")
    hint += " " * bool(hint)
    if "." in text:  # as Python would have it
        hint = f"a function of your own is {':'.join(text.rsplit('.', 1))!r}. "
    raise ValueError(f"there is no ready model {text!r}: {hint}There are {', '.join(known())} and polynomial:DEGREE")


def __getattr__(name):  # of what has been kept: sums have no other name to be imported by
    if "+" not in name and "(" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return named(name)


def _again(*recipes):
    found = []
    for name, *arguments in recipes:
        own = [each for each in arguments if each != POSITIVE_ONLY]
        made = globals()[name](*own) if own else globals()[name]
        found.append(made.positive if POSITIVE_ONLY in arguments else made)
    return ReadyModel(*(model.terms[0] for model in found)) if len(found) > 1 else found[0]


def _ready(candidates=None, linear=(0,), shape=None, finish=list, **bounds):
    """Makes a `ReadyModel` of a function of the same name.

    ``linear`` are the places of the parameters that it is linear in, together; or that ``shape`` is, which takes the place
    of the function while the start is guessed, and whose parameters ``finish`` translates. Equal names have equal bounds.
    """

    def made(function):
        names = [*inspect.signature(function).parameters][1:]
        ends = {name: bounds.get(name, (-inf, inf)) for name in names}
        own = tuple(names.index(each) if each in names else None for each in parameter_names(shape or function) or ())
        part = Part(shape or function, own, linear, candidates, finish)
        return ReadyModel(Term((function.__name__,), function, ends, part))

    return made


def polynomial(degree: int) -> ReadyModel:
    """``c0 + c1 x + ... + c_degree x^degree``; ``polynomial(0)`` is a constant.

    c0, c1, ... : [y], [y / x], ...

    Raises
    ------
    ValueError
        Where ``degree`` is not an integer from 0 to 20.
    """
    if isinstance(degree, bool) or not isinstance(degree, Integral) or not 0 <= degree <= MOST_DEGREES:
        raise ValueError(f"`degree` must be an integer from 0 to {MOST_DEGREES}, not {degree!r}: center and scale x instead")
    degree = int(degree)

    def function(x, *coefficients):
        value = coefficients[-1] * jnp.ones_like(x)
        for each in coefficients[-2::-1]:
            value = value * x + each
        return value

    function.__doc__ = polynomial.__doc__
    ends = {f"c{k}": (-inf, inf) for k in range(degree + 1)}
    places = tuple(range(degree + 1))
    part = Part(function, places, places, None, list)
    return ReadyModel(Term(("polynomial", degree), function, ends, part))


# ---------------------------------------------------------------------------------------------------------------------
# trends


@_ready(linear=(0, 1))
def line(x, slope, intercept):
    """``slope x + intercept``.

    slope : [y / x]
    intercept : [y], at x = 0
    """
    return slope * x + intercept


@_ready(rates(both_signs=True))
def exponential(x, amplitude, rate):
    """``amplitude exp(-rate x)``: decay, or growth where the rate is negative.

    amplitude : [y], at x = 0
    rate : [1 / x]
    """
    return amplitude * jnp.exp(-rate * x)


@_ready(rates((0.3, 0.5, 0.75, 1.0, 1.5, 2.0)), rate=POSITIVE, exponent=POSITIVE)
def stretched_exponential(x, amplitude, rate, exponent):
    """``amplitude exp(-(rate x)^exponent)`` for x >= 0: Kohlrausch, Williams and Watts; nan for x < 0.

    amplitude : [y], at x = 0
    rate : [1 / x]
    exponent : 1; below 1 stretched, above 1 compressed

    Source: G. Williams, D. C. Watts, Trans. Faraday Soc. 66 (1970) 80.
    """
    return amplitude * _stretched(x, rate, exponent, 1.0)


@_ready(exponents(-8.0, 8.0, 65))
def power_law(x, amplitude, exponent):
    """``amplitude x^exponent`` for x >= 0, as in Porod's law (exponent -4); nan for x < 0, infinite at 0 for exponents < 0.

    amplitude : [y], at x = 1
    exponent : 1
    """
    inside = x > 0
    value = jnp.exp(exponent * jnp.log(jnp.where(inside, x, 1.0)))
    at_zero = jnp.where(exponent > 0, 0.0, jnp.where(exponent == 0, 1.0, inf))
    return amplitude * jnp.where(inside, value, jnp.where(x == 0, at_zero, jnp.nan))


# ---------------------------------------------------------------------------------------------------------------------
# peaks


@_ready(peaks([[0.5], [0.8]]), width=POSITIVE)
def gaussian(x, amplitude, center, width):
    """``amplitude exp(-((x - center) / width)^2 / 2)``.

    amplitude : [y], height above 0; negative for a dip
    center : [x]
    width : [x], standard deviation; the full width at half maximum is 2.3548 of it, the area 2.5066 amplitude width
    """
    return amplitude * jnp.exp(-0.5 * ((x - center) / width) ** 2)


@_ready(peaks([[0.4], [0.8]]), width=POSITIVE)
def lorentzian(x, amplitude, center, width):
    """``amplitude / (1 + ((x - center) / width)^2)``: Cauchy, Breit and Wigner.

    amplitude : [y], height above 0; negative for a dip
    center : [x]
    width : [x], half width at half maximum; the area is pi amplitude width
    """
    return amplitude / (1 + ((x - center) / width) ** 2)


@_ready(peaks([[1.0, 0.2], [1.6, 0.2], [1.0, 0.8], [1.6, 0.8]]), fwhm=POSITIVE, fraction=SHARE)
def pseudo_voigt(x, amplitude, center, fwhm, fraction):
    """``amplitude (fraction L + (1 - fraction) G)``, L a Lorentzian and G a Gaussian of height 1 and of the same fwhm.

    amplitude : [y], height above 0; negative for a dip
    center : [x]
    fwhm : [x], full width at half maximum
    fraction : 1, of the Lorentzian, from 0 to 1

    Source: G. K. Wertheim et al., Rev. Sci. Instrum. 45 (1974) 1369.
    """
    square = (2 * (x - center) / fwhm) ** 2
    return amplitude * (fraction / (1 + square) + (1 - fraction) * jnp.exp2(-square))


@_ready(peaks([[0.6, 0.1], [0.4, 0.4], [0.15, 0.7]], n_widths=2), sigma=POSITIVE, gamma=POSITIVE)
def voigt(x, area, center, sigma, gamma):
    """``area Re w(z) / (sigma sqrt(2 pi))``, ``z = (x - center + i gamma) / (sigma sqrt(2))``, w the Faddeeva function.

    The convolution of a Gaussian and a Lorentzian; relative error 1e-13.

    area : [x y], under the peak; negative for a dip
    center : [x]
    sigma : [x], standard deviation of the Gaussian
    gamma : [x], half width at half maximum of the Lorentzian
    """
    unit = sigma * 2**0.5
    return area / (unit * pi**0.5) * faddeeva_real((x - center) / unit, gamma / unit)


@_ready(peaks([[0.82, 1.0], [1.46, 2.5], [2.1, 5.0]]), width=POSITIVE, exponent=POSITIVE)
def moffat(x, amplitude, center, width, exponent):
    """``amplitude (1 + ((x - center) / width)^2)^-exponent``.

    amplitude : [y], height above 0; negative for a dip
    center : [x]
    width : [x]; the full width at half maximum is ``2 width sqrt(2^(1 / exponent) - 1)``
    exponent : 1, of the wings: 1 is a Lorentzian, infinity a Gaussian

    Source: A. F. J. Moffat, Astron. Astrophys. 3 (1969) 455.
    """
    return amplitude * jnp.exp(-exponent * jnp.log1p(((x - center) / width) ** 2))


# ---------------------------------------------------------------------------------------------------------------------
# steps and oscillations


@_ready(steps, width=POSITIVE)
def sigmoid(x, height, center, width):
    """``height / (1 + exp(-(x - center) / width))``: the logistic step, from 0 on the left to the height on the right.

    For one that falls: ``sigmoid + polynomial(0)``, with a negative height.

    height : [y]
    center : [x]
    width : [x]; from 12 to 88 % of the height in 4 widths
    """
    return height * jax.nn.sigmoid((x - center) / width)


@_ready(steps, width=POSITIVE)
def arctan_edge(x, height, center, width):
    """``height (1/2 + arctan((x - center) / width) / pi)``: an absorption edge, from 0 on the left to the height.

    height : [y], the edge jump
    center : [x]
    width : [x]; half width at half maximum of the core level's Lorentzian

    Source: F. K. Richtmyer, S. W. Barnes, E. Ramberg, Phys. Rev. 46 (1934) 843.
    """
    return height * (0.5 + jnp.arctan((x - center) / width) / pi)


def _sine_and_cosine(x, sine, cosine, frequency, rate):
    turn = 2 * pi * frequency * x
    return jnp.exp(-rate * x) * (sine * jnp.sin(turn) + cosine * jnp.cos(turn))


def _amplitude_and_phase(params):
    sine, cosine, frequency, rate = params
    return [jnp.hypot(sine, cosine), frequency, jnp.arctan2(cosine, sine), rate]


@_ready(
    frequencies,
    (0, 1),
    _sine_and_cosine,
    _amplitude_and_phase,
    **dict.fromkeys(("amplitude", "frequency", "rate"), POSITIVE),
)
def damped_sine(x, amplitude, frequency, phase, rate):
    """``amplitude exp(-rate x) sin(2 pi frequency x + phase)``.

    amplitude : [y], at x = 0
    frequency : [1 / x], in periods
    phase : radian
    rate : [1 / x], of the damping
    """
    return amplitude * jnp.exp(-rate * x) * jnp.sin(2 * pi * frequency * x + phase)


# ---------------------------------------------------------------------------------------------------------------------
# photon correlation


@_ready(rates((0.5, 0.75, 1.0, 1.5, 2.0)), (0, 1), baseline=POSITIVE, contrast=SHARE, rate=POSITIVE, exponent=RELAXATION)
def g2_single(x, baseline, contrast, rate, exponent):
    """``baseline + contrast exp(-(rate x)^exponent)^2``, the intensity correlation at delay x >= 0, by Siegert's relation.

    baseline : [y], 1 for uncorrelated light
    contrast : [y], of the speckles, from 0 to 1
    rate : [1 / x], of the field correlation
    exponent : 1; below 1 stretched, above 1 compressed

    Source: O. G. Shpyrko, J. Synchrotron Rad. 21 (2014) 1057.
    """
    return baseline + contrast * _stretched(x, rate, exponent, 2.0)


@_ready(
    two_rates(12, (0.25, 0.5, 0.75)),
    (0, 1),
    **dict.fromkeys(("baseline", "rate1", "rate2"), POSITIVE),
    **dict.fromkeys(("contrast", "fraction"), SHARE),
    **dict.fromkeys(("exponent1", "exponent2"), RELAXATION),
)
def g2_double(x, baseline, contrast, rate1, exponent1, rate2, exponent2, fraction):
    """``baseline + contrast (fraction g(1) + (1 - fraction) g(2))^2``, ``g(k) = exp(-(rate_k x)^exponent_k)``, x >= 0.

    baseline : [y], 1 for uncorrelated light
    contrast : [y], of the speckles, from 0 to 1
    rate1, rate2 : [1 / x], of the field correlation
    exponent1, exponent2 : 1
    fraction : 1, of the first one, from 0 to 1

    Source: as for `g2_single`.
    """
    first, second = _stretched(x, rate1, exponent1, 1.0), _stretched(x, rate2, exponent2, 1.0)
    return baseline + contrast * (fraction * first + (1 - fraction) * second) ** 2


# ---------------------------------------------------------------------------------------------------------------------
# functions that models are made of


def _stretched(x, rate, exponent, factor):
    """``exp(-factor (rate x)^exponent)``, with finite derivatives at x = 0 and far out."""
    product = rate * x
    inside = product > 0
    power = exponent * jnp.log(jnp.where(inside, product, 1.0))
    value = jnp.exp(-factor * jnp.exp(jnp.where(power < STEEPEST, power, STEEPEST)))
    return jnp.where(inside, value, jnp.where(product == 0, 1.0, jnp.nan))
