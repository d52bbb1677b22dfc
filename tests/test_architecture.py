"""The rooms and their order, read from the source: who may import whom, and who may know JAX, Dask and Zarr."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dask_nlsq"
ORDER = [  # from the bottom up: a room imports only from rooms before it
    "config", "labels", "files", "sizes", "dashboard", "resources", "budget", "environment", "memory", "rules",
    "workflow", "trf_jit", "model", "guesses", "models", "kernels", "cf", "store", "chunks", "arrays", "inputs",
    "checkpoint", "loading", "cluster", "sample", "reduction", "binning", "plots", "trust_region", "screening",
    "multistart", "streaming", "plan", "report", "statistics", "uncertainty", "diagnostics", "result", "progress",
    "arguments", "checks", "admission", "map_step", "map_plan", "map_solver", "map_blocks", "map_result", "maps", "api",
    "accessor", "__init__", "demo", "words", "kept", "cli",
]  # fmt: skip
# fmt: off
KNOWS = {
    "jax": {
        "sizes", "trf_jit", "model", "guesses", "models", "kernels", "screening", "map_step", "map_solver",
        "map_blocks", "demo", "checks",
    },
    "dask": {
        "config", "environment", "cf", "store", "arrays", "inputs", "loading", "cluster", "reduction", "binning",
        "streaming", "plan", "progress", "map_plan", "map_blocks", "map_result", "maps", "demo", "words",
    },
    "distributed": {
        "dashboard", "resources", "environment", "loading", "cluster", "reduction", "streaming", "plan", "progress",
        "cli",
    },
    "zarr": {"store", "map_result", "demo", "words", "kept"},
    "bokeh": {"dashboard"},
    "matplotlib": {"plots", "report", "demo"},
    "xarray": {"labels", "map_result", "result", "accessor"},
    "click": {"cli"},
}
# fmt: on
MOST_LINES = 600


def imports(room: str) -> tuple[set[str], set[str]]:
    """Rooms and outside packages that a room imports."""
    rooms, outside = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            rooms |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "dask_nlsq":
            rooms |= set(node.module.split(".")[1:2]) or {"__init__"}
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    if "dask_nlsq" in outside:
        rooms.add("__init__")
    return rooms, outside


def test_every_room_has_a_place_in_the_order():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_downwards(room):
    above = set(ORDER[ORDER.index(room) :])
    assert not imports(room)[0] & above


@pytest.mark.parametrize("room", ORDER)
def test_a_library_is_known_only_where_it_belongs(room):
    strangers = {library for library, rooms in KNOWS.items() if library in imports(room)[1] and room not in rooms}
    assert not strangers


@pytest.mark.parametrize("room", ORDER)
def test_a_room_is_read_at_one_sitting(room):
    assert len((PACKAGE / f"{room}.py").read_text().splitlines()) <= MOST_LINES
