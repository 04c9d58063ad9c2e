"""Attempt after attempt on one machine, without Slurm: real processes, really killed."""

import os
import random
import signal
import subprocess
import sys

import pytest
import yaml

from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import DONE, train
from launchers.supervise import Signals, _killed, run_processes, supervise
from tests.support.commits import commit_bytes
from tests.support.kill_storm import check_storm
from tests.support.rank_processes import ranks_of_config
from tests.support.ranks import run_ranks
from tests.support.run_history import audited, reach, trained
from tests.support.waiting import wait


@pytest.fixture
def supervised(tiny, tmp_path):
    """Starts `fitv2 train --supervise` with two processes; kills what is left of it at the end."""
    started = []

    def start(config) -> subprocess.Popen:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = [sys.executable, "-m", "fitv2_scale.cli", "train", str(file), "--supervise", "--processes", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_a_killed_rank_costs_one_attempt(supervised, tiny, tmp_path):
    config = tiny(train__steps=120, checkpoint__every_steps=10)
    process = supervised(config)
    reach(config.run, 0, 1)
    ranks = ranks_of_config(tmp_path / "config.yaml")
    reach(config.run, 15, 1)
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(200) == 0, process.stderr.read()
    killed, *later = status(Run.open(config.run))["attempts"]
    assert (killed["code"], killed["why"]) == (75, "rank 1 was killed (SIGKILL; out of memory?)")
    assert [a["code"] for a in later] == [0]
    undisturbed = tiny("undisturbed", train__steps=120, checkpoint__every_steps=10)
    assert run_ranks(2, train, undisturbed) == [DONE] * 2
    assert trained(config.run) == trained(undisturbed.run)
    assert commit_bytes(config.run) == commit_bytes(undisturbed.run)


def test_a_storm(supervised, tiny, tmp_path):
    """A random rank is killed, twice; each attempt gets to do a hundred steps and some. The full figure, of
    fifteen minutes, is in test_slurm_faults."""
    config, rng = tiny(train__steps=1_000_000, checkpoint__every_steps=10), random.Random(0)
    process, done = supervised(config), 0
    for attempt in (1, 2):
        reach(config.run, done + rng.randrange(100, 200), attempt)
        os.kill(rng.choice(list(ranks_of_config(tmp_path / "config.yaml").values())), signal.SIGKILL)
        wait("the next attempt", lambda following=attempt + 1: audited(config.run, following))
        done = audited(config.run, attempt + 1)[0]
    reach(config.run, done + 100, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, process.stderr.read()
    check_storm(config.run, tiny, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_supervisor_saves_and_ends(supervised, tiny, number):
    config = tiny(train__steps=100_000, checkpoint__every_steps=50_000)
    process = supervised(config)
    reach(config.run, 3, 1)
    process.send_signal(number)
    assert process.wait(120) == 75, process.stderr.read()
    report = status(Run.open(config.run))
    (attempt,) = report["attempts"]
    assert attempt["code"] == 75 and attempt["why"].startswith(f"{signal.Signals(number).name}: saved at step")
    assert report["last_commit"]["step"] >= 3


@pytest.mark.parametrize("at_once", [False, True])
def test_a_stop_ends_the_attempt_and_the_supervisor(supervised, tiny, at_once):
    config = tiny(train__steps=100_000, checkpoint__every_steps=50_000)
    process = supervised(config)
    reach(config.run, 3, 1)
    Run.open(config.run).log.stop(at_once)
    assert process.wait(120) == 75, process.stderr.read()
    report = status(Run.open(config.run))
    (attempt,) = report["attempts"]
    assert attempt["why"].startswith("STOP: at once" if at_once else "STOP: saved at step")
    assert (report["last_commit"] is None) == at_once


def test_three_attempts_without_a_commit_are_enough(tiny, tmp_path, capfd):
    counter, events = tmp_path / "count", tmp_path / "events"
    command = [sys.executable, "-c", f"open({str(counter)!r}, 'a').write('x'); raise SystemExit(1)"]
    config = tiny(slurm__on_event=f"printf '%s|%s|%s\\n' >>{events}")
    assert supervise(config, command, 1) == 93
    assert events.read_text().startswith(f"no-progress|{config.run}|3 jobs in a row ended without a new commit")
    assert counter.read_text() == "xxx"
    assert "3 jobs in a row ended without a new commit" in capfd.readouterr().err


def test_a_supervisor_that_nobody_reads_starts_the_next_attempt(tiny, tmp_path, monkeypatch):
    """Its terminal is gone, or its `| head` has seen enough."""
    command = [sys.executable, "-c", f"open({str(tmp_path / 'count')!r}, 'a').write('x'); raise SystemExit(1)"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as unread:
        monkeypatch.setattr(sys, "stderr", unread)
        assert supervise(tiny(), command, 1) == 93
    assert (tmp_path / "count").read_text() == "xxx"


def test_a_signal_before_there_are_ranks_is_passed_on():
    waits = "import signal; raise SystemExit(7 * (signal.sigwait({signal.SIGTERM, signal.SIGUSR1}) == signal.SIGTERM))"
    assert run_processes([sys.executable, "-c", waits], 2, Signals(received=signal.SIGTERM)).code == 7


def test_bad_input_is_not_tried_again(tiny, capfd):
    assert supervise(tiny(), [sys.executable, "-c", "raise SystemExit(2)"], 2) == 2


@pytest.mark.parametrize(
    "codes,said",
    [
        ([None, -9], "rank 1 was killed (SIGKILL; out of memory?)"),
        ([1, -9], "rank 1 was killed (SIGKILL; out of memory?)"),  # the other one met what that broke
        ([1, -7], "rank 1 died of SIGBUS: a mapped file could not be read; check the storage of the dataset"),
        ([None, -11], "rank 1 died of SIGSEGV"),
        ([-6, 1], ""),  # rank 1 failed, and NCCL aborts rank 0
        ([75, -9], "rank 1 was killed (SIGKILL; out of memory?)"),
        ([75, None], ""),
    ],
)
def test_which_rank_was_killed(codes, said):
    assert _killed(codes) == said
