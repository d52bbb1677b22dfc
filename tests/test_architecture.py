"""The folders and their order, read from the source: who may import whom, who may know JAX, Dask and Zarr, and how long."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dask_nlsq

PACKAGE = Path(__file__).parent.parent / "dask_nlsq"
ORDER = [  # from the left to the right: a folder, or a module beside the folders, imports only from those before it
    "base", "model", "kernels", "memory", "data", "presets", "options", "parameters", "engine", "solve", "prepare",
    "results", "watch", "maps", "interface", "groups", "fitting", "compat", "demo",
]  # fmt: skip
PUBLIC = {"models", "plots", "accessor", "dashboard", "statistics"}  # paths of modules that are elsewhere
FACES = PUBLIC | {"__init__"}
ON_TOP = {"interface.cli", "interface.accessor"}  # which call the fits: no other module imports them
KNOWS = {  # library -> folders, or single modules
    "jax": {
        "base.compile", "base.x64", "base.device_sizes", "model", "kernels", "memory.device", "engine.devices",
        "solve.subproblem", "maps.blocks", "groups.sweep", "demo",
    },
    "dask": {
        "base.config", "base.lazy", "base.text", "memory.processes", "data", "engine", "results.binning", "maps",
        "groups", "interface",
    },
    "distributed": {"base.plugins", "memory", "data.loading", "data.sizes", "engine", "watch", "interface"},
    "zarr": {
        "base.lazy", "data.axes", "data.sources", "data.store", "maps.result", "maps.store", "maps.stored", "interface",
        "demo",
    },
    "bokeh": {"watch.live_page", "maps.viewer"},
    "matplotlib": {"results.plots", "results.report", "maps.pictures", "maps.report", "demo"},
    "xarray": {"data.labels", "results.result", "maps.result", "maps.store", "maps.stored", "interface.accessor"},
    "click": {"interface.cli"},
}  # fmt: skip
LAZY = {"da": "dask", "zarr": "zarr"}  # names of base.lazy -> the library that they load
MOST_LINES, MOST_BODY = 600, 80  # of a module; of a function, without its docstring

SOURCES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in SOURCES if name not in FACES and not name.endswith("__init__")]


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of the package and outside libraries that a module imports."""
    inside, outside = set(), set()
    package = ["dask_nlsq", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")][1:]
            prefix = ".".join(part for part in found if part)
            names = {f"{prefix}.{alias.name}".strip(".") for alias in node.names}
            outside |= {LAZY[alias.name] for alias in node.names if prefix == "base.lazy"}
            inside |= {prefix} if prefix in SOURCES and f"{prefix}.__init__" not in SOURCES else names
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    return inside, outside


def folder(module: str) -> str:
    return module.split(".")[0]


def test_every_folder_has_a_place_in_the_order():
    assert {folder(module) for module in MODULES} == set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_the_left(module):
    inside, outside = imports(module)
    assert "dask_nlsq" not in outside  # imports within the package are relative
    assert not (inside - {module}) & ON_TOP
    allowed = ORDER[: ORDER.index(folder(module)) + 1] + (["groups", "fitting", "demo"] if module in ON_TOP else [])
    assert {folder(each) for each in inside} <= set(allowed)


def test_imports_make_no_circle():
    left = {module: imports(module)[0] & set(MODULES) for module in MODULES}
    while left:
        free = {module for module, wanted in left.items() if not wanted & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {module: wanted for module, wanted in left.items() if module not in free}


@pytest.mark.parametrize("module", MODULES)
def test_a_library_is_known_only_where_it_belongs(module):
    outside = imports(module)[1]
    places = {module, folder(module)}
    assert not {library for library, known in KNOWS.items() if library in outside and not known & places}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_read_at_one_sitting(module):
    assert len(SOURCES[module].read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("module", MODULES)
def test_a_function_is_seen_at_a_glance(module):
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < MOST_BODY, node.name


@pytest.mark.parametrize("module", MODULES)
def test_no_module_reads_what_is_private_to_another(module):
    tree = ast.parse(SOURCES[module].read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    private = {name for name in read if name.startswith("_") and not name.startswith("__")} - NAMED_TUPLES - FOREIGN
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level for a in node.names}
    assert not private
    assert not {name for name in imported if name.startswith("_")}


NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}
FOREIGN = {"_meta", "_applications", "_data"}  # of Dask, bokeh and xarray, which have no public name


@pytest.mark.slow
def test_public_modules_are_attributes_that_are_imported_when_they_are_used():
    code = (
        "import sys, dask_nlsq; assert not {'jax', 'xarray', 'zarr', 'dask.array'} & {*sys.modules}; "
        f"assert {PUBLIC} <= {{*dir(dask_nlsq)}}; "
        f"print(*(getattr(dask_nlsq, name).__name__ for name in {sorted(PUBLIC)}), 'jax' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split() == [*(f"dask_nlsq.{name}" for name in sorted(PUBLIC)), "True"]


OFFERED = {  # by the public modules, to whoever presses the tab key
    "models": {
        "ReadyModel", "arctan_edge", "damped_sine", "exponential", "g2_double", "g2_single", "gaussian", "line",
        "lorentzian", "moffat", "named", "polynomial", "power_law", "pseudo_voigt", "sigmoid", "stretched_exponential",
        "voigt",
    },
    "plots": {
        "contours", "convergence", "correlation", "fit", "images", "maps", "profile", "residual_histogram", "residuals",
        "spectrum",
    },
    "statistics": {
        "Noise", "Statistics", "Totals", "correlation", "distance_at", "largest_correlations", "quantile", "root",
        "statistics",
    },
    "accessor": {"Accessor"},
    "dashboard": {"dask_setup"},
}  # fmt: skip


def offered(module) -> set[str]:
    return {name for name in dir(module) if not name.startswith("_")}


def test_completion_offers_public_names_only():
    dask_nlsq.curve_fit  # noqa: B018  which loads modules that become attributes of the package
    assert offered(dask_nlsq) == {*dask_nlsq.__all__} | PUBLIC
    assert {name: offered(getattr(dask_nlsq, name)) for name in PUBLIC} == OFFERED


def test_no_module_hides_a_public_name():
    beside = {module for module in SOURCES if "." not in module} | {folder(module) for module in MODULES}
    assert not beside & set(dask_nlsq.__all__)
