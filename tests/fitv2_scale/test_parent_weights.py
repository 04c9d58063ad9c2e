"""A run that begins with the weights of another has its network and its latents."""

import json
import shutil

import pytest

from data_sharding.errors import UserError
from fitv2_scale.data import Data
from fitv2_scale.identity import check_start
from fitv2_scale.run.fork import Fork


@pytest.mark.parametrize("key,ours", [("heads", 1), ("qk_norm", "none"), ("position", "sincos")])
def test_weights_that_would_be_another_network_of_the_same_shapes(tiny, two_step_run, key, ours):
    model = {"depth": 2, "hidden": 32, "heads": 2, "classes": 5, key: ours}
    config = tiny(model=model, init_from=f"{two_step_run}@2")
    plan = Data.open(config, (1,)).plan
    for asked, fork in ((config, None), (tiny(model=model), Fork.parse(f"{two_step_run}@2", config.run))):
        with pytest.raises(UserError, match=rf"@2 was trained with model.{key}=.*be another network with {ours}:"):
            check_start(asked, plan, fork)


@pytest.mark.parametrize("recorded", [True, False])
def test_weights_that_learned_another_objective(tiny, two_step_run, tmp_path, recorded):
    """Also those of a version that knew one objective alone, and did not record it."""
    source = tmp_path / "source"
    shutil.copytree(two_step_run, source)
    tree = json.loads((source / "run.json").read_text())
    assert tree["config"]["objective"] == "flow"
    if not recorded:
        del tree["config"]["objective"], tree["config"]["model"]["position"]
        (source / "run.json").write_text(json.dumps(tree))
    flow = tiny(init_from=f"{source}@2")
    plan = Data.open(flow, (1,)).plan
    check_start(flow, plan, None)
    with pytest.raises(UserError, match="@2 was trained with objective=flow, and would be another network with ddpm:"):
        check_start(tiny(init_from=f"{source}@2", objective="ddpm", sampling__solver="ddpm"), plan, None)


def test_weights_that_learned_latents_of_another_codec(tiny, two_step_run, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(two_step_run, source)
    start = source / "attempts/1/start.json"
    begun, fork = tiny(init_from=f"{source}@2"), Fork.parse(f"{source}@2", tiny().run)
    plan = Data.open(begun, (1,)).plan
    start.write_text(json.dumps(json.loads(start.read_text()) | {"codec": "0" * 32}))
    for config, origin in ((begun, None), (tiny(), fork)):
        with pytest.raises(UserError, match=f"{source}@2 learned latents of another codec or VAE than dct of "):
            check_start(config, plan, origin)
    record = json.loads(start.read_text())
    del record["codec"]  # a version that recorded none
    start.write_text(json.dumps(record))
    check_start(begun, plan, None)
