"""Does a test notice a wrong core? `python -m tests.mutants` changes one token at a time, 60 times, and runs the tests.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".json")
SEED, DRAWN = 60, 60
LONGEST = 900  # seconds for the tests of a mutant: a loop that does not end is noticed as well
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
    "kernels/jac_mode": "kernels",
    "kernels/lane_loop": "lanes maps",
    "kernels/lanes": "lanes maps",
    "kernels/many_starts": "second_try multistart",
    "kernels/rows": "reduction kernels likelihood",
    "kernels/rules": "rules trust_region",
    "kernels/steps": "steps subproblem",
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
        starts = [m.start() for m in re.finditer(rf"^{re.escape(self.line)}$", source, re.MULTILINE)]
        return starts[self.before] if self.before < len(starts) else -1


class Outcome(NamedTuple):
    mutant: Mutant
    number: int  # of the source line
    verdict: str
    test: str = ""  # which has failed


def listed() -> list[Mutant]:
    return [Mutant(**each) for each in json.loads(LIST.read_text())] if LIST.exists() else []


def copy_to(folder: Path) -> None:
    for each in ("dask_nlsq", "tests", "benchmarks"):
        shutil.copytree(ROOT / each, folder / each)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: Path, kernels: str, asked: list[str], stop: bool = True) -> str:
    """What the tests print in a folder, with the kernels that any run has compiled; empty where they take too long."""
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-o", "timeout=120", *["-x"] * stop]
    environment = os.environ | {"PYTHONPATH": str(folder), "KERNELS_OF_THE_TEST_RUN": kernels}
    command = [sys.executable, "-m", "pytest", *options, *asked]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as tests:
        try:
            return tests.communicate(timeout=LONGEST)[0]
        except subprocess.TimeoutExpired:
            os.killpg(tests.pid, signal.SIGKILL)  # and its workers
            return ""


def failed(printed: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE)


def outcome(mutant: Mutant, kernels: str) -> Outcome:
    with TemporaryDirectory(prefix="dask-nlsq-mutant-") as folder:
        copy_to(Path(folder))
        module = Path(folder) / mutant.path
        source = module.read_text()
        at = mutant.place(source)
        module.write_text(source[:at] + mutant.becomes + source[at + len(mutant.line) :])
        printed = run_tests(Path(folder), kernels, [f"tests/test_{name}.py" for name in TESTS[mutant.module].split()])
        found = failed(printed)
        survived = bool(re.search(r"^\d+ passed", printed.splitlines()[-1])) if printed else False
    verdict = ("harmless" if mutant.harmless else "survived") if survived else "killed"
    return Outcome(mutant, source[:at].count("\n") + 1, verdict, found[0] if found else "" if survived else "no end")


def told(each: Outcome) -> str:
    mutant, number, verdict, test = each
    lines = [f"{verdict:8}  {mutant.path}:{number}  {mutant.harmless if verdict == 'harmless' else test}"]
    return "\n".join([*lines, *(f"    - {line}" for line in mutant.line.splitlines()), f"    + {mutant.becomes}"])


def counted(outcomes: list[Outcome]) -> str:
    counts = {verdict: sum(each.verdict == verdict for each in outcomes) for verdict in ("killed", "survived", "harmless")}
    share = counts["killed"] / max(counts["killed"] + counts["survived"], 1)
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + f": {share:.0%} of those that anybody could see"


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
    kept = [each for each in listed() if each.place((ROOT / each.path).read_text()) >= 0]
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
        LIST.write_text(
            json.dumps([{k: v for k, v in each._asdict().items() if v != ""} for each in draw()], indent=1) + "\n"
        )
        return 0
    chosen = [each for each in listed() if not given.modules or each.module in given.modules]
    lost = [f"{each.path}: {each.line}" for each in chosen if each.place((ROOT / each.path).read_text()) < 0]
    if lost:
        print("these lines have changed; `make mutants-draw` puts others in their place:", *lost, sep="\n")
        return 2
    began = time.monotonic()
    with (
        TemporaryDirectory(prefix="dask-nlsq-kernels-") as kernels,
        TemporaryDirectory(prefix="dask-nlsq-mutant-") as folder,
    ):
        with ThreadPoolExecutor(given.at_once) as pool:
            outcomes = []
            for each in pool.map(lambda mutant: outcome(mutant, kernels), chosen):
                outcomes.append(each)
                print(told(each), flush=True)
        copy_to(Path(folder))
        tests = sorted({each.test for each in outcomes if "::" in each.test})
        wrong = failed(run_tests(Path(folder), kernels, tests, stop=False)) if tests else []
    print("", f"{counted(outcomes)} ({(time.monotonic() - began) / 60:.0f} minutes)", sep="\n")
    if wrong:
        print("these tests fail without a mutation, too:", *wrong, sep="\n")
    return int(bool(wrong) or any(each.verdict == "survived" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
