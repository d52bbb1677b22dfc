"""The model of a result that was loaded: imported by its name, if it still computes the same."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..base.modules import Trust, UntrustedError, import_by, import_name
from ..data.chunks import Preparation
from ..kernels.blocks import Layouts
from ..kernels.checks import fingerprint
from ..model.function import FixedParameters, Model, intern
from ..model.ties import Ties


class NamedModel(NamedTuple):
    """What a result that was loaded knows of its model."""

    name: list[str] | None  # module and name, where it can be imported
    fingerprint: str  # of what it computes
    n: int  # points that it can be evaluated on
    values: list[float]  # of all parameters, where some are held or tied, else of none
    free: list[int]
    names: list[str]  # of all parameters, where some are tied
    expr: dict[str, str]  # by which
    trust: Trust = False  # whose modules may be imported: of who loads it, not of the file

    @classmethod
    def of(cls, model: Model, preparation: Preparation, n_params: int, n_points: int) -> "NamedModel":
        n = n_points if preparation.whole else 2
        f: Any = model.f
        values: list[float] = []
        free: list[int] = []
        names: list[str] = []
        expr: dict[str, Any] = {}
        found = fingerprint(intern(f), preparation.layouts, n_params, n)
        if isinstance(f, FixedParameters):
            if f.ties is not None:
                names, expr = [*f.ties.names], f.ties.expr
            f, values, free = f.f, f.values, f.free
        kept = all(isinstance(rule, str) for rule in expr.values())
        return cls(import_name(f) if kept else None, found, n, values, free, names, expr if kept else {})

    def find(self, layouts: Layouts, n_params: int) -> Model:
        """Import it.

        Raises
        ------
        ValueError
            Where it cannot be imported, or computes something else now; an `UntrustedError` where it may not be.
        """
        way_out = "call the function with popt: f(x, *result.popt)"
        if self.name is None:
            why = "a lambda, of a notebook, or tied by a function"
            raise ValueError(f"the model of this result has no name to import it by ({why}): {way_out}")
        f = import_model(self.name, self.trust, "the model of this result", way_out)
        ties = Ties(self.names, self.expr) if self.expr else None
        model = intern(FixedParameters(f, self.values, self.free, ties=ties) if self.values else f)
        if fingerprint(model, layouts, n_params, self.n) != self.fingerprint:
            raise ValueError(f"the model {'.'.join(self.name)} computes something else than when it was fitted: {way_out}")
        return model


def import_model(name: list[str], trust: Trust, whose: str, way_out: str) -> Callable:
    """The function of this module and name.

    Raises
    ------
    ValueError
        Where it cannot be imported; an `UntrustedError` where it may not be.
    """
    try:
        return import_by(name, trust)
    except UntrustedError as err:
        raise UntrustedError(
            f"{err}: {way_out}, or load it with trust=True, or trust= the directory of the module"
        ) from None
    except (ImportError, AttributeError) as err:
        raise ValueError(f"{whose} cannot be imported ({err}): {way_out}") from err
