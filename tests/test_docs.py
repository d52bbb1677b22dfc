"""Every code block of README and docs runs as it stands there, and prints what the page says that it prints.

The blocks of a page run in their order, in one namespace and one empty directory. A block with a caption is a file, which is
written there. Shell blocks run `dask` and `python` of this environment. A ``text`` block is what the block before it prints,
with ``...`` for what differs from run to run. A comment ``<!-- not run: why -->`` before a block says that it does not run
here.
"""

import doctest
import inspect
import io
import os
import re
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import pytest
import yaml
from distributed import default_client

import dask_nlsq
from dask_nlsq import __all__ as public
from dask_nlsq import __version__
from dask_nlsq.interface.cli import nlsq
from tests.test_architecture import MODULES, ORDER

matplotlib.use("agg")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(each for each in (ROOT / "docs").rglob("*.md") if "_build" not in each.parts)]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>[^>\n]*) -->\n)?"
    r"^```(?P<kind>\S+)(?: (?P<argument>[^\n]*))?\n"
    r"(?P<options>(?::[\w-]+: [^\n]*\n)*)"
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = ("python", "bash", "text")
NEEDS = {"another machine", "a cluster", "a GPU", "a network", "another package", "an installation", "minutes"}
MOST_NOT_RUN = 20
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    language: str
    code: str
    line: int
    caption: str | None
    why: str | None  # it does not run


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    for match in FENCE.finditer(text):
        language = match["argument"] if match["kind"] == "{code-block}" else match["kind"]
        caption = re.search(r"^:caption: (.*)$", match["options"], re.MULTILINE)
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(language, match["code"], line, caption and caption[1], match["why"]))
    return found


def name(page):
    return str(page.relative_to(ROOT))


LONG = {"docs/command-line.md"}  # many processes; the tests of the command line start their own
QUICK_OR_SLOW = [pytest.param(page, id=name(page), marks=[pytest.mark.slow] * (name(page) in LONG)) for page in PAGES]


@pytest.mark.pages
@pytest.mark.filterwarnings("ignore:Port 8787 is already in use")
@pytest.mark.parametrize("page", QUICK_OR_SLOW)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("MPLBACKEND", "agg")
    known, namespace, printed = set(sys.modules), {"__name__": "__main__"}, ""
    try:
        for block in blocks(page):
            if block.why is not None:
                printed = None
            elif block.caption:
                Path(block.caption).write_text(block.code)
            elif block.language == "text":
                if printed is not None:
                    assert said(block.code, printed), f"{name(page)}:{block.line} is not what is printed:\n{printed}"
            elif block.language == "python":
                with redirect_stdout(io.StringIO()) as out:
                    exec(compile("\n" * block.line + block.code, page, "exec"), namespace)
                printed = out.getvalue()
            elif block.language == "bash":
                printed = shell(block.code)
    finally:
        leave(tmp_path, known)


def said(want: str, got: str) -> bool:
    return doctest.OutputChecker().check_output(textwrap.dedent(want), got, SAME)


def shell(code: str) -> str | None:
    """What the commands print; None where they need one of `dask nlsq` that there is not."""
    if not set(re.findall(r"^dask nlsq (\w+)", code, re.MULTILINE)) <= {*nlsq.commands}:
        return None
    done = subprocess.run(["bash", "-e", "-c", code], text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def leave(directory, known):
    """Without the cluster, the pictures and the modules of a page."""
    try:
        client = default_client()
    except ValueError:  # there is none
        pass
    else:
        client.shutdown()
        client.close()
    plt.close("all")
    for module in sys.modules.keys() - known:
        if str(getattr(sys.modules[module], "__file__", None) or "").startswith(str(directory)):
            del sys.modules[module]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page):
    fences = re.findall(r"^ *```", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page)), "a fence that is indented, or not closed, is not seen"
    for block in blocks(page):
        assert block.language in LANGUAGES or block.language.startswith("{"), f"{name(page)}:{block.line} {block.language}"


def test_blocks_that_do_not_run_are_few_and_say_what_they_need():
    left_out = [(f"{name(page)}:{block.line}", block.why) for page in PAGES for block in blocks(page) if block.why]
    print(*(f"{place}: needs {why}" for place, why in left_out), sep="\n")
    assert {why for _, why in left_out} <= NEEDS
    assert len(left_out) <= MOST_NOT_RUN


def test_every_setting_is_on_its_page():
    page = (ROOT / "docs" / "configuration.md").read_text()
    defaults = yaml.safe_load((ROOT / "dask_nlsq" / "base" / "nlsq.yaml").read_text())["nlsq"]
    for key, value in defaults.items():
        text = "null" if value is None else str(value).lower()
        row = f"| `nlsq.{key}` | `DASK_NLSQ__{key.replace('-', '_').upper()}` | `{text}` |"
        assert row in page


def test_every_public_name_is_in_the_reference():
    text = "".join((ROOT / "docs" / "reference" / f"{page}.md").read_text() for page in ("index", "compatibility"))
    assert sorted(re.findall(r"^   (\w+)$", text, re.MULTILINE)) == sorted(public)


def test_every_picture_is_in_the_gallery_and_every_notebook_on_its_page():
    notebooks = (ROOT / "notebooks").glob("*.ipynb")
    pictures = [*(ROOT / "docs").glob("*.png"), *(ROOT / "docs" / "gallery").glob("*.png")]
    page = (ROOT / "docs/notebooks.md").read_text()
    assert {each.relative_to(ROOT / "docs").as_posix() for each in pictures} == {
        *re.findall(r"\((\S+\.png)\)", (ROOT / "docs/gallery.md").read_text())
    }
    assert {each.name for each in notebooks} == {*re.findall(r"notebooks/(\S+\.ipynb)>", page)}


def test_contributors_find_every_module_in_its_order():
    rows = re.findall(r"^\| `([a-z]+)(?:/|\.py)` \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ORDER
    assert [f"{name}.{each}" for name, cell in rows for each in re.findall(r"`(\w+)`", cell)] == [
        m for m in in_order() if "." in m
    ]


def in_order():
    return sorted(MODULES, key=lambda module: (ORDER.index(module.split(".")[0]), module))


def test_the_version_to_cite_is_that_of_the_package():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


@pytest.mark.slow
@pytest.mark.parametrize(
    "function", ["compare", "curve_fit", "fit", "fit_groups", "fit_map", "hold", "load", "plan_fit", "resume"]
)
def test_help_has_examples_that_run_and_names_related_functions(function):
    function = getattr(dask_nlsq, function)
    text = inspect.getdoc(function)
    assert "\nSee Also\n" in text
    example = doctest.DocTestParser().get_doctest(text, {}, function.__name__, None, None)
    assert example.examples
    assert doctest.DocTestRunner(optionflags=SAME).run(example, clear_globs=False).failed == 0  # models live on


def test_help_of_curve_fit_has_everyday_arguments_first():
    head = inspect.getdoc(dask_nlsq.curve_fit).split("Returns\n---")[0]
    every = [name for line in re.findall(r"^(\w[\w, ]*) : ", head, re.M) for name in line.split(", ")]
    assert every[:9] == ["f", "xdata", "ydata", "p0", "sigma", "absolute_sigma", "bounds", "loss", "f_scale"]
    assert every[9:13] == ["mask", "param_names", "fixed", "expr"]
