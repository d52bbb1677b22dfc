"""Notebooks are kept without outputs, and run from clean. `make notebooks` runs this file with its long tests."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def texts(name):
    return [cell.source for cell in read(name).cells]


def test_the_notebooks_are_there():
    assert [name[:2] for name in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@each_notebook
def test_nothing_but_the_source_of_cells_is_kept(name):
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}


@each_notebook
def test_cells_have_names_that_last(name):
    ids = [cell.id for cell in read(name).cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(rf"{name[:2]}-\d\d[a-z]?", each) for each in ids)


@each_notebook
def test_a_notebook_opens_with_what_its_reader_will_be_able_to_do(name):
    first = texts(name)[0]
    assert first.startswith("# ") and "After this notebook you can" in first


@each_notebook
def test_nothing_depends_on_where_it_lies(name):
    for text in texts(name):
        assert not re.search(r"(?<![\w.:/])/(home|tmp|work|Users|data|mnt)\b|C:\\", text)
        for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", text):
            assert (FOLDER / link).exists(), link


def test_stored_text_is_as_nbformat_writes_it():
    """So that saving a notebook changes nothing but what was changed."""
    for name in NOTEBOOKS:
        stored = (FOLDER / name).read_text()
        assert stored == nbformat.writes(nbformat.from_dict(json.loads(stored)), version=4) + "\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
@each_notebook
def test_a_notebook_runs_from_clean_and_shows_pictures(name, tmp_path):
    notebook = read(name)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert list(tmp_path.iterdir()) == []
