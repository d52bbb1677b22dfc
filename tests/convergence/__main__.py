"""`python -m tests.convergence [--quick] [name ...]` prints each figure, and below it every failure that it counts.

Names are those of the sets: starts, mgh, generated, poisson, exact, sweeps; all without any. ``--quick`` takes a tenth.
"""

import argparse

from . import exact, generated, mgh, poisson, starts, sweeps
from .figure import show

SETS = {"starts": starts, "mgh": mgh, "generated": generated, "poisson": poisson, "exact": exact, "sweeps": sweeps}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.convergence", description="Print the figures of convergence.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a tenth of each set")
    given = parser.parse_args()
    if unknown := set(given.names) - SETS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: the names are {', '.join(SETS)}")
    for name in given.names or SETS:
        for figure in SETS[name].figures(given.quick):
            show(figure)


if __name__ == "__main__":
    main()
