"""Many starts at once on a small sample: a bounded Levenberg-Marquardt iteration from each, in one compiled loop.

The step is damped in the units of the columns of J and cut off at the bounds; damping as in K. Madsen et al., "Methods
for Non-Linear Least Squares Problems", 2004, section 3.2.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ..model.function import Model
from .blocks import KernelSpec
from .rows import build_sweep
from .rules import EPS

LINEAR_STEPS = 2  # of a screening: one to solve for the linear parameters, one for those that a bound then leaves
DAMPING_START, DAMPING_END = 1e-2, 1e12  # of the unit diagonal, K. Madsen et al. 2004, section 3.2
DAMPING_CUT, DAMPING_RISE = 5.0, 4.0
SETTLED = 1e-8  # relative reduction of the cost at which a screened start has arrived


def screen_kernel(model: Model, spec: KernelSpec):
    """Compiled ``(starts, f_scale, block, lower, upper, linear, steps) -> params (k, p), costs (k,), grams (k, p+1, p+1)``.

    A bounded Levenberg-Marquardt iteration from each of the ``starts`` (k, p) at once, on one small block: ``steps``
    trials at most, the first of which on the ``linear`` (p,) parameters alone. The cost is inf where the model is not
    finite at the start.
    """
    return model.get(("screen", spec), lambda: model.jit(_build_screen(model, spec)))


def _build_screen(model, spec):
    sweep = jax.vmap(build_sweep(model, spec), in_axes=(0, None, None))
    propose = jax.vmap(_damped_step, in_axes=(0, 0, 0, None, None, None))

    def screen(starts, f_scale, block, lower, upper, linear, steps):
        k, p = starts.shape
        linear_steps = jnp.where(jnp.any(linear), LINEAR_STEPS, 0)

        def unfinished(state):
            i, settled = state[0], state[-1]
            return (i < steps) & ~jnp.all(settled)

        def advance(state):
            i, trial, params, costs, grams, damping, settled = state
            trial_grams, trial_costs, _ = sweep(trial, f_scale, block)
            finite = jnp.isfinite(trial_costs) & jnp.all(jnp.isfinite(trial_grams), axis=(1, 2))
            trial_costs = jnp.where(finite, trial_costs, jnp.inf)
            better = (trial_costs < costs) & ~settled
            small = better & (costs - trial_costs <= SETTLED * costs)
            params = jnp.where(better[:, None], trial, params)
            grams = jnp.where(better[:, None, None], trial_grams, grams)
            costs = jnp.where(better, trial_costs, costs)
            separate = i < linear_steps  # the linear parameters alone, undamped: exact in one step
            damping = jnp.where(better, damping / DAMPING_CUT, damping * DAMPING_RISE)
            damping = jnp.where(i <= linear_steps, DAMPING_START, damping)
            settled = settled | ((i > linear_steps) & (small | (damping > DAMPING_END))) | jnp.isinf(costs)
            used = jnp.where(separate, jnp.full(k, EPS**0.75), damping)
            trial = propose(params, grams, used, lower, upper, linear | ~separate)
            return i + 1, trial, params, costs, grams, damping, settled

        grams = jnp.zeros((k, p + 1, p + 1))
        start = (0, starts, starts, jnp.full(k, jnp.inf), grams, jnp.full(k, DAMPING_START), jnp.zeros(k, bool))
        return lax.while_loop(unfinished, advance, start)[2:5]

    return screen


def _damped_step(params, gram, damping, lower, upper, movable):
    """Levenberg-Marquardt step on the parameters (p,) that may move and that no bound holds, cut off at the bounds."""
    p = len(params)
    g = gram[:p, p]
    held = ((params <= lower) & (g > 0)) | ((params >= upper) & (g < 0))
    free = movable & ~held
    D = jnp.sqrt(jnp.diag(gram)[:p])
    D = jnp.where(D > 0, D, 1.0)
    normal = jnp.where(free[:, None] & free, gram[:p, :p] / jnp.outer(D, D), 0.0) + jnp.diag(jnp.where(free, damping, 1.0))
    step = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(normal), True), jnp.where(free, -g / D, 0.0)) / D
    return jnp.clip(params + step, lower, upper)
