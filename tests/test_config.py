"""Defaults, their schema, and where values come from."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import dask
import numpy as np
import pytest
import yaml
import zarr
from jsonschema import Draft202012Validator

from dask_nlsq import curve_fit
from dask_nlsq.base import config
from dask_nlsq.data import store

ROOT = Path(config.__file__).parent
DEFAULTS = yaml.safe_load((ROOT / "nlsq.yaml").read_text())
SCHEMA = yaml.safe_load((ROOT / "nlsq-schema.yaml").read_text())
BAD = {
    "threads": (0, -1, 1.5, True, "many"),
    "compilation-cache": (1, True),
    "codec-pipeline": (1, True),
    "read-deadline": (0, -1.0, "soon", float("nan")),
    "read-retries": (-1, 0.5, None),
    "checkpoint-seconds": (-1, None, "10 s"),
    "dashboard": (1, None, "yes"),
}


def keys_read():
    """Those that the package asks for, from its source: `setting("key")`, and none by `dask.config.get("nlsq...")`."""
    asked, past = set(), set()
    for path in ROOT.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                if isinstance(node.func, ast.Name) and node.func.id == "setting":
                    asked.add(node.args[0].value)
                elif isinstance(node.func, ast.Attribute) and str(node.args[0].value).startswith("nlsq."):
                    past.add(node.args[0].value)
    return asked, past


def line(x, a, b):
    return a * x + b


def test_the_schema_is_one_and_the_defaults_keep_to_it():
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(DEFAULTS)


@pytest.mark.slow
def test_defaults_schema_and_code_have_the_same_keys():
    asked, past = keys_read()
    assert asked == set(DEFAULTS["nlsq"]) == set(SCHEMA["properties"]["nlsq"]["properties"])
    assert not past


def test_every_key_is_described():
    for key, allowed in config.schema().items():
        assert len(allowed["description"].split()) > 5, key


def test_type_checkers_are_told_that_there_are_annotations():
    assert (ROOT.parent / "py.typed").exists()


@pytest.mark.parametrize("key", BAD)
def test_a_bad_value_is_refused_as_by_the_schema_and_the_error_names_the_key(key):
    for value in BAD[key]:
        if value == value:  # JSON has no nan
            assert not Draft202012Validator(SCHEMA).is_valid({"nlsq": {key: value}})
        with (
            dask.config.set({f"nlsq.{key}": value}),
            pytest.raises(ValueError, match=f"`nlsq.{key}` must be .*, not ") as told,
        ):
            config.setting(key)
        assert "DASK_NLSQ__" + key.upper().replace("-", "_") in str(told.value)


def test_a_fit_with_a_bad_value_ends_with_that_error(tmp_path):
    x = np.arange(20.0)
    with dask.config.set({"nlsq.threads": 0}), pytest.raises(ValueError, match=r"`nlsq.threads` must be integer or null"):
        curve_fit(line, x, 2 * x + 1, p0=[1, 1])
    zarr.save_array(tmp_path / "y.zarr", x)
    for pipeline in ("nowhere.Pipeline", "zarr.Nothing", "noclass"):
        with (
            dask.config.set({"nlsq.codec-pipeline": pipeline}),
            pytest.raises(ValueError, match=r"`nlsq.codec-pipeline` is .* cannot be imported"),
        ):
            curve_fit(line, x, tmp_path / "y.zarr", p0=[1, 1])


def test_values_are_read_when_they_are_used():
    with dask.config.set({"nlsq.threads": 3, "nlsq.read-deadline": None, "nlsq.read-retries": 0}):
        assert config.threads() == 3
        assert store.patience() == (None, 1)
    assert store.patience() == (DEFAULTS["nlsq"]["read-deadline"], 1 + DEFAULTS["nlsq"]["read-retries"])


def test_environment_variables_set_each_key_in_a_fresh_process(tmp_path):
    given = {
        "threads": "2",
        "compilation-cache": str(tmp_path),
        "codec-pipeline": "zarr.core.codec_pipeline.BatchedCodecPipeline",
        "read-deadline": "7.5",
        "read-retries": "0",
        "checkpoint-seconds": "1",
        "worker-deadline": "600",
        "dashboard": "false",
    }
    assert set(given) == set(config.schema())
    code = "import json; from dask_nlsq.base.config import *; print(json.dumps({key: setting(key) for key in schema()}))"
    variables = {f"DASK_NLSQ__{key.upper().replace('-', '_')}": value for key, value in given.items()}
    said = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, check=True, capture_output=True, text=True
    )
    expected = given | {"threads": 2, "read-deadline": 7.5, "read-retries": 0, "checkpoint-seconds": 1}
    expected |= {"worker-deadline": 600, "dashboard": False}
    assert yaml.safe_load(said.stdout) == expected
