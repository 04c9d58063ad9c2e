"""A run's folder with files that others put there, which are ignored, and with entries deleted, which is named."""

import json
import shutil
from pathlib import Path

import pytest

from data_sharding.errors import DataError
from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import DONE, train
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import make_tiny

FOLDERS = ["", "log", "steps", "attempts", "attempts/1", "attempts/1/journal", "ledger", "quarantine", "chain"]
FOLDERS += ["tracking", "samples", "jobs", "evaluations", "evaluations/2"]
# An open file that was deleted on NFS, a desktop's, a killed writer's, an editor's, and names that look like ours.
NAMES = [".nfs0000000a1", ".DS_Store", "._00000001.json", ".x.tmp", ".00000001.0123456789abcdef.tmp", "00000001~"]
NAMES += ["1.json", "00000009.json.bak", "٣.json", "½", "core.123"]


@pytest.fixture
def littered(two_step_run, tmp_path) -> str:
    """A copy of a run with a commit at step 2."""
    run = tmp_path / "run"
    shutil.copytree(two_step_run, run)
    for folder in FOLDERS:
        (run / folder).mkdir(exist_ok=True)
        for name in NAMES:
            (run / folder / name).write_bytes(b"{\x00")
    (run / "quarantine" / "deeper").mkdir()
    (run / "quarantine" / "deeper" / "00000001.json").write_text("{}")
    (run / "steps" / "00000001").mkdir()
    (run / "steps" / "old.0001.1").mkdir()
    return str(run)


def test_foreign_files_are_ignored(littered, dataset, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # `curves` writes its report there
    for words in (["status"], ["checkpoint", "list"], ["checkpoint", "verify"], ["checkpoint", "sweep"], ["curves"]):
        assert main([*words, littered]) == 0
        assert "Traceback" not in capsys.readouterr().err
    config = make_tiny(dataset, Path(littered).parent, train__steps=8, checkpoint__every_steps=2, ema__decay=0.1)
    assert run_ranks(1, train, config) == [DONE]  # its saves retire older commits
    assert [entry.fields["step"] for entry in Run.open(littered).log.commits()][-1] == 8


@pytest.mark.parametrize("missing", [1, 2])
def test_a_gap_in_the_log_is_named(two_step_run, dataset, tmp_path, missing, capsys):
    run = tmp_path / "run"
    shutil.copytree(two_step_run, run)
    entry = run / "log" / f"{missing:08d}"
    entry.unlink()
    sentence = f"{entry} is missing" if missing == 1 else "has lost its end"
    config = make_tiny(dataset, tmp_path, train__steps=4, ema__decay=0.1)
    if missing == 1:
        assert main(["status", str(run)]) == 2
        assert f"{entry} is missing, though there are entries up to 2: restore it" in capsys.readouterr().err
        with pytest.raises(DataError, match=f"{sentence}.*restore"):
            run_ranks(1, train, config)
    else:  # the COMMIT was the last: the run begins at its CLAIM again, as an attempt that committed nothing
        assert run_ranks(1, train, config) == [DONE]


def test_a_log_that_lost_its_end_is_named(two_step_run, dataset, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two_step_run, run)
    for entry in (run / "log").iterdir():
        entry.unlink()
    with pytest.raises(DataError, match="has lost its end: attempt 1 was here and is not in it; restore"):
        run_ranks(1, train, make_tiny(dataset, tmp_path, train__steps=4, ema__decay=0.1))
    assert not list((run / "log").iterdir())


def test_a_folder_in_the_place_of_an_entry_is_named(two_step_run, dataset, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two_step_run, run)
    (run / "log" / "00000003").mkdir()
    with pytest.raises(DataError, match="00000003 is no file: remove it"):
        run_ranks(1, train, make_tiny(dataset, tmp_path, train__steps=4, ema__decay=0.1))


def test_the_journal_ends_at_a_line_that_is_none(tmp_path):
    from fitv2_scale.tracking.journal import Position, read_attempt

    run = Run.open_or_create(str(tmp_path / "run"), {}, {}, None)
    run.claim({})
    folder = tmp_path / "run" / "attempts" / "1" / "journal"
    folder.mkdir()
    good = {"step": 1, "time_ms": 5, "metrics": {"loss": 1.0}}
    for line in (b"3\n", b"[]\n", b"{}\n", b'{"step": "1"}\n', b'{"step": 1, "time_ms": null}\n', b"\x00" * 40 + b"\n"):
        (folder / "00000.jsonl").write_bytes(
            json.dumps(good).encode() + b"\n" + line + json.dumps(good).encode() + b"\n"
        )
        assert [record.step for record in read_attempt(run, Position(1))] == [1]
