"""Notifications about a run: to people by ``slurm.on_event``, to MLflow by `fitv2 track sync`."""

import subprocess
import sys

from fitv2_scale.run.log import newest_attempt
from fitv2_scale.run.run import Run

_EVENT_SECONDS, _SYNC_SECONDS = 60, 180
HUNG = "hung"  # the watchdog ended an attempt; the events that end a chain are in ``chain_log.Verdict``


def sync_mlflow(url: str) -> str | None:
    """Sends to MLflow what the run's uploader had no time for. Returns None, or what failed."""
    return _call([sys.executable, "-m", "fitv2_scale.cli", "track", "sync", url], _SYNC_SECONDS)


def run_event_command(command: str, event: str, url: str, reason: str) -> str | None:
    """Runs ``command EVENT RUN REASON``, if there is a command. Returns None, or what failed."""
    return _call(["sh", "-c", f'{command} "$@"', "on_event", event, url, reason], _EVENT_SECONDS) if command else None


def was_hung(run: Run, before: int) -> bool:
    """Whether the watchdog ended the newest attempt, if that is newer than ``before``."""
    newest = newest_attempt(run.log.entries())
    return newest > before and run.store.exists(f"attempts/{newest}/hung.json")


def _call(command: list[str], seconds: float) -> str | None:
    try:
        done = subprocess.run(command, timeout=seconds, stdout=sys.stderr)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return f"{' '.join(command)}: exit code {done.returncode}" if done.returncode else None
