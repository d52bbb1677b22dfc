"""Is a changed bit found, and does a hostile file get anywhere? ``python -m tests.damage`` draws positions anew each time.

Each kind of file that the package keeps gets flips of single bits, and is read as a user reads it. A flip is silent where
nothing is said and something else comes back than was kept, harmless where the same comes back. Hostile files are the tests
that are marked so: ``make damage`` runs both.
"""

import argparse
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
import zarr

from dask_nlsq import DamagedFileError, GroupResult, curve_fit, fit_groups, fit_map, load, resume
from dask_nlsq.maps.stored import StoredMap
from tests.checkpointed import decay

FLIPS = 500
P0 = [1.0, 1.0, 0.1]
T = np.linspace(0, 5, 400)
LINES = 2 * np.exp(-np.linspace(0.4, 1, 6)[:, None] * T) + 0.3 + 0.01 * np.sin(97 * T)


def flat(value) -> Any:
    """What can be compared of what came back."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, xr.Dataset):
        each = [(str(name), one.dims, flat(one.values), repr(one.attrs)) for name, one in sorted(value.variables.items())]
        return each, repr(value.attrs)
    return repr(value)


def of_result(path) -> list:
    found = load(path)
    return [flat(each) for each in (found.popt, found.pcov, found.factor.R, found.parts.gram, found.to_dict())]


def of_groups(path) -> list:
    return [*of_result(path), repr(load(path).shared.groups), of_stored(load(path).local)]


def of_checkpoint(path) -> list:
    found = resume(path, progress=False)
    local = found.local.compute(progress=False).record if isinstance(found, GroupResult) else None
    return [flat(each) for each in (found.popt, found.pcov, found.nfev, found.message, local)]


def lines_of(path) -> None:
    """Fit the map of `LINES`, which goes on where it is at ``path``."""
    y = xr.DataArray(LINES, dims=("row", "t"), coords=dict(t=T, row=np.arange(6) * 0.5), attrs={"beamline": "P10"})
    fit_map(decay, None, y.chunk(row=2), P0, axis="t").to_zarr(path, resume=True, progress=False)


def of_map(path) -> list:
    lines_of(path)
    return of_stored(StoredMap(path))


def of_stored(maps: StoredMap) -> list:
    every = [flat(getattr(maps, each.parent.name)) for each in sorted(maps.path.glob("*/zarr.json"))]
    return [*every, flat(maps.to_xarray().load())]


def keep_result(folder: Path) -> None:
    curve_fit(decay, T, LINES[0], P0).save(folder / "result")


def keep_checkpoint(folder: Path) -> None:
    zarr.create_array(folder / "y", data=LINES[0], chunks=(100,))
    curve_fit(decay, T, folder / "y", P0, checkpoint=folder / "checkpoint")


def keep_groups(folder: Path) -> None:
    fit_groups(decay, T, LINES, P0, local="a", group_axes=0).save(folder / "groups")


def keep_groups_checkpoint(folder: Path) -> None:
    fit_groups(decay, T, LINES, P0, local="a", group_axes=0, checkpoint=folder / "groups checkpoint")


KEPT: dict[str, tuple[Callable, Callable]] = {  # directory -> what makes it in a folder, and what reads it
    "result": (keep_result, of_result),
    "checkpoint": (keep_checkpoint, of_checkpoint),
    "groups": (keep_groups, of_groups),
    "groups checkpoint": (keep_groups_checkpoint, of_checkpoint),
    "map": (lambda folder: lines_of(folder / "map"), of_map),
}


def kind_of(file: Path, folder: Path) -> str:
    """A kind of file: chunks are of the kind of their array."""
    parts = file.relative_to(folder).parts
    where = parts[: parts.index("c") + 1] if "c" in parts else (*parts[:-1], file.suffix)
    return "/".join(where)


class Flipped(NamedTuple):
    counts: Counter  # by kind of file and verdict
    wrong: list[str]  # what was silent, and errors of other classes


def flip(n: int, seed: int | None = None, names=tuple(KEPT)) -> Flipped:
    """Flip ``n`` bits, one at a time, in each kind of file of these directories in turn."""
    rng = np.random.default_rng(seed)
    with TemporaryDirectory(prefix="dask-nlsq-damage-") as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, work = Path(directory), Path(directory, "work")
        for name in names:
            KEPT[name][0](folder)
        expected = {name: KEPT[name][1](folder / name) for name in names}
        files: dict[str, list[Path]] = {}
        for file in sorted(each for name in names for each in (folder / name).rglob("*") if each.is_file()):
            files.setdefault(kind_of(file, folder), []).append(file)
        kinds = rng.permutation([*files]).tolist()
        counts: Counter = Counter()
        wrong = []
        for k in range(n):
            kind = kinds[k % len(kinds)]
            file = files[kind][rng.integers(len(files[kind]))].relative_to(folder)
            name = file.parts[0]
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(folder / name, work / name)
            content = bytearray((work / file).read_bytes())
            at, bit = int(rng.integers(len(content))), int(rng.integers(8))
            content[at] ^= 1 << bit
            (work / file).write_bytes(content)
            try:
                verdict = "harmless" if KEPT[name][1](work / name) == expected[name] else "silent"
            except DamagedFileError as err:
                verdict = "found" if str(work) in str(err) else "found, without the file"
            except Exception as err:  # of any class, to be counted
                verdict = f"{type(err).__name__}: {err}".partition("\n")[0]
            counts[kind, verdict] += 1
            if verdict not in ("found", "harmless"):
                wrong.append(f"{file}, byte {at}, bit {bit}: {verdict}")
    return Flipped(counts, wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=FLIPS)
    parser.add_argument("--seed", type=int, help="another one each time if not given")
    given = parser.parse_args()
    counts, wrong = flip(given.flips, given.seed)
    kinds = sorted({kind for kind, _ in counts})
    for kind in kinds:
        print(f"{kind:40}  " + ", ".join(f"{n} {verdict}" for (each, verdict), n in sorted(counts.items()) if each == kind))
    verdicts = Counter(dict.fromkeys(("found", "harmless", "silent"), 0))
    for (_, verdict), n in counts.items():
        verdicts[verdict if verdict in verdicts else "other errors"] += n
    print(f"{given.flips} flips in {len(kinds)} kinds of files: " + ", ".join(f"{n} {each}" for each, n in verdicts.items()))
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
