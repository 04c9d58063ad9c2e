"""Which signals ask a run to save and end. Imports nothing slow: launchers hold them back before anything else."""

import signal

# SIGTERM; SIGHUP of a closed terminal or SSH session; Ctrl-C; and what batch systems send before they kill: SIGUSR1
# (Slurm, as asked), SIGUSR2 and SIGXCPU (LSF, Grid Engine).
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
SUPERVISED = "FITV2_SUPERVISED"  # in the environment of the ranks of `fitv2 train --supervise`: its process id


def noted_signals() -> tuple[signal.Signals, ...]:
    """Those that this process is to note: not SIGHUP if the caller ignores it, as `nohup` does."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP))


def held_back() -> str | None:
    """The name of one that has come while it was blocked; None if none has."""
    return next((number.name for number in noted_signals() if number in signal.sigpending()), None)
