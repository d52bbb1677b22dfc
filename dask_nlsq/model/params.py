"""The parameters of a result by name: records of value, error and bounds, and the mapping of them, a table in print."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..base.text import html_table, measured, near, relative, table

SIDES = {-1: "at its lower bound", 0: "", 1: "at its upper bound"}


@dataclass(frozen=True, repr=False, eq=False)
class Parameter:
    """A parameter of a result; of a map its fields are arrays of its shape, DataArrays where it has labels.

    ``p0``, ``bounds`` and ``fixed`` of other fits accept it instead of numbers; for NumPy it is its value.

    Attributes
    ----------
    name : str
    value, error : float or array
        The value and its standard error, 0 if it was fixed.
    at_bound : int or array
        -1 at its lower bound, 1 at its upper bound, otherwise 0.
    bounds : tuple of float or None
        Lower and upper bound; None for a map.
    fixed : bool or None
        Whether it was fixed; None for a map.
    expr : str or None
        Expression of a tied parameter or derived quantity; otherwise None.
    shared : bool
        Whether all groups of a fit share it; only in the spectrum of a group.
    """

    name: str
    value: Any
    error: Any
    at_bound: Any
    bounds: tuple[float, float] | None = None
    fixed: bool | None = None
    expr: str | None = None
    shared: bool = False

    def __float__(self):
        return float(self.value)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.value, dtype, copy=copy)

    @property
    def remark(self) -> str:
        """That it was held, or tied, or shared, or is at a bound; empty of any other."""
        if self.shared:
            return "shared"
        return "fixed" if self.fixed else f"= {self.expr}" if self.expr else SIDES[int(self.at_bound)]

    def row(self, full: bool = False) -> tuple[str, str, str, str, str]:
        """Of a table: name, value, error, relative error, remark; as `dask_nlsq.base.text.measured` rounds them."""
        value, error = measured(self.value, self.error, full)
        value = value if value.startswith("-") else f" {value}"
        if self.fixed:
            return self.name, value, "", "", self.remark
        share = relative(self.value, self.error)
        return self.name, value, f"+- {error}", f"({share})" if share else "", self.remark

    def __format__(self, spec):
        """Value and error, rounded, or with "full" all digits of them; with any other format of numbers the value."""
        if spec not in ("", "full") or np.ndim(self.value) or hasattr(self.value, "dask"):
            return format(self.value if spec else repr(self), spec)
        return " +- ".join(measured(self.value, self.error, spec == "full"))

    def __repr__(self):
        if np.ndim(self.value) or hasattr(self.value, "dask"):
            return f"<Parameter {self.name}: {' x '.join(map(str, self.value.shape)) or 1} values and errors>"
        low, high = self.bounds or (-np.inf, np.inf)
        within = f"from {low:g} to {high:g}" if np.isfinite([low, high]).any() else ""
        said = "; ".join(filter(None, (self.remark, within)))
        return f"<Parameter {' '.join(filter(None, map(str.strip, self.row()[:3])))}{f' ({said})' * bool(said)}>"


T = TypeVar("T")


class ByName(Mapping[str, T]):
    """Things by their names, in their order; a wrong name is an error that lists the right ones."""

    def __init__(self, *things: T):
        self._by_name: dict[str, T] = {each.name: each for each in things}  # type: ignore[attr-defined]  # they have names

    def __getitem__(self, name: str) -> T:
        if name not in self._by_name:
            raise unknown(name, self._by_name)
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self):
        return len(self._by_name)

    def _ipython_key_completions_(self):
        return [*self]


class Params(ByName[Parameter]):
    """`Parameter` by name, in the order of the model."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(self._by_name.values())

    def valuesdict(self) -> dict[str, float]:
        """The values by name, under the name that lmfit has for it: ``f(x, **result.params.valuesdict())``."""
        return {name: each.value for name, each in self.items()}

    def rows(self, full: bool = False) -> list[tuple[str, str, str, str, str]]:
        return [each.row(full) for each in self.values()]

    def __repr__(self):
        return "\n".join(table(self.rows())) if self else "<Params: none>"

    def to_html(self) -> str:
        rows = ((name, value, error.replace("+-", "±"), *rest) for name, value, error, *rest in self.rows())
        return html_table(("parameter", "value", "error", "", ""), rows)

    _repr_html_ = to_html


def unknown(name, names) -> KeyError:
    """The error for an unknown name."""
    return KeyError(f"there is no parameter {name!r}, only {', '.join(names)}{near(str(name), names, '; ')}")


def of_map(maps, name: str, labelled: bool = False) -> Parameter:
    """A parameter of a `MapResult` or of stored maps, ``labelled`` as `to_xarray` does."""
    names, axis = maps.param_names, "param"
    fields: tuple[str, ...] = ("popt", "perr", "at_bound")
    if name in maps.derived_names:
        names, fields, axis = maps.derived_names, ("derived", "derived_error"), "quantity"
    if name not in names:
        raise unknown(name, (*names, *maps.derived_names))
    if labelled:
        found = maps.to_xarray()
        values = [found[each].sel({axis: name}, drop=True) for each in fields]
    else:
        values = [getattr(maps, each)[..., names.index(name)] for each in fields]
    return Parameter(name, *values, *[0] * (3 - len(values)))
