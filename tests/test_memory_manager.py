"""MemoryManager: aligned arrays from a pool, and reservations, with real threads."""

import gc
import math
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq import MemoryBudget, MemoryManager, clear_memory_pool, get_memory_manager, get_memory_stats
from dask_nlsq.memory.pool import size_class

GB = 2**30
MB = 2**20
SECONDS = 20  # until a thread that should have ended counts as stuck


def start(target, *args):
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def finish(*threads):
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a thread is stuck"


def elsewhere(function):
    """What another thread gets from ``function``."""
    found = []
    finish(start(lambda: found.append(function())))
    return found[0]


def freed(manager, *sizes):
    """The manager with buffers of these sizes in its pool."""
    for array in [manager.allocate_array(size, np.uint8) for size in sizes]:
        manager.free_array(array)
    return manager


def in_a_circle(array):
    """The buffer of an array that only the garbage collector can drop."""
    circle = [array]
    circle.append(circle)
    return weakref.ref(array.base)


# ---------------------------------------------------------------------------------------------------------------------
# arrays


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((), np.float64), (1, "S3"), (7, "u2"), ((3, 5), "f4"), ((1000, 10), np.float64), ((1000, 10), ">f8"), ((0,), bool),
        ((0, 4), np.float64), ((2**17 + 1,), bool), ((2**17 + 1,), "c16"), (7, [("a", "i4"), ("b", "f8")]), ((3, 5), "S3"),
    ],
)  # fmt: skip
def test_arrays_start_on_a_cache_line_and_are_zero(shape, dtype):
    manager = MemoryManager()
    for _ in range(2):  # new and reused
        array = manager.allocate_array(shape, dtype)
        assert array.shape == (shape if isinstance(shape, tuple) else (shape,))
        assert array.dtype == np.dtype(dtype)
        assert array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous and array.flags.writeable
        assert array.tobytes() == bytes(array.nbytes)
        array.reshape(-1).view(np.uint8)[:] = 255
        manager.free_array(array)
    assert manager.get_memory_stats()["reused"] == 1


def test_xla_takes_an_array_without_a_copy():
    array = MemoryManager().allocate_array(5000, "f4")
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
    assert float(jnp.sum(jax.device_put(array))) == 0


def test_a_freed_buffer_is_used_again():
    manager = MemoryManager()
    first = manager.allocate_array((1000, 10))
    manager.free_array(first)
    second, third = (manager.allocate_array((9800,)) for _ in range(2))
    assert second.ctypes.data == first.ctypes.data != third.ctypes.data
    stats = manager.get_memory_stats()
    assert (stats["allocations"], stats["reused"], stats["pool_arrays"]) == (3, 1, 0)


def test_the_smallest_buffer_that_fits_is_taken():
    manager = MemoryManager()
    small, large = (manager.allocate_array(n, np.uint8) for n in (10_240, 12_288))
    manager.free_array(large)
    manager.free_array(small)
    again = [manager.allocate_array(10_000, np.uint8).ctypes.data for _ in range(2)]
    assert again == [small.ctypes.data, large.ctypes.data]


def test_a_large_buffer_is_not_spent_on_a_small_array():
    manager = freed(MemoryManager(), 800_000)
    assert manager.allocate_array(560_000, np.uint8).size == 560_000
    assert manager.get_memory_stats()["reused"] == 0


def test_at_most_a_64th_of_a_new_buffer_is_spare():
    sizes = np.unique(np.concatenate([np.arange(1, 3000), np.geomspace(3000, 2**45, 4000).astype(np.int64)]))
    for nbytes in sizes.tolist():
        assert nbytes <= size_class(nbytes) <= max(nbytes * 65 / 64, nbytes + 63)
        assert size_class(size_class(nbytes)) == size_class(nbytes)
    assert size_class(0) == 64


def test_live_arrays_of_any_thread_never_share_memory():
    manager, spoiled, done = MemoryManager(limit_bytes=64 * MB), [], []

    def work(seed):
        rng, live = np.random.default_rng(seed), []
        for k in range(400):
            array = manager.allocate_array(int(rng.integers(1, 5000)), np.int64, zero=bool(rng.integers(2)))
            array[:] = seed * 1000 + k
            live.append((array, seed * 1000 + k))
            if len(live) > 4:
                array, pattern = live.pop(int(rng.integers(len(live))))
                if not (array == pattern).all():
                    spoiled.append((seed, k))
                if k % 7:
                    manager.free_array(array)
            if k % 50 == 0:
                manager.clear_pool()
        done.append(seed)

    finish(*[start(work, seed) for seed in range(6)])
    assert sorted(done) == [*range(6)] and not spoiled
    stats = manager.get_memory_stats()
    assert stats["allocations"] == 2400 and stats["reused"] > 1000


def test_only_allocated_arrays_are_freed_and_each_once():
    manager, foreign = MemoryManager(), MemoryManager().allocate_array(100)
    own, old = manager.allocate_array(100), manager.allocate_array(50)
    manager.free_array(old)
    again = manager.allocate_array(50)  # in the buffer of the old one
    assert again.base is old.base
    views = [own[1:], own[:], own.view("i8"), own.reshape(10, 10), own.base]
    for wrong in (foreign, np.zeros(100), np.zeros(100)[5:], [1.0], None, old, *views):
        with pytest.raises(ValueError, match="freed before, is a view of one, or was not allocated by this MemoryManager"):
            manager.free_array(wrong)
    manager.free_array(own)
    manager.free_array(again)
    with pytest.raises(ValueError, match="once"):
        manager.free_array(again)


def test_a_dropped_array_takes_its_memory_along_but_not_from_under_a_view():
    manager = MemoryManager(limit_bytes=32 * MB)
    array = manager.allocate_array(2 * MB)
    view, buffer = array[10:20], weakref.ref(array.base)
    view[:] = 7
    del array
    assert buffer() is not None
    assert manager.get_available_memory() == 16 * MB
    assert (view == 7).all()
    del view
    assert buffer() is None
    assert manager.get_available_memory() == 32 * MB
    assert manager.get_memory_stats()["pool_arrays"] == 0


def test_an_array_freed_by_the_garbage_collector_does_not_lock_up():
    manager = MemoryManager()

    class Holder:
        def __init__(self):
            self.array, self.itself = manager.allocate_array(1000), self

        def __del__(self):
            manager.free_array(self.array)

    def work():
        for _ in range(300):
            Holder()
            manager.allocate_array(10)
            gc.collect(0)

    finish(start(work), start(work))
    gc.collect()  # while the manager is there
    assert manager.get_memory_stats()["reused"] > 100


@pytest.mark.parametrize(
    "shape, dtype, error",
    [
        ((-1,), float, ValueError), (2.5, float, TypeError), ("3", float, TypeError), (None, float, TypeError),
        (3, object, TypeError), (3, [("a", "O")], TypeError), (3, "no such", TypeError),
    ],
)  # fmt: skip
def test_shapes_and_dtypes_without_meaning_are_refused(shape, dtype, error):
    with pytest.raises(error):
        MemoryManager().allocate_array(shape, dtype)


def test_too_large_an_array_is_a_memory_error_that_says_how_much_is_missing():
    manager = MemoryManager(limit_bytes=GB)
    with pytest.raises(MemoryError, match=r"2\.00 GiB are needed, 1\.00 GiB available, 1\.00 GiB missing"):
        manager.allocate_array((2**28,))
    with pytest.raises(MemoryError, match="missing"):
        MemoryManager().allocate_array((10**7, 10**7))
    manager.allocate_array(100)


def test_temporary_arrays_go_back_to_the_pool_after_errors_too():
    manager = MemoryManager()
    with manager.temporary_allocation((10, 5), dtype="f4") as array:
        assert array.shape == (10, 5) and array.dtype == "f4"
    with pytest.raises(KeyError), manager.temporary_allocation((10, 5), "f4") as again:
        assert again.ctypes.data == array.ctypes.data
        raise KeyError
    assert manager.get_memory_stats()["pool_arrays"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# the pool


def test_the_largest_buffers_are_kept():
    manager = freed(MemoryManager(), 1024, 4096, 2048, 4096, 65536)
    manager.optimize_memory_pool(max_arrays=3)
    stats = manager.get_memory_stats()
    assert (stats["pool_arrays"], stats["pool_memory_gb"] * GB) == (3, 4096 + 4096 + 65536)
    manager.clear_pool()
    assert manager.get_memory_stats()["pool_memory_gb"] == 0


def test_the_pool_is_bounded():
    manager = freed(MemoryManager(), *range(1000, 400_000, 1000))
    assert manager.get_memory_stats()["pool_arrays"] == 100
    limited = freed(MemoryManager(limit_bytes=4 * MB), *[MB // 2] * 4)
    assert limited.get_memory_stats()["pool_memory_gb"] * GB <= MB


def test_the_pool_makes_room_for_new_arrays_and_reservations():
    for take in (lambda manager: manager.allocate_array(4 * MB, np.uint8), lambda manager: reserve(manager, 4 * MB)):
        manager = freed(MemoryManager(gc_threshold=1.0, limit_bytes=4 * MB), MB // 2, MB // 2)
        assert manager.get_available_memory() == 4 * MB
        kept = take(manager)
        assert manager.get_memory_stats()["pool_arrays"] == 0, kept


def reserve(manager, nbytes):
    with manager.memory_guard(nbytes):
        return nbytes


def test_pressure_empties_the_pool_and_collects_garbage():
    manager = freed(MemoryManager(gc_threshold=0.7, limit_bytes=8 * MB), MB // 4)
    buffer = in_a_circle(manager.allocate_array(MB, np.uint8))
    manager.pool.collected = -math.inf  # as if the last collection were long ago
    held = [manager.allocate_array(4 * MB, np.uint8)]
    assert manager.get_memory_stats()["pool_arrays"] == 1
    held += [manager.allocate_array(MB, np.uint8) for _ in range(2)]
    assert manager.get_memory_stats()["pool_arrays"] == 0
    assert buffer() is None


def test_garbage_makes_room_before_an_allocation_fails():
    manager = MemoryManager(limit_bytes=8 * MB)
    in_a_circle(manager.allocate_array(6 * MB, np.uint8))
    assert manager.allocate_array(6 * MB, np.uint8).nbytes == 6 * MB


def test_reuse_spares_the_page_faults():
    def fastest(function):
        seconds = []
        for _ in range(9):
            begin = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    manager, n = MemoryManager(), 8 * MB

    def pooled():
        with manager.temporary_allocation(n, zero=False) as array:
            array[::512] = 1

    def fresh():
        np.empty(n)[::512] = 1

    pooled()
    assert fastest(pooled) < fastest(fresh) / 3


# ---------------------------------------------------------------------------------------------------------------------
# statistics


def test_statistics_add_up():
    manager = MemoryManager()
    assert manager.get_memory_stats()["efficiency"] == 1.0
    kept = manager.allocate_array((2 * MB,), zero=True)
    kept[:] = 1
    for _ in range(9):
        manager.free_array(manager.allocate_array((10_000, 100)))
    stats = manager.get_memory_stats()
    assert stats["allocations"] == 10 and stats["reused"] == 8 and stats["pool_arrays"] == 1
    assert stats["total_requested_gb"] * GB == 16 * MB + 9 * 8_000_000
    assert stats["total_used_gb"] * GB == 16 * MB + 9 * size_class(8_000_000)
    assert stats["efficiency"] == stats["total_requested_gb"] / stats["total_used_gb"]
    assert 8 / 9 <= stats["efficiency"] <= 1
    assert 0 < stats["usage_fraction"] < 1
    assert stats["current_usage_gb"] * GB > kept.nbytes
    assert stats["pool_memory_gb"] * GB == size_class(8_000_000)


def test_the_peak_outlives_the_array():
    manager = MemoryManager()
    before = manager.get_memory_stats()["current_usage_gb"] * GB
    array = np.ones(12 * MB)
    manager.get_memory_stats()
    del array
    stats = manager.get_memory_stats()
    assert stats["peak_usage_gb"] * GB >= before + 90 * MB
    assert stats["peak_usage_gb"] >= stats["current_usage_gb"]


def test_the_shared_manager_is_one():
    manager = get_memory_manager()
    assert elsewhere(get_memory_manager) is manager
    before = get_memory_stats()["allocations"]
    manager.free_array(manager.allocate_array(10))
    assert get_memory_stats()["allocations"] == before + 1
    clear_memory_pool()
    assert get_memory_stats()["pool_arrays"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# predictions


def test_predictions_by_hand():
    manager = MemoryManager(safety_factor=1.5)
    n, p = 1000, 10
    data, jacobian, normal, vector = 16 * n, 80 * n, 8 * p * p, 8 * n
    assert manager.predict_memory_requirement(n, p, "lm") == 1.5 * (data + jacobian + 2 * vector + normal)
    assert manager.predict_memory_requirement(n, p) == 1.5 * (data + 1.3 * jacobian + 2 * vector + 2 * normal)
    assert manager.predict_memory_requirement(n, p, "dogbox") == 1.5 * (data + 1.3 * jacobian + 3 * vector + 3 * normal)


@pytest.mark.parametrize("n_points, n_params", [(1, 1), (10_000, 20), (10**9, 100)])
def test_predictions_keep_their_order_and_cover_a_budget(n_points, n_params):
    predict = MemoryManager(safety_factor=1).predict_memory_requirement
    lm, trf, dogbox = (predict(n_points, n_params, algorithm) for algorithm in ("lm", "trf", "dogbox"))
    assert lm < trf <= dogbox
    assert trf >= MemoryBudget.compute(n_points, n_params, memory_limit_gb=1).peak_gb * GB


def test_an_unknown_algorithm_is_refused_with_the_known_ones():
    for method in ("predict_memory_requirement", "estimate_chunking_strategy"):
        with pytest.raises(ValueError, match="'lm', 'trf', 'dogbox', not 'newton'"):
            getattr(MemoryManager(), method)(100, 3, "newton")


@pytest.mark.parametrize(
    "n_points, limit, algorithm",
    [
        (1, 0.1, "trf"), (10**6, 0.1, "lm"), (10**6, 4.0, "trf"), (100_000_000, 4.0, "dogbox"),
        (123_456_789, 4.0, "trf"), (123_456_789, 0.1, "dogbox"), (10**11, 0.1, "lm"), (10**11, 4.0, "trf"),
    ],
)  # fmt: skip
def test_chunks_fit_the_limit_and_cover_the_points(n_points, limit, algorithm):
    manager = MemoryManager()
    found = manager.estimate_chunking_strategy(n_points, 5, algorithm=algorithm, memory_limit_gb=limit)
    total = manager.predict_memory_requirement(n_points, 5, algorithm) / GB
    assert found["total_memory_gb"] == total
    assert found["needs_chunking"] == (total > limit) == (found["n_chunks"] > 1)
    assert found["memory_per_chunk_gb"] <= limit
    assert found["chunk_size"] * (found["n_chunks"] - 1) < n_points <= found["chunk_size"] * found["n_chunks"]


@pytest.mark.parametrize("arguments", [dict(gc_threshold=0), dict(gc_threshold=2), dict(safety_factor=0.5),
                                       dict(safety_factor=math.nan), dict(limit_bytes=0), dict(limit_bytes=-1)])  # fmt: skip
def test_a_manager_checks_its_settings(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MemoryManager(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# reservations


@pytest.fixture
def manager():
    return MemoryManager(limit_bytes=100 * MB)


def test_chunks_go_by_what_is_available_without_a_limit(manager):
    assert manager.estimate_chunking_strategy(10**7, 5)["memory_per_chunk_gb"] <= 100 * MB / GB
    with pytest.raises(MemoryError, match="a single point and the memory for all points take"):
        manager.estimate_chunking_strategy(100, 10_000)


@pytest.mark.parametrize(
    "bytes_needed, error", [(0, ValueError), (-1, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_sizes_without_meaning_are_refused(manager, bytes_needed, error):
    for ask in (reserve, MemoryManager.check_memory_availability):
        with pytest.raises(error, match="`bytes_needed`"):
            ask(manager, bytes_needed)


@pytest.mark.slow
def test_more_than_there_is_is_refused_with_numbers_and_a_way_out(manager):
    message = r"200\.00 MiB are needed, 100\.00 MiB available, 100\.00 MiB missing: .*\"chunked\" or \"streaming\""
    for wait in (False, True):
        with pytest.raises(MemoryError, match=message), manager.memory_guard(200 * MB, wait):
            raise AssertionError("entered")
    enough, text = manager.check_memory_availability(200 * MB)
    assert not enough and "missing" in text
    assert manager.check_memory_availability(100 * MB)[0]
    with pytest.raises(MemoryError):
        reserve(MemoryManager(), 2**60)


class Holding:
    """A thread inside a guard."""

    def __init__(self, manager, nbytes, wait=False):
        self.inside, self.leave, self.manager = threading.Event(), threading.Event(), manager
        self.thread = start(self._run, nbytes, wait)

    def _run(self, nbytes, wait):
        with self.manager.memory_guard(nbytes, wait):
            self.inside.set()
            self.leave.wait(SECONDS)

    def __enter__(self):
        assert self.inside.wait(SECONDS)
        return self

    def __exit__(self, *exc):
        self.leave.set()
        finish(self.thread)


def until_waiting(manager, n):
    deadline = time.monotonic() + SECONDS
    while len(manager.pool.waiting) != n:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_reservations_of_other_threads_count(manager):
    with Holding(manager, 60 * MB):
        assert manager.get_available_memory() == 40 * MB
        with pytest.raises(MemoryError, match=r"\(60\.00 MiB are reserved by other threads\)"):
            reserve(manager, 50 * MB)
        with pytest.raises(MemoryError):
            manager.allocate_array(50 * MB, np.uint8)
        reserve(manager, 40 * MB)
    assert manager.get_available_memory() == 100 * MB


def test_a_guard_covers_the_arrays_allocated_in_it(manager):
    with manager.memory_guard(60 * MB):
        assert manager.get_available_memory() == 100 * MB  # to this thread
        array = manager.allocate_array(48 * MB, np.uint8)
        assert elsewhere(manager.get_available_memory) == 40 * MB  # 48 MB taken and 12 MB more reserved
        manager.free_array(array)
    assert manager.get_available_memory() == 100 * MB


def test_an_exception_ends_the_reservation(manager):
    with pytest.raises(KeyError), manager.memory_guard(80 * MB):
        raise KeyError
    with Holding(manager, 100 * MB):
        pass


def test_nested_guards_are_part_of_the_outer_one(manager):
    with manager.memory_guard(80 * MB), manager.memory_guard(80 * MB), manager.memory_guard(90 * MB):
        array = manager.allocate_array(64 * MB, np.uint8)
        assert elsewhere(manager.get_available_memory) == 10 * MB
        with pytest.raises(MemoryError):
            reserve(manager, 110 * MB)
        manager.free_array(array)
    assert manager.get_available_memory() == 100 * MB


def test_waiting_ends_with_the_reservation_in_the_way(manager):
    with Holding(manager, 60 * MB) as first:
        second = Holding(manager, 70 * MB, wait=True)
        assert not second.inside.wait(0.1)
        first.leave.set()
        with second:
            assert manager.get_available_memory() == 30 * MB


def test_arrays_in_a_reservation_come_back_with_it(manager):
    with manager.memory_guard(60 * MB):
        with manager.temporary_allocation(56 * MB, np.uint8):
            second = Holding(manager, 70 * MB, wait=True)
            until_waiting(manager, 1)
        assert not second.inside.is_set()
    with second:
        pass


def test_those_who_wait_are_served_in_order(manager):
    order, threads = [], []

    def work(k):
        with manager.memory_guard((80 if k % 2 else 30) * MB, wait=True):
            order.append(k)
            time.sleep(0.003)

    with Holding(manager, 90 * MB):
        for k in range(8):
            threads.append(start(work, k))
            until_waiting(manager, len(threads))
        assert not order
    finish(*threads)
    assert order == [*range(8)]


@pytest.mark.slow
def test_a_thread_that_holds_a_reservation_does_not_wait_for_another(manager):
    failures, both = [], threading.Barrier(2, timeout=SECONDS)

    def work():
        with manager.memory_guard(50 * MB):
            both.wait()
            try:
                with manager.memory_guard(60 * MB, wait=True):
                    pass
            except MemoryError as err:
                failures.append(err)
            both.wait()

    finish(start(work), start(work))
    assert len(failures) == 2


def test_many_threads_share_what_there_is(manager):
    lock, held, most, done = threading.Lock(), [0], [0], []

    def add(nbytes):
        with lock:
            held[0] += nbytes
            most[0] = max(most[0], held[0])

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(25):
            nbytes = int(rng.integers(1, 100)) * MB
            with manager.memory_guard(nbytes, wait=True):
                add(nbytes)
                time.sleep(0.0002)
                add(-nbytes)
        done.append(seed)

    finish(*[start(work, seed) for seed in range(8)])
    assert len(done) == 8
    assert 50 * MB < most[0] <= 100 * MB
    assert manager.get_available_memory() == 100 * MB
