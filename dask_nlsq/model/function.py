"""The user's function, interned by content, so that each process compiles it once.

A function from a notebook is unpickled again in every task, and a new function object means a new compilation. `Model`
therefore pickles as ``(token, payload, buffers)`` and is looked up by token, a hash of the pickled function, in a registry
of the process before anything is unpickled. Arrays that it closes over are the ``buffers``, which are not copied. Whatever
is compiled for the model is kept in `Model.compiled`.
"""

import ast
import hashlib
import inspect
import pickle
import sys
import textwrap
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from ..base.compile import Compiled
from ..base.config import compilation_cache
from ..base.modules import is_installed
from .lapack import InTurn
from .ties import Ties

HOISTED_FROM = 2**20  # bytes of a model, from which arrays that it closes over are arguments of what is compiled
SLOW, EVERY = 3.0, 1.0  # seconds: how long a function compiles until that is told, and between two times that it is
REGISTRY_SIZE = 64  # models kept per process; a session has a few, a test run hundreds
_registry: OrderedDict[str, "Model"] = OrderedDict()
_lock = threading.Lock()

NUMPY_ADVICE = "write it with jax.numpy (import jax.numpy as jnp; jnp.exp instead of np.exp or math.exp)"
BRANCH_ADVICE = (
    "use jnp.where, jnp.minimum, jnp.maximum or jax.lax.cond, which work on whole arrays; mask= leaves points out"
)


class Model:
    """A model ``f(x, *params)``, perhaps with its Jacobian ``jac(x, *params) -> (n, p)``, and what was compiled of it."""

    def __init__(self, f: Callable, jac: Callable | None, token: str, payload: bytes, buffers: Sequence = ()):
        self.f, self.jac, self.token, self.payload, self.buffers = f, jac, token, payload, buffers
        self.compiled: dict[Hashable, Callable] = {}
        self.constants: dict[tuple, jax.Array] = {}  # large arrays that it closes over, where kernels compute
        self.choices: dict[Hashable, Any] = {}  # found out once: the faster of two ways, that a check has passed
        self.watches: list[Callable[[float], None]] = []  # told for how long a function compiles, if that is long

    @property
    def nbytes(self) -> int:
        """What a copy of it takes on the way to another process."""
        return len(self.payload) + sum(memoryview(each).nbytes for each in self.buffers)

    def __reduce_ex__(self, protocol):
        buffers = [pickle.PickleBuffer(each) if protocol >= 5 else bytes(each) for each in self.buffers]
        return _from_payload, (self.token, self.payload, buffers)

    def __repr__(self):
        return f"<Model {function_name(self.f)} {self.token[:8]}>"

    def get(self, key: Hashable, build: Callable[[], Callable]) -> Callable:
        """The compiled function stored under ``key``; ``build()`` makes it at first use."""
        with _lock:
            if key not in self.compiled:
                _keep_compilations()
                self.compiled[key] = build()
            return self.compiled[key]

    def jit(self, function: Callable, long_sums: bool = False) -> Callable:
        """``function``, which evaluates this model, as `Compiled`."""
        run = Compiled(function, long_sums) if self.nbytes < HOISTED_FROM else _Hoisted(function, self.constants, long_sums)
        return _FirstSlow(self, InTurn(run))

    @contextmanager
    def watched(self, told: Callable[[float], None]):
        """Within, ``told`` is called every second while a function of this model compiles slowly; by another thread."""
        self.watches.append(told)
        try:
            yield
        finally:
            self.watches.remove(told)


class _FirstSlow:
    """A compiled function, whose first call compiles it."""

    def __init__(self, model: Model, run: Callable):
        self.model, self.run, self.called = model, run, False

    def __call__(self, *args):
        if self.called:
            return self.run(*args)
        ended = threading.Event()
        threading.Thread(target=self._tell, args=(time.perf_counter(), ended), name="nlsq-compiles", daemon=True).start()
        try:
            found = self.run(*args)
        finally:
            ended.set()
        self.called = True
        return found

    def _tell(self, began: float, ended: threading.Event) -> None:
        wait = SLOW
        while not ended.wait(wait):
            for told in [*self.model.watches]:
                told(time.perf_counter() - began)
            wait = EVERY


class _Hoisted:
    """`Compiled`, of a function whose closed-over arrays become arguments.

    As constants XLA would copy them into each program, and fold what it can: 14 s and 640 MB for an array of 200 MB.
    """

    def __init__(self, function: Callable, constants: dict[tuple, jax.Array], long_sums: bool):
        self.function, self.constants, self.long_sums = function, constants, long_sums
        self.traced: dict[tuple, tuple[Callable, list[jax.Array], Any, ClosedJaxpr]] = {}

    def __call__(self, *args):
        run, constants, out, _ = self._traced(*args)
        return jax.tree.unflatten(out, run(constants, *jax.tree.leaves(args)))

    def trace(self, *args) -> ClosedJaxpr:
        return self._traced(*args)[-1]

    def _traced(self, *args):
        leaves, tree = jax.tree.flatten(args)
        key = tree, tuple(map(jax.typeof, leaves))
        if key not in self.traced:
            self.traced[key] = self._trace(*args)
        return self.traced[key]

    def _trace(self, *args):
        closed, shape = jax.make_jaxpr(self.function, return_shape=True)(*args)

        def run(constants, *leaves):
            return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, constants))(*leaves)

        return Compiled(run, self.long_sums), [*map(self._on_device, closed.consts)], jax.tree.structure(shape), closed

    def _on_device(self, constant) -> jax.Array:
        """The array where kernels compute, once for all of them."""
        if not isinstance(constant, np.ndarray):
            return constant
        key = constant.__array_interface__["data"], constant.shape, constant.strides, constant.dtype.str
        if key not in self.constants:
            self.constants[key] = jax.device_put(constant, may_alias=True)
        return self.constants[key]


def intern(f: Callable, jac: Callable | None = None) -> Model:
    """The `Model` of ``f``: an earlier one where function, closure and globals have the same content.

    Raises
    ------
    TypeError
        Where ``f`` cannot be pickled, which workers and the registry both need.
    """
    buffers: list[pickle.PickleBuffer] = []
    try:
        with ExitStack() as stack:
            for each in (own_function(f), own_function(jac), *_rules(f)):
                stack.enter_context(_by_value(each))
            payload = cloudpickle.dumps((f, jac), protocol=5, buffer_callback=buffers.append)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as err:
        raise TypeError(
            f"the model {function_name(f)} cannot be pickled ({err}): let it close over arrays and numbers only, "
            "not over open files, locks or clients"
        ) from err
    found = hashlib.blake2b(payload, digest_size=16)
    raw = [each.raw() for each in buffers]
    for each in raw:
        found.update(each)
    return _lookup(found.hexdigest()) or _store(Model(f, jac, found.hexdigest(), payload, raw))


@contextmanager
def _by_value(function):
    """Within, a function of the user's own modules is pickled with its code and globals, so that a change of them shows.

    Installed packages are pickled by name, as everywhere.
    """
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if (
        module is None
        or file is None
        or is_installed(file)
        or module.__name__ in cloudpickle.list_registry_pickle_by_value()
    ):
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _keep_compilations():
    """Turn on JAX's persistent cache where the user asked for it and has not set up JAX's own."""
    directory = compilation_cache()
    if directory is None or jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]  # as `base.x64`
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # ours take 0.1 s and more, and add up
    reset_cache()  # JAX looks at the directory once, at the first compilation of the process


class ModelMissing(LookupError):
    """A process does not have a model that others have."""


def is_known(token: str) -> bool:
    """Whether this process has the model."""
    return _lookup(token) is not None


def known_model(token: str) -> Model:
    """A model that this process has.

    Raises
    ------
    ModelMissing
        Where it has not, or no longer.
    """
    if (model := _lookup(token)) is None:
        raise ModelMissing(token)
    return model


def _from_payload(token, payload, buffers=()):
    known = _lookup(token)
    if known is not None:
        return known
    f, jac = cloudpickle.loads(payload, buffers=buffers)
    return _store(Model(f, jac, token, payload, buffers))


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


class FixedParameters:
    """``f(x, *params)`` as a function of some of its parameters, with numbers for the others; of a Jacobian its columns.

    ``ties`` give others their values.
    """

    def __init__(
        self,
        f: Callable,
        values: Sequence[float],
        free: Sequence[int],
        jacobian: bool = False,
        ties: Ties | None = None,
    ):
        self.f, self.free, self.jacobian, self.ties = f, [*free], jacobian, ties
        self.tied = () if ties is None else tuple(k for k, name in enumerate(ties.names) if name in ties.tied)
        self.values = [0.0 if k in self.free else float(value) for k, value in enumerate(values)]
        self.__name__ = function_name(f)

    def every(self, params: Sequence) -> list:
        """All parameters of ``f``."""
        every: list = [*self.values]
        for k, value in zip(self.free, params, strict=True):
            every[k] = value
        return every if self.ties is None else self.ties.complete(every)

    def __call__(self, x, *params):
        found = self.f(x, *self.every(params))
        if not self.jacobian or found is None:
            return found
        if jnp.shape(found)[1:] != (len(self.values),):  # JAX would take what there is for the columns that there are not
            raise ModelShapeError(
                f"jac returned an array of shape {jnp.shape(found)}: it must have a column for each of {len(self.values)} "
                "parameters, those held among them"
            )
        if self.ties is None:
            return found[:, np.array(self.free)]
        return found @ jax.jacfwd(lambda params: jnp.stack(self.every(params)))(jnp.stack(params))


def held(f: Callable, jac: Callable | None, values: Sequence[float], free: Sequence[int], ties: Ties | None = None):
    """The model and its Jacobian as functions of the parameters at the places ``free``; those that are tied follow."""
    ties = ties if ties is not None and ties.tied else None
    if len(free) == len(values) and ties is None:
        return f, jac
    return FixedParameters(f, values, free, ties=ties), jac and FixedParameters(jac, values, free, True, ties)


def own_function(f: Any) -> Any:
    """The user's function, whatever is held or tied of it."""
    return f.f if isinstance(f, FixedParameters) else f


def _rules(f) -> list[Callable]:
    """The user's functions that a model is made of, and that tie its parameters."""
    ties = getattr(f, "ties", None)
    own = [*getattr(own_function(f), "own_functions", ())]
    return own + [rule for rule in ties.expr.values() if callable(rule)] if isinstance(ties, Ties) else own


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


def coordinate_names(f: Callable) -> tuple[str, tuple[str, ...]]:
    """What a model calls x, and its parts, as in ``q, t = x``: where it does so once, and binds no name a second time."""
    try:
        name = next(iter(inspect.signature(f).parameters), "x")
    except (TypeError, ValueError):  # builtins have no signature
        return "x", ()
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(f))).body[0]
    except (OSError, TypeError, SyntaxError):  # not in a file; an object; a lambda in the middle of an expression
        return name, ()
    if not isinstance(body, ast.FunctionDef):
        return name, ()
    bound = [node.id for node in ast.walk(body) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    parts = [
        tuple(each.id.strip("_") if isinstance(each, ast.Name) else "" for each in node.targets[0].elts)
        for node in body.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id == name
        if len(node.targets) == 1 and isinstance(node.targets[0], ast.Tuple)
    ]
    certain = len(parts) == 1 and name not in bound and all(bound.count(each) == 1 for each in parts[0])
    return name, parts[0] if certain else ()


def evaluate(model: Model, x, params):
    """``f(x, *params)`` in float64; call inside ``float64()``."""
    return _real(model.f(x, *params), _called(model.f))


def evaluate_jac(model: Model, x, params):
    """``jac(x, *params)`` in float64, shape as the user returns it."""
    assert model.jac is not None
    return _real(model.jac(x, *params), "jac")


def _real(value, name):
    if value is None:
        raise ModelError(f"{name} returned None: does it lack a return statement?")
    try:
        value = jnp.asarray(value)
    except (TypeError, ValueError) as err:
        raise ModelError(f"{name} returned {type(value).__name__}, which is not an array of numbers: {err}") from None
    if jnp.iscomplexobj(value):
        raise ModelError(f"{name} returned complex values: return real ones, such as jnp.abs or jnp.real of them")
    return value.astype(jnp.float64)


def _called(f):
    return f"the model {function_name(f)}"


class ModelError(TypeError):
    """A model that cannot be evaluated on arrays, and what to change."""


@contextmanager
def advice(model: Model, is_jac: bool = False):
    """Turn what JAX raises while it traces the user's function into one error that says what to change and where."""
    function = model.jac if is_jac else model.f
    name = "jac" if is_jac else _called(function)
    try:
        yield
    except _BRANCHED as err:
        if isinstance(err, ValueError) and "truth value" not in str(err):
            raise
        reason, change = "branches in Python on a value (if, while, and, or, min, max, a boolean index)", BRANCH_ADVICE
        place = _place(err, function)
    except _CONCRETE as err:
        if not isinstance(err, jax.errors.JAXTypeError) and "scalar arrays" not in str(err):
            if isinstance(err, ModelError) or not is_jac:  # of a model, others may know more
                raise
            raise ModelError(f"`jac` cannot be evaluated: {err}. It must be jac(x, *params) -> (n, p)") from None
        reason, change, place = "needs concrete values, as NumPy and math functions do", NUMPY_ADVICE, _place(err, function)
    else:
        return
    raise ModelError(f"{name} {reason}{place}: {change}") from None


_BRANCHED = (jax.errors.TracerBoolConversionError, jax.errors.NonConcreteBooleanIndexError, ValueError)
_CONCRETE = (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError, TypeError)


def _place(err, function):
    """The line of the user's file at which an error was raised, as text."""
    function = own_function(function)
    code = getattr(function, "__code__", None)
    frames = [frame for frame in traceback.extract_tb(err.__traceback__) if code and frame.filename == code.co_filename]
    return f" (line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


class ModelShapeError(ValueError):
    """A model does not return one value per point."""


def check_shape(model: Model, found: tuple[int, ...], n: int) -> None:
    """One value per point; a scalar stands for the same value at all of them."""
    if found not in ((n,), ()):
        raise ModelShapeError(
            f"{_called(model.f)} returned an array of shape {found} when tried on {n} points: it must return shape "
            f"({n},), one value per point"
        )


def not_of_any_length(model: Model, n: int, err: Exception) -> ModelShapeError:
    """What to say where the model fails with ``err`` on ``n`` of the points."""
    why = str(err).rstrip(".")
    return ModelShapeError(
        f"{_called(model.f)} cannot be evaluated on {n} of the points{_place(err, model.f)}: {why}. It must be pointwise, "
        "taking any number of points at once. An array of the data's length that it closes over becomes a coordinate: "
        "xdata=(x, w), and the model gets x, w of the same points"
    )


def check_jac_shape(found: tuple[int, ...], n: int, n_params: int) -> None:
    if found != (n, n_params):
        raise ModelShapeError(
            f"jac returned an array of shape {found} when tried on {n} points: it must return shape ({n}, {n_params}), "
            "one row per point and one column per parameter"
        )
