import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
from click.testing import CliRunner

from dask_nlsq import demo
from dask_nlsq.cli import nlsq


def test_demo_prints_its_report(tmp_path):
    arguments = ["demo", "--frames", "40", "--angles", "5", "--seed", "0", "--directory", str(tmp_path / "demo")]
    outcome = CliRunner().invoke(nlsq, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "5 angles x 40 x 40 frames = 8,000 points, 17 parameters" in outcome.stdout
    assert (tmp_path / "demo" / "demo.png").exists()
    assert outcome.stderr == ""


def test_demo_that_misses_the_truth_exits_with_one_line_and_status_1(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "simulate_plane", lambda measurement, k: np.where(np.eye(40), np.nan, 1.1 + 0.1 * k))
    arguments = ["demo", "--frames", "40", "--angles", "5", "--directory", str(tmp_path / "demo")]
    outcome = CliRunner().invoke(nlsq, arguments)
    assert outcome.exit_code == 1
    assert outcome.stderr.count("\n") == 1


def test_option_that_cannot_work_exits_with_one_line_and_status_1(tmp_path):
    outcome = CliRunner().invoke(nlsq, ["demo", "--frames", "5", "--directory", str(tmp_path)])
    assert outcome.exit_code == 1
    assert outcome.stderr == "Error: frames = 5: at least 20 are needed to determine all parameters\n"


def test_help_names_the_options():
    outcome = CliRunner().invoke(nlsq, ["demo", "--help"])
    assert outcome.exit_code == 0
    for option in ("--frames", "--angles", "--seed", "--directory"):
        assert option in outcome.stdout


def test_dask_finds_the_command():
    (entry,) = entry_points(group="dask_cli", name="nlsq")
    assert entry.load() is nlsq


@pytest.mark.timeout(120)
def test_dask_nlsq_demo_runs_in_a_shell(tmp_path):
    command = [sys.executable, "-m", "dask", "nlsq", "demo", "--frames", "5", "--directory", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 1
    assert outcome.stderr == "Error: frames = 5: at least 20 are needed to determine all parameters\n"
