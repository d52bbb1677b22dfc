"""Where a grouped fit holds its data, and the memory that this takes: decided from sizes, before any data are read."""

from math import prod

from ..base.lazy import da
from ..base.text import size
from ..kernels.groups import GroupSpec
from ..maps.blocks import MapProblem
from ..memory.machine import active_client
from ..memory.plan import MemoryBudgetError, Plan, Strategy, least_limit
from ..memory.processes import room_here, rooms_of_workers

NUMBERS_OF_A_GROUP = 13  # that a group has besides: status, cost and such
NUMBERS_OF_A_PIECE = 6  # cost, points and such, beside its matrix
HELD_SHARE = 0.5  # of the memory that there is, which data that are held may take


def plan_groups(problem: MapProblem, spec: GroupSpec, call) -> Plan:
    """The plan, with the arguments of `dask_nlsq.fit_groups`.

    Raises
    ------
    MemoryBudgetError
        Where what has to stay does not fit.
    """
    n_locals, n_shared, n_params = len(spec.locals.free), len(spec.shared), len(problem.fit.names)
    n_groups, y = problem.plan.n_pixels, problem.y
    numbers = n_params * (1 + n_locals) + n_locals * (n_shared + 1 + 3 * n_locals) + NUMBERS_OF_A_GROUP
    states = 2 * 8 * numbers * n_groups  # at the accepted point and at a trial
    if problem.in_pieces:
        pieces = prod(y.numblocks[k] for k in problem.fit.fit_axes)
        states += 8 * n_groups * pieces * ((n_locals + n_shared + 1) ** 2 + NUMBERS_OF_A_PIECE)
    arrays = [y, *(each.array for each in problem.operands.values())]
    data = sum(each.nbytes for each in arrays)
    client = None if call.strategy == "standard" else active_client()
    rooms = (rooms_of_workers(client, call.memory_limit_gb) if client else []) or [room_here(call.memory_limit_gb)]
    room = sum(each.nbytes for each in rooms)
    working = max(0.0, problem.plan.peak_bytes - max(each.base for each in rooms)) * len(rooms)  # of the blocks in hand
    fits = data + states < HELD_SHARE * room and data + states + working < room
    held = fits if call.strategy == "auto" else call.strategy != "streaming"
    strategy: Strategy = "standard" if client is None and call.strategy != "chunked" else "chunked"
    strategy = strategy if held else "streaming"
    if (needed := states + data * held) > room:
        limit = least_limit(rooms, lambda rooms: needed <= sum(each.nbytes for each in rooms))
        ways = [] if limit is None else [f"raise memory_limit_gb to {limit}"]
        ways += ['use strategy="streaming", which does not hold the data'] if held and states < room else []
        raise MemoryBudgetError(
            f"the groups take {size(needed)} between the sweeps, {size(states)} of them for their local parameters; "
            f"{size(room)} are available",
            *ways,
            "fit a part of the groups",
            "use more workers",
        )
    what = f"the data take {size(data)}, the groups' local parameters {size(states)}, of {size(room)}"
    reason = f"the data stay in memory: {what}" if held else f"the data are read again in each sweep: {what}"
    reason += "; the groups are too large to be joined, so they are read in pieces" if problem.in_pieces else ""
    n_blocks, share = problem.plan.n_blocks, (states + data * held) / len(rooms)
    return Plan(
        strategy=strategy,
        reason=reason,
        n_points=y.size,
        n_params=n_shared + n_locals * n_groups,
        n_chunks=y.npartitions if isinstance(y, da.Array) else 1,
        n_partitions=n_blocks,
        sweep_bytes=problem.plan.read_bytes,
        held_bytes=int(states + data * held),
        in_flight_bytes=int(working / sum(each.n_threads for each in rooms)),
        places=tuple(
            each.place(share, share + working / len(rooms))
            for each in [*([] if client is None else [room_here(None)]), *rooms]
        ),
        decoded=problem.plan.decoded,
    )
