"""What a fit or a map needs, by hand. That no process takes more is tested where it streams, and measured in benchmarks."""

import dask
import dask.array as da
import numpy as np
import pytest
import zarr

from dask_nlsq import plan_fit
from dask_nlsq.data.align import build_data
from dask_nlsq.data.sizes import sizes_of
from dask_nlsq.memory.machine import MAPPED_FROM
from dask_nlsq.memory.needs import (
    BOOLEANS,
    FACTOR_COPIES,
    GRAPH_BYTES,
    KEPT_ARRAYS,
    LANE_BYTES,
    MADE_BYTES,
    MAP_PER_PAIR,
    MAP_PER_PARAM,
    MAP_START,
    READ_AHEAD,
    READ_COPIES,
    SAMPLE_COPIES,
    SAMPLE_POINTS,
    SMALL_ARRAYS,
    START_BYTES,
    START_PER_PARAM,
    STREAM_ARRAYS,
    Sizes,
    needs,
)

N = 10**7
SIZES = Sizes(
    n_points=N, n_params=3, n_operands=3, n_chunks=10, n_runs=10, longest=(10**6,) * 10, nbytes=12 * N, read=12,
    held=1.3e8, sent=1.4e8,
)  # fmt: skip
RUN = READ_COPIES * 12e6 + SMALL_ARRAYS * MAPPED_FROM
KEPT = STREAM_ARRAYS * MAPPED_FROM


def test_a_fit_that_streams_has_a_run_for_each_thread_and_those_that_are_read_ahead():
    found = needs(SIZES, "streaming")
    assert found.held == 0
    assert found.in_flight(2) == (2 + READ_AHEAD) * RUN + KEPT
    assert found.start == START_BYTES + 3 * START_PER_PARAM + 10 * GRAPH_BYTES
    assert found.working(2) == found.start + found.in_flight(2) + 2 * found.scratch


def test_what_malloc_keeps_comes_in_the_place_of_the_sample():
    sizes = SIZES._replace(n_operands=9)
    sample = SAMPLE_COPIES * 8 * SAMPLE_POINTS * 9
    assert needs(sizes, "streaming").in_flight(2) == (2 + READ_AHEAD) * RUN + sample
    assert needs(sizes, "streaming", on_workers=True).in_flight(1) == (1 + READ_AHEAD) * RUN + KEPT


def test_each_thread_of_a_worker_reads_ahead_for_itself():
    found = needs(SIZES, "streaming", on_workers=True)
    assert found.in_flight(2) == 2 * ((1 + READ_AHEAD) * RUN + KEPT)
    assert found.start == START_BYTES + 3 * START_PER_PARAM


def test_blocks_of_held_data_are_counted_once():
    here, there = needs(SIZES, "standard"), needs(SIZES, "chunked", on_workers=True)
    assert (here.held, there.held) == (1.3e8, 1.4e8)
    assert here.in_flight(2) == there.in_flight(2) == 2 * (RUN - 12e6)


def test_one_long_run_is_in_memory_once_and_not_in_each_thread():
    sizes = SIZES._replace(longest=(40 * 10**6, *[10**6] * 9))
    assert needs(sizes, "streaming").in_flight(2) == pytest.approx(
        40 * READ_COPIES * 12e6 + SMALL_ARRAYS * MAPPED_FROM + 3 * RUN + KEPT
    )


def test_fewer_runs_than_threads_are_in_memory_once():
    assert needs(SIZES._replace(longest=(10**6,)), "streaming").in_flight(8) == RUN + KEPT


def test_arrays_in_memory_are_not_read_but_their_masks_are_checked():
    found = needs(SIZES._replace(read=0.0, checked=True))
    assert found.in_flight(2) == 2 * BOOLEANS * 10**6
    assert needs(SIZES._replace(checked=True)).in_flight(1) == RUN - 12e6 + BOOLEANS * 10**6


def test_values_that_are_passed_on_are_those_of_the_runs_that_are_in_memory():
    sizes = SIZES._replace(passed=(1e7, 2e7, 3e7, 4e7), making=5e6)
    assert needs(sizes, "streaming").in_flight(2) == 4 * RUN + KEPT + 4e7 + 5e6
    assert needs(sizes, "streaming").in_flight(8) == 10 * RUN + KEPT + 4e7 + 5e6
    assert needs(sizes, "streaming", on_workers=True).in_flight(2) == 6 * RUN + 2 * (KEPT + 3e7 + 5e6)
    assert needs(sizes, "chunked", on_workers=True).in_flight(2) == 2 * (RUN - 12e6 + 1e7 + 5e6)


def test_values_that_all_chunks_need_are_in_each_process():
    for strategy in ("standard", "streaming"):
        more = needs(SIZES._replace(shared=5e7), strategy).working(2) - needs(SIZES, strategy).working(2)
        assert more == pytest.approx(5e7)


def test_a_model_of_all_points_at_once_has_the_rows_of_all():
    found = needs(SIZES._replace(whole=True, factor=100))
    assert found.scratch == 8 * 8 * 4 * N + FACTOR_COPIES * 100
    assert found.held == SIZES.held + 100


def test_a_map_has_its_operands_and_weights_in_float64_beside_what_is_read():
    found = needs(SIZES._replace(read=4, lanes=2 * LANE_BYTES, longest=(2**22,) * 2, held=3e8))
    block = READ_COPIES * 4 * 2**22 + SMALL_ARRAYS * MAPPED_FROM + 2 * LANE_BYTES * 2**22
    assert found.in_flight(2) == 2 * block
    assert found.start == MAP_START + 3 * MAP_PER_PARAM + 9 * MAP_PER_PAIR + 10 * GRAPH_BYTES
    assert found.held == 3e8


# ---------------------------------------------------------------------------------------------------------------------
# sizes of arrays


@pytest.fixture
def chunks_stay_apart(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)
    with dask.config.set({"nlsq.threads": 2}):
        yield


def line(n=4000, chunk=100, dtype="f8"):
    return da.linspace(0, 1, n, chunks=chunk, dtype=dtype)


def sizes(x, y, **options):
    return sizes_of(build_data(x, y, check=True, omit=False, **options), 3)


@pytest.mark.parametrize(
    "x, y, shared, passed",
    [
        (line(), line() + 1, 0, ()),
        # pieces of 150: run k needs those at 100 k and at 100 k + 99; run 1 two of them, runs 1 to 3 also the next
        (line(chunk=150), line(), 0, (2 * 1200, 2 * 1200, 3 * 1200, 4 * 1200)),
        (line(), line(chunk=1000).rechunk(100), 0, (8000, 16000, 16000, 16000)),
        (np.arange(4000), line(chunk=1000).rechunk(130), 0, (16000, 16000, 16000, 16000)),
        (line(), line(chunk=4000).rechunk(100), 32000, ()),
        (line(dtype="f4"), line() - line().mean(), 800, ()),  # a number, but as far as one can tell as long as a piece
        (line(60)[:, None], da.ones((60, 50), chunks=(100, 10)), 60 * 8, ()),
    ],
    ids=["alike", "other chunks", "split", "split unevenly", "split from one", "mean", "axis"],
)
def test_what_chunks_share_is_known_beforehand(chunks_stay_apart, x, y, shared, passed):
    found = sizes(x if y.ndim == 1 else (x,), y)
    assert (found.shared, found.passed) == (shared, passed)


def test_each_operand_counts_with_its_own_dtype(chunks_stay_apart):
    found = sizes(line(), line(dtype="f4"), mask=da.zeros(4000, chunks=300, dtype=bool), sigma=line(chunk=200, dtype="f4"))
    assert found.passed[0] == 300 + 200 * 4
    assert found.checked and found.longest == (100,) * 40


def test_data_made_by_tasks_have_steps_in_float64_and_stored_ones_have_not(chunks_stay_apart):
    stored = zarr.create_array(store={}, shape=(4000,), chunks=(100,), dtype="u2")
    assert sizes(np.arange(4000.0), da.from_zarr(stored, name="array-1")).read == 10
    assert sizes(line(), (line() + 1).astype("f4")).read == MADE_BYTES


def test_freed_memory_stays_with_a_process_that_has_room_for_it():
    x, y = (da.zeros(10**8, chunks=4 * 10**6) for _ in range(2))
    wide = plan_fit(lambda x, a: a * x, x, y, [1], strategy="streaming")
    within = (wide.peak_bytes - wide.places[0].now - 1e8) / 2**30
    tight = plan_fit(lambda x, a: a * x, x, y, [1], strategy="streaming", memory_limit_gb=within)
    assert (wide.keeps, tight.keeps) == (True, False)
    beside = [plan.peak_bytes - plan.places[0].now for plan in (wide, tight)]
    assert beside[0] - beside[1] == pytest.approx(KEPT_ARRAYS * 2**25)
    assert not plan_fit(lambda x, a: a * x, x, y, [1], strategy="chunked").keeps
