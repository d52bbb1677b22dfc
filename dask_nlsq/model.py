"""The user's function, interned by content, so that each process compiles it once.

A function from a notebook is unpickled anew in every task, and a new function object means a new compilation. `Model`
therefore pickles as ``(token, payload)`` and is looked up by token, a hash of the pickled function, in a registry of
the process before anything is unpickled. Whatever is compiled for the model is kept in `Model.compiled`.
"""

import hashlib
import inspect
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import cloudpickle
import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from .config import compilation_cache

REGISTRY_SIZE = 64  # models kept per process; a session has a few, a test run hundreds
_registry: OrderedDict[str, "Model"] = OrderedDict()
_lock = threading.Lock()

NUMPY_ADVICE = "write the model with jax.numpy (import jax.numpy as jnp; jnp.exp instead of np.exp)"


class Model:
    """A model ``f(x, *params)``, perhaps with its Jacobian ``jac(x, *params) -> (n, p)``, and what was compiled of it."""

    def __init__(self, f: Callable, jac: Callable | None, token: str, payload: bytes):
        self.f, self.jac, self.token, self.payload = f, jac, token, payload
        self.compiled: dict[Hashable, Callable] = {}

    def __reduce__(self):
        return _from_payload, (self.token, self.payload)

    def __repr__(self):
        return f"<Model {function_name(self.f)} {self.token[:8]}>"

    def get(self, key: Hashable, build: Callable[[], Callable]) -> Callable:
        """The compiled function stored under ``key``; ``build()`` makes it at first use."""
        with _lock:
            if key not in self.compiled:
                _keep_compilations()
                self.compiled[key] = build()
            return self.compiled[key]


def intern(f: Callable, jac: Callable | None = None) -> Model:
    """The `Model` of ``f``: an earlier one where function, closure and globals have the same content.

    Raises
    ------
    TypeError
        Where ``f`` cannot be pickled, which workers and the registry both need.
    """
    try:
        payload = cloudpickle.dumps((f, jac))
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as err:
        raise TypeError(
            f"the model {function_name(f)} cannot be pickled ({err}): let it close over arrays and numbers only, "
            "not over open files, locks or clients"
        ) from err
    token = hashlib.blake2b(payload, digest_size=16).hexdigest()
    known = _lookup(token)
    # an importable function is pickled by its name, so a reloaded module gives the same token and another function
    if known is not None and (known.f is f or _by_value(f)):
        return known
    return _store(Model(f, jac, token, payload))


def _keep_compilations():
    """Turn on JAX's persistent cache where the user asked for it and has not set up JAX's own."""
    directory = compilation_cache()
    if directory is None or jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # ours take 0.1 s and more, and add up
    reset_cache()  # JAX looks at the directory once, at the first compilation of the process


def _by_value(f):
    return getattr(f, "__module__", None) == "__main__" or "<locals>" in getattr(f, "__qualname__", "<locals>")


def _from_payload(token, payload):
    known = _lookup(token)
    if known is not None:
        return known
    f, jac = cloudpickle.loads(payload)
    return _store(Model(f, jac, token, payload))


def _lookup(token):
    with _lock:
        if token in _registry:
            _registry.move_to_end(token)
        return _registry.get(token)


def _store(model):
    with _lock:
        _registry[model.token] = model
        while len(_registry) > REGISTRY_SIZE:
            _registry.popitem(last=False)
    return model


def function_name(f: Callable) -> str:
    return getattr(f, "__name__", type(f).__name__)


def parameter_names(f: Callable) -> list[str] | None:
    """Names of the parameters after x; None where the signature does not fix their number."""
    try:
        arguments = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):  # builtins and ufuncs have no signature
        return None
    positional = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    if any(a.kind == a.VAR_POSITIONAL for a in arguments) or len(positional) < 2:
        return None
    return [a.name for a in positional[1:]]


def evaluate(model: Model, x, params):
    """``f(x, *params)`` in float64, errors of tracing translated into advice; call inside ``enable_x64``."""
    return jnp.asarray(_advised(model.f, x, params), dtype=jnp.float64)


def evaluate_jac(model: Model, x, params):
    """``jac(x, *params)`` in float64, shape as the user returns it."""
    return jnp.asarray(_advised(model.jac, x, params), dtype=jnp.float64)


def _advised(function, x, params):
    name = function_name(function)
    try:
        return function(x, *params)
    except jax.errors.TracerBoolConversionError as err:
        raise TypeError(
            f"the model {name} branches in Python on a value (if, while, and, or, min, max): use jnp.where, "
            "jnp.minimum, jnp.maximum or jax.lax.cond, which work on whole arrays"
        ) from err
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as err:
        raise TypeError(f"the model {name} needs concrete values, as NumPy functions do: {NUMPY_ADVICE}") from err


class ModelShapeError(ValueError):
    """A model does not return one value per point."""


def check_shape(function: Callable, found: tuple[int, ...], allowed: list[tuple[int, ...]], n: int) -> None:
    if found not in allowed:
        raise ModelShapeError(
            f"{function_name(function)} returned an array of shape {found} when called with {n} points: it must return "
            f"shape {allowed[0]}, one value per point"
        )
