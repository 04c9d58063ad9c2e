"""The state of a run: its attempts, their ends, its last commit. Read from its log and its attempts."""

from typing import Any

from fitv2_scale.run.log import LogEntry, newest_attempt
from fitv2_scale.run.quarantine import problem_of, quarantined
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.run.substitutions import summary


def status(run: Run) -> dict[str, Any]:
    """The report of `fitv2 status`, ready for JSON. A sample:

    {"id": …, "url": …, "created": …, "recipe_hash": …, "plan_hash": …, "parent": null, "stop_requested": false,
     "last_commit": {"step": 200, "time": …, "attempt": 1, "path": "steps/200"} or null,
     "damaged": [{"step": 200, "path": "steps/200", "problem": "…"}], "next_start": 100 or null,
     "substituted": {"version": 1, "frames": 1, "images": 64, "causes": ["…"]},
     "attempts": [{"attempt": 1, "started": …, "ended": … or null, "code": 75 or null, "why": "SIGUSR1", "changed": [],
                   "last_step": 200 or null}]}

    ``damaged`` are the commits that training or `fitv2 checkpoint verify` found damaged, ``next_start`` is the step of
    the newest other one, from which the next attempt starts. ``last_step`` is the highest step that the attempt
    committed, retired or not. Raises DataError if the log has lost an entry.
    """
    run.log.require_whole()
    entries, commits = run.log.entries(), run.log.commits()
    attempts = []
    for claim in (e for e in entries if e.kind == "CLAIM"):
        end = Attempt(claim.attempt, run).read_end() or {}
        steps = [e.fields["step"] for e in entries if e.kind == "COMMIT" and e.attempt == claim.attempt]
        attempts.append(
            {
                "attempt": claim.attempt,
                "started": claim.time,
                "ended": end.get("time"),
                "code": end.get("code"),
                "why": end.get("reason", _why_no_end(claim, entries)),
                "changed": Attempt(claim.attempt, run).changed,
                "last_step": max(steps, default=None),
            }
        )
    last_commit = None
    if commits:
        last = commits[-1]
        last_commit = {
            "step": last.fields["step"],
            "time": last.time,
            "attempt": last.attempt,
            "path": last.fields["path"],
        }
    return {
        **{key: getattr(run, key) for key in ("id", "url", "created", "recipe_hash", "plan_hash", "parent")},
        "stop_requested": run.log.stop_requested(),
        "last_commit": last_commit,
        **_damage(run, commits),
        "substituted": summary(run.store),
        "attempts": attempts,
    }


def _damage(run: Run, commits: list[LogEntry]) -> dict[str, Any]:
    bad = quarantined(run)
    damaged = [
        {"step": e.fields["step"], "path": e.fields["path"], "problem": problem_of(run, e)}
        for e in commits
        if e.n in bad
    ]
    whole = [e.fields["step"] for e in commits if e.n not in bad]
    return {"damaged": damaged, "next_start": whole[-1] if whole else None}


def _why_no_end(claim: LogEntry, entries: list[LogEntry]) -> str:
    return "killed or still running" if claim.attempt == newest_attempt(entries) else "killed"
