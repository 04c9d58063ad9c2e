"""What a signal says and does at once, whatever the main thread is doing."""

import os
import signal
import subprocess
import sys

from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.stop_signals import STOP_SIGNALS, SUPERVISED
from fitv2_scale.train.signals import StopSignal

# The main thread is in C and hears no signal, as in a collective.
DEAF = """
import ctypes, signal
import fitv2_scale.train.signals as module
module._PATIENCE = 0.2
with module.StopSignal().caught() as stop:
    stop.step = 12
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(600)
"""


def test_a_signal_is_answered_at_once_and_a_second_ctrl_c_ends_even_a_deaf_process():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", DEAF], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "fitv2: SIGTERM: saving at step 12 or soon after, then it ends\n"
        process.send_signal(signal.SIGINT)
        expected = "fitv2: SIGINT: saving at step 12 or soon after, then it ends; Ctrl-C again quits without saving\n"
        assert process.stderr.readline() == expected
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "fitv2: Ctrl-C again: quits without saving\n"
        assert process.wait(60) == 130


NOTED = """
import os, signal, sys
from fitv2_scale.train.signals import StopSignal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as a shell starts it: these tests may run under nohup
with StopSignal().caught() as stop:
    for name in sys.argv[1:]:
        os.kill(os.getpid(), signal.Signals[name])
        print(stop.name, flush=True)
"""


def test_every_signal_that_asks_to_save_is_noted_and_kills_nobody():
    """SIGHUP is that of a closed terminal or SSH session."""
    names = ["SIGHUP", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGINT"]
    done = subprocess.run([sys.executable, "-c", NOTED, *names], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, names)


# Held back in the main thread before, as in a rank; a thread of training, which holds nothing back, outlives it.
LEAVING = """
import os, signal, sys, threading
from fitv2_scale.train.signals import STOP_SIGNALS, StopSignal
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
with StopSignal().caught(for_good=True):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    os.kill(os.getpid(), signal.SIGUSR1)
for number in STOP_SIGNALS:
    os.kill(os.getpid(), number)
sys.exit(75)
"""


def test_a_rank_that_leaves_does_not_die_of_a_repeated_signal():
    assert subprocess.run([sys.executable, "-c", LEAVING]).returncode == 75


def test_only_the_command_ignores_signals_for_good(monkeypatch, tmp_path):
    handlers, asked = [signal.getsignal(number) for number in STOP_SIGNALS], []
    with StopSignal().caught():
        pass
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    monkeypatch.setattr("fitv2_scale.train.loop.train", lambda config, fork, ends_process: asked.append(ends_process))
    assert main(["train", "configs/demo.yaml", f"run={tmp_path}"]) is None and asked == [True]


def test_other_ranks_say_nothing(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with StopSignal().caught() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.name == "SIGUSR1"
    assert capfd.readouterr().err == ""


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal().caught() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_the_others_have_joined_nothing_is_said_of_loading(monkeypatch, capfd):
    """What waits for them ends, and says so. If they come after all, the signal holds for training."""
    monkeypatch.setenv("RANK", "0")
    with StopSignal(joins=True).caught() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
    assert capfd.readouterr().err == ""
    stop.joined()
    assert capfd.readouterr().err == "fitv2: SIGTERM: ends when it has loaded\n"
    (again := StopSignal(joins=True)).joined()
    assert capfd.readouterr().err == "" and again.name is None


HELD = """
import os, signal
from fitv2_scale.run.stop_signals import STOP_SIGNALS, held_back
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
print(held_back())
os.kill(os.getpid(), signal.SIGHUP)
print(held_back())
os.kill(os.getpid(), signal.SIGUSR1)
print(held_back(), flush=True)
os._exit(0)
"""


def test_a_signal_that_is_held_back_is_seen():
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["None", "None", "SIGUSR1"])


def test_a_rank_whose_launcher_has_died_saves(monkeypatch):
    monkeypatch.setenv(SUPERVISED, str(os.getppid()))
    assert StopSignal().name is None
    monkeypatch.setenv(SUPERVISED, str(os.getpid()))  # not this process's parent: as after the parent's death
    assert StopSignal().name == "the launcher died"
    monkeypatch.delenv(SUPERVISED)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    stop = StopSignal()
    assert stop.name is None
    monkeypatch.setattr(os, "getppid", lambda: 1)  # torchrun was killed, and init has taken over
    assert stop.name == "the launcher died"
