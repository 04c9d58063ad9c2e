"""A config is plain data: reading one imports no torch, no NumPy, and nothing of the rooms above."""

import json
import subprocess
import sys

from tests.support.repository import ROOT

BELOW = {"data_sharding", "data_sharding.errors", "data_sharding.plan", "data_sharding.plan.view_choice", "fitv2_scale"}
PROGRAM = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps([*sys.modules]))
"""


def test_what_all_of_config_imports():
    files = sorted((ROOT / "fitv2_scale" / "config").glob("*.py"))
    modules = ["fitv2_scale.config", *(f"fitv2_scale.config.{file.stem}" for file in files if file.stem != "__init__")]
    assert "fitv2_scale.config.schema" in modules
    done = subprocess.run([sys.executable, "-c", PROGRAM, *modules], stdout=subprocess.PIPE, check=True, cwd=ROOT)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"torch", "numpy"}
    ours = {name for name in loaded if name.split(".")[0] in ("fitv2_scale", "data_sharding", "launchers")}
    assert ours == {*modules, *BELOW}
