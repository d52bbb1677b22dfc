"""Decays of many groups as pyglotaran fits them, by its own interpreter: ``python pyglotaran_fit.py DATA.npz``."""

import sys
import time

import numpy as np
import xarray as xr
from glotaran.io import load_model, load_parameters
from glotaran.optimization.optimize import optimize
from glotaran.project.scheme import Scheme

data = np.load(sys.argv[1])
MODEL = """
default_megacomplex: decay-parallel
megacomplex:
  decay:
    type: decay-parallel
    compartments: [fast, slow]
    rates: [rates.fast, rates.slow]
  base:
    type: baseline
    dimension: time
dataset:
  groups:
    megacomplex: [decay, base]
"""
PARAMETERS = """
rates:
  - [fast, 2.5]
  - [slow, 0.3]
"""
model = load_model(MODEL, format_name="yml_str")
parameters = load_parameters(PARAMETERS, format_name="yml_str")
y = xr.DataArray(data["y"].T, coords=[("time", data["t"]), ("spectral", np.arange(len(data["y"])))]).to_dataset(name="data")
for _ in range(2):
    scheme = Scheme(model, parameters, {"groups": y.copy(deep=True)}, maximum_number_function_evaluations=50)
    began = time.perf_counter()
    result = optimize(scheme, verbose=False)
    seconds = time.perf_counter() - began
print(seconds, *(result.optimized_parameters.get(f"rates.{name}").value for name in ("fast", "slow")), result.success)
