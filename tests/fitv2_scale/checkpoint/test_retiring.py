"""Commits that must outlive a save: an older one whose successor is gone, and one whose reply was lost."""

import shutil
from dataclasses import replace
from pathlib import Path

from data_sharding.storage.local_store import LocalStore
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.checkpoint.commit import verify_commit
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.run.log import RunLog
from tests.support.checkpoint_state import CURSOR, State, opened, saver
from tests.support.ranks import run_ranks


def save_after_a_loss(url: str) -> list[int]:
    """The commits that stay when of two the newer one's files are gone, and a third is made."""
    with opened({}, url) as (world, run):
        save = saver(world, run, keep_last=2)
        assert [save(1), save(2)] == [None, None]
        shutil.rmtree(run.store.path(run.log.commits()[-1].fields["path"]))
        assert save(3) is None
        shutil.rmtree(run.store.path(run.log.commits()[-1].fields["path"]))  # now the newest is lost as well
        state = State(-1, world)
        assert restore(state, run, world).step == 1 and state.is_whole(1)
        return [entry.fields["step"] for entry in run.log.commits()]


def test_an_old_commit_is_kept_while_the_newer_ones_are_gone(tmp_path):
    """Two are to be kept; of those three one is no more, so none may go."""
    assert run_ranks(1, save_after_a_loss, str(tmp_path / "run")) == [[1, 2, 3]]


class LosesTheReply(LocalStore):
    """Writes the first COMMIT, loses the reply, and cannot be asked whether it is there."""

    lost = answers = False

    def create(self, path: str, data: bytes) -> None:
        super().create(path, data)
        if b'"COMMIT"' in data and not self.lost:
            self.lost = True
            raise TimeoutError("no reply")

    def read_range(self, path, begin, end, check, buffer=None):
        if self.lost and not self.answers and path.startswith("log/"):
            self.answers = True
            raise TimeoutError("no reply")
        return super().read_range(path, begin, end, check, buffer)


def save_twice(url: str) -> tuple[str | None, list[str], list[list[str]]]:
    """Why the first save failed, the folders of both, and what is wrong with each commit."""
    with opened({}, url) as (world, run):
        store = LosesTheReply(url)
        run = replace(run, store=store, log=RunLog(store))
        attempt = run.claim({})
        checkpoints = Checkpointer(State(5, world), attempt, world)
        checkpoints.start_save(5, CURSOR, accounting={"steps": 1.0})
        failed = checkpoints.finish_save()
        checkpoints.start_save(5, CURSOR, accounting={"steps": 2.0})  # the manifest differs
        assert checkpoints.finish_save() is None
        commits = run.log.commits()
        return failed, [entry.fields["path"] for entry in commits], [verify_commit(run, entry) for entry in commits]


def test_a_save_is_not_written_over_a_commit_whose_reply_was_lost(tmp_path):
    ((failed, folders, problems),) = run_ranks(1, save_twice, str(tmp_path / "run"))
    assert failed is not None and "no reply" in failed
    assert len(set(folders)) == 2 and problems == [[], []]
    assert all(Path(tmp_path, "run", folder, "manifest.json").exists() for folder in folders)
