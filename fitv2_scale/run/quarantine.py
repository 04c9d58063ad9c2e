"""RUN/quarantine/: which commits were found damaged, and why. They are passed over; their data is never deleted.

00000012.json  {"entry": 12, "path": "steps/00000300.0002", "problem": "rank-00001.safetensors is missing"}
"""

import logging
import re

from data_sharding.errors import DataError, UserError
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.run import Run
from fitv2_scale.run.shapes import Quarantined

_RECORD = re.compile(r"quarantine/([0-9]{8,})\.json")

log = logging.getLogger(__name__)


def quarantined(run: Run) -> set[int]:
    """The log numbers of the COMMITs that were found damaged. Other files in the folder are none of ours."""
    records = (_RECORD.fullmatch(path) for path in run.store.list("quarantine/"))
    return {int(record[1]) for record in records if record}


def problem_of(run: Run, entry: LogEntry) -> str:
    """What was found wrong with a COMMIT that is in quarantine; or with its record there."""
    try:
        found = run.store.read_json(_path(entry), Quarantined, "remove it, and the commit is checked again")
    except DataError as error:
        return str(error)
    return found["problem"] if found else "the reason is not recorded"


def quarantine(run: Run, entry: LogEntry, problem: str) -> None:
    """Records the reason, unless the commit has been retired meanwhile: then its data may be gone."""
    log.warning("the commit at step %d is damaged: %s", entry.fields["step"], problem)
    if any(e.n == entry.n for e in run.log.commits()):
        record = {"entry": entry.n, "path": entry.fields["path"], "problem": problem}
        try:
            run.store.put_json(_path(entry), record)
        except (OSError, UserError) as error:  # a run that may only be read
            log.warning("this could not be recorded: %s", error)


def _path(entry: LogEntry) -> str:
    return f"quarantine/{entry.n:08d}.json"
