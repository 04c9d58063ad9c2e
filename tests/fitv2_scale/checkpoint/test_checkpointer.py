"""Checkpoints: any layout reads any other's, damaged commits are found and skipped, and nothing is unpickled."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.checkpoint.checksums import CHUNK
from fitv2_scale.checkpoint.commit import verify_commit
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.parallel.world import World
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import train
from tests.support.checkpoint_state import CURSOR, State, opened, saver
from tests.support.commits import commit_bytes, newest_commit, read_tensors
from tests.support.hostile_pickle import Touch
from tests.support.memory import peak_growth
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A short run on three ranks: odd shapes everywhere (85-wide MLP, 6 label rows)."""
    from tests.support.tiny_runs import make_tiny

    config = make_tiny(dataset, tmp_path_factory.mktemp("trained"), "run", train__steps=4)
    assert run_ranks(3, train, config) == [0, 0, 0]
    return config


def test_the_commit_holds_every_logical_tensor_once(trained):
    shapes = logical_shapes(trained.model)
    tensors = read_tensors(trained.run)
    kinds = ("param", "ema", "exp_avg", "exp_avg_sq")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"{k}/{n}": s for k in kinds for n, s in shapes.items()
    }
    manifest = json.loads((newest_commit(trained.run) / "manifest.json").read_text())
    for name, tensor in manifest["tensors"].items():
        covered = np.zeros(tensor["shape"], int)
        for box in tensor["boxes"]:
            covered[tuple(slice(o, o + n) for o, n in zip(box["offset"], box["shape"], strict=True))] += 1
        assert (covered == 1).all(), name
    assert manifest["scalars"] == {"optimizer_step": 4.0} and manifest["moments"] == sorted(shapes)
    assert len(json.dumps(manifest["cursor"])) < 1024


def test_anyone_can_read_the_files(trained):
    for file in newest_commit(trained.run).glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            keys = list(opened.keys())
            assert keys and all(np.isfinite(opened.get_tensor(key)).all() for key in keys)
    suffixes = {p.suffix for p in Path(trained.run, "steps").rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json"}


def two_saves(url: str) -> list[str | None]:
    with opened({}, url) as (world, run):
        save = saver(world, run)
        return [save(1), save(2)]


def damages(data: bytes) -> Iterator[bytes | None]:
    """One byte flipped, at the ends and between; the file cut, empty, gone."""
    for at in {0, 8, *range(9, len(data), len(data) // 6), len(data) - 1}:
        yield data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    yield from (data[:-1], b"", None)


def restore_damaged(url: str) -> list[str]:
    """Restores after each damage to each file of the commit at step 2; returns the files."""
    with opened({}, url) as (world, run):
        state = State(-1, world)
        paths = run.store.list(f"{run.log.commits()[-1].fields['path']}/")
        for file in (Path(run.store.path(path)) for path in paths):
            whole = file.read_bytes()
            for data in damages(whole):
                file.unlink() if data is None else file.write_bytes(data)
                restored = restore(state, run, world)
                assert restored.step == 1 and state.is_whole(1), file.name
                (said,) = restored.quarantined
                assert "the commit at step 2 is damaged" in said and file.name in said
                file.write_bytes(whole)
        assert restore(state, run, world).step == 2 and state.is_whole(2)  # nothing was lost
        return [Path(path).name for path in paths]


def test_any_damage_to_any_file_is_found_and_falls_back(tmp_path):
    url = str(tmp_path / "run")
    assert run_ranks(2, two_saves, url) == [[None, None]] * 2
    (files,) = run_ranks(1, restore_damaged, url)
    assert files == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]


@pytest.mark.parametrize("damage", ["flip", "pickle"])
def test_a_damaged_commit_is_passed_over(tiny, damage):
    """Training continues from the one before, and ends as if there had been no other."""
    config = tiny(train__steps=10)
    assert run_ranks(2, train, config) == [0, 0]
    undisturbed = commit_bytes(config.run)
    file = newest_commit(config.run) / "rank-00001.safetensors"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(pickle.dumps(Touch(str(Path(config.run, "planted")))))
    assert verify_commit(Run.open(config.run), Run.open(config.run).log.commits()[-1])

    longer = tiny(train__steps=12)
    assert run_ranks(2, train, longer) == [0, 0]  # from step 5 again
    record = json.loads(next(Path(config.run, "quarantine").iterdir()).read_text())
    assert record["path"] == "steps/00000010.0001" and file.name in record["problem"]
    assert Path(config.run, "steps/00000010.0001").exists()  # nothing was deleted
    assert not Path(config.run, "planted").exists()
    whole = tiny("whole", train__steps=12)
    assert run_ranks(2, train, whole) == [0, 0]
    assert commit_bytes(config.run) == commit_bytes(whole.run) != undisturbed


def test_a_finished_run_whose_last_commit_is_damaged_trains_it_again(tiny):
    """The same command as before repairs it, bit for bit; a run that is whole has nothing to do, on any processes."""
    config = tiny(train__steps=6, checkpoint__every_steps=4)
    assert run_ranks(2, train, config) == [0, 0]
    undisturbed, file = commit_bytes(config.run), newest_commit(config.run) / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert run_ranks(2, train, config) == [0, 0]
    assert [(e.fields["step"], e.attempt) for e in Run.open(config.run).log.commits()] == [(4, 1), (6, 1), (6, 2)]
    assert commit_bytes(config.run) == undisturbed
    assert run_ranks(3, train, config) == [0, 0, 0]
    assert Run.open(config.run).log.entries()[-1].attempt == 2  # nothing was claimed


def test_when_all_commits_are_damaged_training_stops_with_a_sentence(tiny):
    config = tiny(train__steps=5)
    assert run_ranks(2, train, config) == [0, 0]
    (newest_commit(config.run) / "rank-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"all commits are damaged: .*step 5.*rank-00000.safetensors is missing"):
        run_ranks(2, train, tiny(train__steps=8))
    with pytest.raises(UserError, match=r"/run: the commit at step 5 is damaged \(.*safetensors is missing\)$"):
        run_ranks(1, train, tiny("fork", train__steps=8), f"{config.run}@5")
    assert newest_commit(config.run).exists()


def test_retention_keeps_the_last(tiny):
    config = tiny(train__steps=12, checkpoint__every_steps=2, checkpoint__keep_last=2)
    assert run_ranks(1, train, config) == [0]
    assert [e.fields["step"] for e in Run.open(config.run).log.commits()] == [10, 12]
    assert sorted(p.name for p in Path(config.run, "steps").iterdir()) == ["00000010.0001", "00000012.0001"]


def test_frozen_tensors_have_no_moments(tiny):
    config = tiny(trainable=["blocks.*.adaLN_modulation.*"], train__steps=3)
    assert run_ranks(2, train, config) == [0, 0]
    tensors = read_tensors(config.run)
    moments = {n.split("/", 1)[1] for n in tensors if n.startswith("exp_avg/")}
    assert moments == {n for n in logical_shapes(config.model) if ".adaLN_modulation." in n and n.startswith("blocks")}
    for name in logical_shapes(config.model):
        if name not in moments:
            assert torch.equal(tensors[f"param/{name}"], tensors[f"ema/{name}"])
    assert run_ranks(1, train, tiny(trainable=["blocks.*.adaLN_modulation.*"], train__steps=5)) == [0]


# Memory


class Large(State):
    """Four tensors of 67 MB."""

    def __init__(self, step: int, world: World):
        super().__init__(step, world, rows=1)
        self.shapes = {f"{kind}/w": (14_000, 1200) for kind in ("param", "ema", "exp_avg", "exp_avg_sq")}
        self.tensors = {name: self._mine(tensor).clone() for name, tensor in self.expected(step).items()}


def save_and_load(url: str) -> tuple[int, int, int]:
    """Growth by what saves need, by a save, and by a load."""
    with opened({}, url) as (world, run):
        state, attempt, made = Large(1, world), run.claim({}), []
        allocated = peak_growth(lambda: made.append(Checkpointer(state, attempt, world)))
        saved = peak_growth(lambda: made[0].save(1, CURSOR))
        loaded = peak_growth(lambda: restore(state, run, world))
        assert state.is_whole(1)
        return allocated, saved, loaded


def test_memory_that_a_save_and_a_load_take(tmp_path):
    """Of a state of 269 MB: a save, one buffer of its size; a load, the rooms into which chunks are fetched ahead."""
    ((allocated, saved, loaded),) = run_ranks(1, save_and_load, str(tmp_path / "run"))
    assert allocated < 1.05 * 269e6 and saved < 40e6 and loaded < 7 * CHUNK, (allocated, saved, loaded)
