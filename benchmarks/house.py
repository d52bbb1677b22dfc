"""The size of the package, folder by folder, and how long it takes to import: ``python -m benchmarks.house``."""

import ast
import subprocess
import sys
import time
from collections import Counter, defaultdict

from tests.test_architecture import MODULES, ORDER, SOURCES, folder, imports

CORE = ("fitting", "options", "kernels", "engine", "solve")
RUNS = 9


def lines(module: str) -> int:
    return len(SOURCES[module].read_text().splitlines())


def bodies(module: str):
    """Lines of each function, without its docstring."""
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                yield body[-1].end_lineno - body[0].lineno + 1, f"{module}.{node.name}"


def seconds(code: str) -> float:
    """Median of ``RUNS`` fresh processes, less than that of a process that does nothing."""
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - began)
    return sorted(times)[RUNS // 2]


def main():
    size, left = Counter(), defaultdict(set)
    for module in MODULES:
        size[folder(module)] += lines(module)
        left[folder(module)] |= {folder(each) for each in imports(module)[0] & set(MODULES)} - {folder(module)}
    for name in ORDER:
        n = sum(folder(module) == name for module in MODULES)
        found = ", ".join(sorted(left[name], key=ORDER.index)) or "-"
        print(f"{name:<12}{n:>3} modules {size[name]:>6} lines   imports {found}")
    print(f"package {sum(map(lines, SOURCES))} lines; core path ({', '.join(CORE)}) {sum(size[name] for name in CORE)}")
    print("longest function body: {} lines, {}".format(*max(each for module in MODULES for each in bodies(module))))
    print(f"modules over 600 lines: {sum(lines(module) > 600 for module in MODULES)}")
    nothing = seconds("pass")
    for code in ("import jax", "import jax, dask.array", "from dask_nlsq import curve_fit, fit_map"):
        print(f"{code}: {seconds(code) - nothing:.2f} s (median of {RUNS} fresh processes)")


if __name__ == "__main__":
    main()
