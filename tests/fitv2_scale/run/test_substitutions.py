"""If a frame cannot be read, all ranks substitute the same images, and nothing but the frame's own images changes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_sharding.errors import DataError
from data_sharding.format.manifest import Manifest
from data_sharding.plan.balance import assign_packs
from data_sharding.plan.plan import Plan, Segment
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.store import Store
from data_sharding.stream.substitutes import LostFrame, Substitutes
from fitv2_scale.cli.__main__ import main
from fitv2_scale.data import Data
from fitv2_scale.run.log import RunLog, StaleAttempt
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.run.substitutions import SubstitutionLog, substitutes_of, substitution_records
from fitv2_scale.train.loop import BAD_INPUT, DONE, train
from tests.support.commits import commit_bytes
from tests.support.paused_training import train_paused
from tests.support.ranks import Ranks, run_ranks
from tests.support.run_history import losses, reach, trained
from tests.support.scripted_store import ScriptedStore
from tests.support.tiny_runs import make_tiny


def open_log(store: Store, manifest, share: float = 0.5) -> SubstitutionLog:
    log = RunLog(store)
    return SubstitutionLog(substitution_records(store), log, log.claim().attempt, 0, share, Substitutes([manifest]))


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(str(tmp_path))


def test_pages_are_written_once_and_found_again(store, manifest):
    record_log = open_log(store, manifest)
    records = record_log.write([LostFrame(0, 1, "one"), LostFrame(0, 1, "said by another rank")], step=7)
    assert [f["frame"] for record in records for f in record["frames"]] == [1] and records[0]["step"] == 7
    substitutes = record_log.apply(records)
    assert record_log.write([LostFrame(0, 1, "one")], step=8) == []
    record_log.apply(record_log.write([LostFrame(0, 3, "three")], step=9))
    again = substitutes_of(substitution_records(store).entries(), [manifest])
    assert again.version == 2 and again.frames.keys() == {(0, 1), (0, 3)}
    assert np.array_equal(again.frames[0, 1], substitutes.frames[0, 1])


def test_a_stale_attempt_writes_nothing(store, manifest):
    old = open_log(store, manifest)
    open_log(store, manifest)
    with pytest.raises(StaleAttempt, match="attempt 1 was superseded by attempt 2"):
        old.write([LostFrame(0, 1, "one")], step=0)
    assert substitutes_of(substitution_records(store).entries(), [manifest]).version == 0


def test_a_page_of_an_older_attempt(manifest):
    store = ScriptedStore(["ok", "raced"])
    record_log = open_log(store, manifest)

    def write_the_same_frame():
        record = Substitutes([manifest]).next_record([LostFrame(0, 2, "theirs")], 0)
        store.create("ledger/00000001.json", json.dumps(record | {"nonce": "another"}).encode())

    store.rival = write_the_same_frame
    records = record_log.write([LostFrame(0, 2, "ours")], 0)  # nothing is left to write
    assert [p["frames"][0]["cause"] for p in records] == ["theirs"] and record_log.apply(records).version == 1


def test_a_damaged_page_is_reported(store, manifest):
    record_log = open_log(store, manifest)
    record_log.write([LostFrame(0, 1, "one")], 0)
    store.put("ledger/00000001.json", b'{"version": 1')
    with pytest.raises(DataError, match="ledger/00000001.json is not a record of substituted images"):
        substitutes_of(substitution_records(store).entries(), [manifest])


# The whole way: training on a dataset one of whose five frames is gone.


@pytest.fixture
def damaged(dataset, tmp_path) -> str:
    copy = tmp_path / "damaged"
    shutil.copytree(dataset, copy)
    (copy / Manifest.load(dataset).shards[-1].name).unlink()  # 40 of 240 images
    return str(copy)


def damaged_config(damaged, folder, name, **changes):
    return make_tiny(damaged, folder, name, **{"data__max_substituted": 0.2, "train__steps": 24} | changes)


def test_training_continues_with_substitutes_whatever_the_layout(damaged, tmp_path, capsys):
    runs = {size: damaged_config(damaged, tmp_path, f"on{size}") for size in (1, 3)}
    for size, config in runs.items():
        assert run_ranks(size, train, config) == [DONE] * size
    one, three = runs[1].run, runs[3].run
    assert losses(one) == pytest.approx(losses(three), rel=1e-5)
    assert trained(one) == trained(three)  # ids, times and noise are the planned ones
    records = [json.loads(Path(run, "ledger/00000001.json").read_text()) for run in (one, three)]
    assert records[0]["frames"] == records[1]["frames"] and records[0]["step"] == records[1]["step"]
    assert not Path(one, "ledger/00000002.json").exists()

    substituted = status(Run.open(one))["substituted"]
    assert (substituted["version"], substituted["frames"], substituted["images"]) == (1, 1, 40)
    assert main(["status", one]) == 0
    assert "40 images of 1 frames are substituted: " in capsys.readouterr().out
    manifest_json = next(Path(one, "steps").glob("00000024*/manifest.json"))
    assert json.loads(manifest_json.read_text())["cursor"]["ledger"] == 1


def test_a_dataset_listed_twice(damaged, tmp_path):
    config = damaged_config([damaged, damaged], tmp_path, "twice")
    assert run_ranks(2, train, config) == [DONE, DONE]
    assert status(Run.open(config.run))["substituted"]["frames"] == 1
    assert sorted(losses(config.run)) == list(range(1, 25))


def train_where_records_change_nothing(config) -> int:
    Substitutes.with_record = lambda self, record: replace(self, version=record["version"])
    return train(config)


def test_a_record_that_changes_nothing_ends_the_run(damaged, tmp_path):
    config = damaged_config(damaged, tmp_path, "endless")
    with pytest.raises(RuntimeError, match=r"frame 4 .*cannot be read .*recording substitutes for it changes nothing"):
        run_ranks(1, train_where_records_change_nothing, config)
    assert len(list(Path(config.run, "ledger").iterdir())) == 1


def test_every_planned_id_counts_and_substitutes_are_counted(damaged, dataset, tmp_path):
    from fitv2_scale.tracking.journal import read

    with_loss, whole = damaged_config(damaged, tmp_path, "lost"), make_tiny(dataset, tmp_path, "whole", train__steps=24)
    assert run_ranks(2, train, with_loss) == run_ranks(2, train, whole) == [DONE, DONE]
    planned = [
        {step: [image[:3] for image in images] for step, images in trained(run).items()}  # epoch, id and t of each
        for run in (with_loss.run, whole.run)
    ]
    assert planned[0] == planned[1]
    plan = Plan([Manifest.load(dataset)], 0, "mixed", [Segment(0, 12, (1,))])
    expected = {k + 1: int((plan.step(k).row >= 200).sum()) for k in range(24)}
    counted = {r.step: r.metrics["substituted_images"] for r in read(Run.open(with_loss.run)) if r.metrics}
    assert counted == expected
    first = min(step for step, count in expected.items() if count)
    a, b = losses(with_loss.run), losses(whole.run)
    assert {k: v for k, v in a.items() if k < first} == {k: v for k, v in b.items() if k < first}
    assert a[first] != b[first]


def lose_on_one_rank(config, rank: int) -> int:
    """One rank alone cannot read frame 4; the others have it, perhaps in a batch that waits already."""
    from data_sharding.stream.frames import FrameReader, UnreadableFrame

    read = FrameReader.read
    if int(os.environ["RANK"]) == rank:
        FrameReader.read = lambda self, m, f: (
            read(self, m, f) if f != 4 else _raise(UnreadableFrame("the shard is missing"))
        )
    return train(config)


def _raise(error: Exception):
    raise error


def _both_ranks_need_it_first_in_one_step(config) -> bool:
    """Of frame 4, whose images are rows 200 and up, on two ranks."""
    data = Data.open(config, (2,))
    for k in range(24):
        images = data.plan.step(k)
        packs = assign_packs(images.tokens, data.cost, data.nodes, data.shapes[0]).packs
        needs = [(images.row[np.concatenate(rank)] >= 200).any() for rank in packs]
        if any(needs):
            return all(needs)
    return False


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_loses_is_lost_to_all(damaged, dataset, tmp_path, rank):
    """The run is the same as if no rank could read it, from the step on that met the loss."""
    seed = next(s for s in range(99) if _both_ranks_need_it_first_in_one_step(make_tiny(dataset, tmp_path, seed=s)))
    for_all = damaged_config(damaged, tmp_path, "for_all", seed=seed)
    for_one = damaged_config(dataset, tmp_path, "for_one", seed=seed)
    assert run_ranks(2, train, for_all) == run_ranks(2, lose_on_one_rank, for_one, rank) == [DONE, DONE]
    records = [json.loads(Path(c.run, "ledger/00000001.json").read_text()) for c in (for_all, for_one)]
    assert records[0]["step"] == records[1]["step"]
    assert records[0]["frames"][0]["images"] == records[1]["frames"][0]["images"]
    assert commit_bytes(for_all.run) == commit_bytes(for_one.run)


def test_a_run_killed_in_between_ends_bit_equal(damaged, tmp_path):
    undisturbed, killed = (damaged_config(damaged, tmp_path, name) for name in ("undisturbed", "killed"))
    assert run_ranks(2, train, undisturbed) == [DONE, DONE]
    ranks = Ranks(2, train_paused, killed, 18)
    reach(killed.run, 14, attempt=1)
    ranks.kill()
    record = Path(killed.run, "ledger/00000001.json").read_bytes()
    assert run_ranks(2, train, killed) == [DONE, DONE]
    assert Path(killed.run, "ledger/00000001.json").read_bytes() == record
    assert commit_bytes(killed.run) == commit_bytes(undisturbed.run)
    # A commit needs the records of the substitutes that it was made with.
    Path(killed.run, "ledger/00000001.json").unlink()
    longer = damaged_config(damaged, tmp_path, "killed", train__steps=30)
    with pytest.raises(
        DataError, match="ledger holds 0 records of substituted images, but the commit at step 24 was made with 1"
    ):
        run_ranks(2, train, longer)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_more_than_the_allowed_share_saves_and_stops_the_run(damaged, dataset, tmp_path, share):
    """With this seed, 5 steps of 4 images need none of the lost frame, whose images are rows 200 and up."""
    changes = {"seed": 12, "batch__images": 4, "checkpoint__every_steps": 10**6, "train__steps": 12}
    plan = Plan([Manifest.load(dataset)], 12, "mixed", [Segment(0, 4, (1,))])
    done = next(k for k in range(12) if (plan.step(k).row >= 200).any())
    assert done == 5
    config = damaged_config(damaged, tmp_path, "run", data__max_substituted=share, **changes)
    said = rf"40 images cannot be read, more than data.max_substituted = {share:g} allows .* saved at step {done}$"
    with pytest.raises(DataError, match=said):
        run_ranks(2, train, config)
    report = status(Run.open(config.run))
    assert report["attempts"][0]["code"] == BAD_INPUT and "the shard is missing" in report["attempts"][0]["why"]
    assert report["last_commit"]["step"] == done and sorted(losses(config.run)) == list(range(1, done + 1))
    assert not Path(config.run, "ledger").exists()
    # With more allowed, it continues as if that had been allowed at first.
    undisturbed, allowed = (damaged_config(damaged, tmp_path, name, **changes) for name in ("undisturbed", "run"))
    assert run_ranks(2, train, allowed) == run_ranks(2, train, undisturbed) == [DONE, DONE]
    assert commit_bytes(allowed.run) == commit_bytes(undisturbed.run)
