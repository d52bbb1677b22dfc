"""What a fit tells while it runs: the user's callback, a progress bar, printed lines."""

import sys
import time

from tqdm.auto import tqdm

from .trust_region import Record

PROGRESS_DELAY = 2.0  # seconds: unless asked for, quicker fits show no progress bar


class Observers:
    """The callback of the solver: tells the user's callback, a progress bar and the terminal what a step did.

    A context manager; leaving it closes the bar.
    """

    def __init__(self, callback, progress: bool | None, verbose: int):
        self.callback, self.verbose, self.bar = callback, verbose, None
        wanted = progress or (progress is None and verbose == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules))
        self.started = time.perf_counter()
        self.bar_after = (0.0 if progress else PROGRESS_DELAY) if wanted else float("inf")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.bar is not None:
            self.bar.close()

    def reading(self, share: float, gb_per_s: float, left: float):
        """While a sweep reads the data anew: how much of it is done, how fast, and the seconds that are left."""
        if self.bar is None and time.perf_counter() - self.started > self.bar_after:
            self.bar = tqdm(desc="curve_fit", unit=" sweeps")
        if self.bar is not None:
            self.bar.set_postfix_str(f"reading {share:.0%}, {gb_per_s:.2g} GB/s, {left:.0f} s left", refresh=False)
            self.bar.update(0)

    def __call__(self, record: Record):
        if self.verbose == 2:
            _print_record(record)
        if self.bar is None and record.seconds > self.bar_after:
            self.bar = tqdm(desc="curve_fit", unit=" sweeps", initial=record.nfev - 1)
        if self.bar is not None:
            self.bar.set_postfix(cost=f"{record.cost:.6g}", optimality=f"{record.optimality:.1e}", refresh=False)
            self.bar.update()
        if self.callback is not None:
            self.callback(record)


def _print_record(record: Record):
    if record.iteration == 0:
        columns = ("Iteration", "Sweeps", "Cost", "Cost reduction", "Step norm", "Optimality", "Reduction", "Seconds")
        print("".join(f"{column:^15}" for column in columns))
    step = ("", "") if record.iteration == 0 else (f"{record.actual:.2e}", f"{record.step_norm:.2e}")
    values = (record.iteration, record.nfev, f"{record.cost:.6e}", *step, f"{record.optimality:.2e}", record.reduction)
    print("".join(f"{value!s:^15}" for value in (*values, f"{record.seconds:.2f}")))
