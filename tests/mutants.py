"""Does a test notice a wrong core? `python -m tests.mutants` changes one token at a time, 66 times, and runs the tests.

``mutants.json`` lists the changes, which cosmic-ray's operators have made at places drawn at random: each place in the core
has the same chance, and each module has one at least. An entry is a line of a module, the number of lines alike before it,
and what it becomes. It says why where the change is harmless, that is where nobody could see it. An entry whose line is not
in the module any more is refused: ``python -m tests.mutants --draw`` (with cosmic-ray) puts another in its place.

A mutant is a copy of the package and its tests in a temporary directory, where the tests of the module run until one fails.
At the end the tests that have failed run on a copy without a mutation.
"""

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".json")
SEED, DRAWN = 60, 66
LONGEST = 900  # seconds for the tests of a mutant: a loop that does not end is noticed as well
UNSTEADY = "not memory_is_flat and not within_a_second"  # measure the machine as well: busy, it fails them by itself
TESTS = {  # of each module, the quick ones first
    "data/chunks": "bad_input inputs store",
    "data/store": "store cf",
    "engine/checkpoint": "checkpoint",
    "engine/cluster": "streaming plan cluster",
    "engine/condensed": "reduction streaming diagnostics",
    "engine/evaluator": "checkpoint streaming hold",
    "engine/partition": "streaming hold",
    "engine/places": "streaming plan hold",
    "engine/request": "reduction kernels checkpoint",
    "engine/sweep": "streaming multistart hold",
    "engine/values": "diagnostics result",
    "kernels/blocks": "kernels inputs streaming",
    "kernels/checks": "kernels bad_input",
    "kernels/groups": "groups groups_kept",
    "kernels/jac_mode": "kernels",
    "kernels/lane_loop": "lanes maps",
    "kernels/lanes": "lanes maps",
    "kernels/many_starts": "second_try multistart",
    "kernels/pieces": "groups",
    "kernels/rows": "reduction kernels likelihood",
    "kernels/rules": "rules trust_region",
    "kernels/steps": "steps subproblem",
    "kernels/table": "groups",
    "kernels/values": "diagnostics multistart",
    "maps/blocks": "lanes maps map_result",
    "memory/plan": "plan memory",
    "results/statistics": "statistics",
    "solve/multistart": "second_try multistart",
    "solve/subproblem": "subproblem trust_region",
    "solve/trust_region": "trust_region streaming",
}
FAMILIES = [  # an operator becomes one of its family: another is a TypeError that any test would meet
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}, {"BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"}, {"Is", "IsNot"}, {"UAdd", "USub", "Delete"}, {"Not", "Delete"},
]  # fmt: skip


class Mutant(NamedTuple):
    module: str
    operator: str
    line: str  # or several
    before: int  # lines alike before it
    becomes: str
    harmless: str = ""  # why

    @property
    def path(self) -> Path:
        return Path("dask_nlsq", self.module).with_suffix(".py")

    def place(self, source: str) -> int:
        """Where the line begins, -1 where it is not there."""
        starts = [found.start() for found in re.finditer(rf"^{re.escape(self.line)}$", source, re.MULTILINE)]
        return starts[self.before] if self.before < len(starts) else -1

    @property
    def current(self) -> bool:
        return self.place((ROOT / self.path).read_text()) >= 0


class Outcome(NamedTuple):
    mutant: Mutant
    number: int  # of the source line
    verdict: str
    why: str  # the test that has failed, or why it is harmless

    def __str__(self):
        mutant, number, verdict, why = self
        lines = [f"{verdict:8}  {mutant.path}:{number}  {why}", *(f"    - {each}" for each in mutant.line.splitlines())]
        return "\n".join([*lines, f"    + {mutant.becomes}"])


def listed() -> list[Mutant]:
    return [Mutant(**each) for each in json.loads(LIST.read_text())] if LIST.exists() else []


def copy_to(folder: Path) -> None:
    for each in ("dask_nlsq", "tests", "benchmarks"):
        shutil.copytree(ROOT / each, folder / each)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: Path, kernels: str, tests: list[str], *options: str) -> tuple[list[str], bool]:
    """Tests that have failed in a folder, and whether all have passed, with the kernels that any run has compiled."""
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", UNSTEADY, "-o", "timeout=120", *options)
    environment = os.environ | {"PYTHONPATH": str(folder), "KERNELS_OF_THE_TEST_RUN": kernels}
    command = [sys.executable, "-m", "pytest", *options, *tests]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as process:
        try:
            printed = process.communicate(timeout=LONGEST)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and its workers
            return ["no end"], False
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE), process.returncode == 0


def outcome(mutant: Mutant, kernels: str) -> Outcome:
    with TemporaryDirectory(prefix="dask-nlsq-mutant-") as folder:
        copy_to(Path(folder))
        module = Path(folder) / mutant.path
        source = module.read_text()
        at = mutant.place(source)
        module.write_text(source[:at] + mutant.becomes + source[at + len(mutant.line) :])
        tests = [f"tests/test_{name}.py" for name in TESTS[mutant.module].split()]
        failed, survived = run_tests(Path(folder), kernels, tests, "-x")
    number = source[:at].count("\n") + 1
    if survived:
        return Outcome(mutant, number, "harmless" if mutant.harmless else "survived", mutant.harmless)
    return Outcome(mutant, number, "killed", *(failed[:1] or ["no test can be run"]))


def in_its_file(test: str) -> tuple[str, int]:
    """File and place of a test, in whose order they run: a cluster that a test has left may be the next one's."""
    file, name = test.split("::")
    return file, (ROOT / file).read_text().index(f"def {name.split('[')[0]}(")


def run(chosen: list[Mutant], at_once: int) -> int:
    began = time.monotonic()
    with (
        TemporaryDirectory(prefix="dask-nlsq-kernels-") as kernels,
        TemporaryDirectory(prefix="dask-nlsq-mutant-") as folder,
    ):
        outcomes = []
        with ThreadPoolExecutor(at_once) as pool:
            for each in pool.map(lambda mutant: outcome(mutant, kernels), chosen):
                outcomes.append(each)
                print(each, flush=True)
        copy_to(Path(folder))
        tests = sorted({each.why for each in outcomes if each.verdict == "killed" and "::" in each.why}, key=in_its_file)
        wrong = run_tests(Path(folder), kernels, tests)[0] if tests else []
    counts = Counter(each.verdict for each in outcomes)
    share = counts["killed"] / max(counts["killed"] + counts["survived"], 1)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("killed", "survived", "harmless"))
    print(f"\n{told}: {share:.0%} of those that anybody could see ({(time.monotonic() - began) / 60:.0f} minutes)")
    if wrong:
        print("these tests fail without a mutation, too:", *wrong, sep="\n")
    return int(bool(wrong) or counts["survived"] > 0)


# ---------------------------------------------------------------------------------------------------------------------
# the draw


def unseen(tree: ast.AST) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where nothing is computed that a user could see: annotations, and how a record is printed."""
    found: list[ast.AST | None] = []
    for node in ast.walk(tree):
        found += [getattr(node, "annotation", None), getattr(node, "returns", None)]
        found += [node] if isinstance(node, ast.FunctionDef) and node.name == "__repr__" else []
    spans = [each for each in found if isinstance(each, (ast.expr, ast.FunctionDef))]
    return [((e.lineno, e.col_offset), (e.end_lineno or 0, e.end_col_offset or 0)) for e in spans]


def wanted(operator: str) -> bool:
    kind, *tokens = operator.split("/")[1].split("_")
    if kind.startswith(("Variable", "Exception", "Remove")):  # these need a name to put there, or take a line away
        return False
    return len(tokens) < 2 or any(set(tokens) <= family for family in FAMILIES)


class Place(NamedTuple):
    """Where a module may be mutated, in random order."""

    turn: float
    module: str
    operator: str  # one of those that can change it
    occurrence: int


def places(module: str) -> list[Place]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / "dask_nlsq" / module).with_suffix(".py").read_text()
    nodes, lines, spans = list(ast_nodes(get_ast(source))), source.splitlines(), unseen(ast.parse(source))
    ways: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name in filter(wanted, operator_names()):
        operator = get_operator(name)()
        for occurrence, (start, _) in enumerate(each for node in nodes for each in operator.mutation_positions(node)):
            if not any(first <= start < last for first, last in spans):
                ways.setdefault(start, []).append((name, occurrence))
    found = []
    for (row, column), choices in ways.items():
        line = lines[row - 1]  # which decides, and not its number: the draw hardly changes with the code
        chance = Random(f"{SEED} {module} {lines[: row - 1].count(line)} {line} {column}")
        found.append(Place(chance.random(), module, *chance.choice(choices)))
    return found


def mutated(place: Place) -> Mutant:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / "dask_nlsq" / place.module).with_suffix(".py").read_text()
    old, new = source.splitlines(), mutate_code(source, get_operator(place.operator)(), place.occurrence).splitlines()
    first = next(k for k, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    last = next(k for k, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b)
    line = "\n".join(old[first : len(old) - last])
    before = source[: source.index("\n".join(old[first:]))].splitlines().count(line)
    return Mutant(place.module, place.operator.split("/")[1], line, before, "\n".join(new[first : len(new) - last]))


def draw() -> list[Mutant]:
    """The list, with another mutant for each that is not in its module any more."""
    kept = [each for each in listed() if each.current]
    turns = sorted(each for module in TESTS for each in places(module))
    firsts = [next(each for each in turns if each.module == module) for module in TESTS]
    for place in [each for each in firsts if each.module not in {old.module for old in kept}] + turns:
        mutant = mutated(place)
        if mutant not in {each._replace(harmless="") for each in kept}:
            kept.append(mutant)
        if len(kept) == DRAWN:
            break
    return sorted(kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="as solve/trust_region; all by default")
    parser.add_argument("--draw", action="store_true", help="fill up the list, and run nothing")
    parser.add_argument("--at-once", type=int, default=2, help="mutants at once")
    given = parser.parse_args()
    if given.draw:
        entries = [{name: value for name, value in each._asdict().items() if value != ""} for each in draw()]
        LIST.write_text(json.dumps(entries, indent=1) + "\n")
        return 0
    if lost := [f"{each.path}: {each.line}" for each in listed() if not each.current]:
        print("these lines have changed; `make mutants-draw` puts others in their place:", *lost, sep="\n")
        return 2
    return run([each for each in listed() if not given.modules or each.module in given.modules], given.at_once)


if __name__ == "__main__":
    sys.exit(main())
