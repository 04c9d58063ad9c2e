"""The weights that a run begins with are known by their content: by another path they are the same, and other weights
by the same path are not."""

import json
import shutil
from pathlib import Path

import pytest
from xxhash import xxh3_128_hexdigest

from data_sharding.errors import UserError
from fitv2_scale.data import Data
from fitv2_scale.parallel.world import join
from fitv2_scale.run.run import Run
from fitv2_scale.train.setup import claim
from tests.support.other_weights import replace_weights, weights_of


@pytest.fixture
def claimed(tiny):
    """``claimed(init_from=…)`` starts an attempt of the run."""

    def act(**changes):
        config = tiny(train__steps=1, **changes)
        with join() as world:
            return claim(config, Data.open(config, (1,)).plan, None, world)

    return act


@pytest.mark.parametrize("committed", [False, True])
def test_a_file_by_another_path(claimed, two_step_run, tmp_path, committed):
    file, _ = weights_of(two_step_run, tmp_path / "first")
    first = claimed(init_from=file)
    if committed:
        first.run.log.commit(1, 1, "steps/1", "00")
    moved = str(Path(file).rename(tmp_path / "moved.safetensors"))
    assert claimed(init_from=moved).number == 2
    assert Run.open(first.run.url).recipe["init_from"] == file  # run.json is never changed
    replace_weights(moved)
    with pytest.raises(UserError, match="init_from: .*first/weights.safetensors.* -> .*moved.safetensors"):
        claimed(init_from=moved)
    with pytest.raises(UserError, match="there is no weights file .*nowhere.safetensors"):
        claimed(init_from=str(tmp_path / "nowhere.safetensors"))


def test_a_run_by_another_path(claimed, two_step_run, tmp_path):
    assert claimed(init_from=f"{two_step_run}@2").number == 1
    shutil.copytree(two_step_run, tmp_path / "copied")
    assert claimed(init_from=f"{tmp_path / 'copied'}@2").number == 2
    entry = tmp_path / "copied/log/00000002"
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"manifest": "0" * 64}))
    with pytest.raises(UserError, match="init_from: .*@2.* -> .*copied@2"):
        claimed(init_from=f"{tmp_path / 'copied'}@2")


def test_a_run_of_an_old_version_adopts_what_it_finds(claimed, two_step_run, tmp_path):
    """Versions up to a2e80d5 recorded no digest."""
    file, _ = weights_of(two_step_run, tmp_path / "first")
    run = claimed(init_from=file).run
    start = Path(run.url, "attempts/1/start.json")
    record = json.loads(start.read_text())
    assert record.pop("init_from") == xxh3_128_hexdigest(Path(file).read_bytes())
    start.write_text(json.dumps(record))
    run.log.commit(1, 1, "steps/1", "00")
    moved = str(Path(file).rename(tmp_path / "moved.safetensors"))
    with pytest.raises(UserError, match="init_from: "):  # nobody knows what it began with
        claimed(init_from=moved)
    assert claimed(init_from=file).number == 2  # gone, and not needed
    assert run.recorded("init_from") is None
    Path(moved).rename(file)
    assert claimed(init_from=file).number == 3
    Path(file).rename(moved)
    assert claimed(init_from=moved).number == 4
