"""What keeps the uploader from publishing, for those who are not it: training says once what can never work, and
`fitv2 status` shows the rest. A file of the run:

    tracking/state.json    {"time": "2025-06-01T12:00:00.000000+00:00", "trouble": "MLflow at http://h:5000 failed: …",
                            "tell": true}

``trouble`` is "" while all is well; ``tell`` asks training to say it.
"""

from contextlib import suppress
from typing import Any

from data_sharding.errors import DataError, UserError
from data_sharding.storage.atomic_write import atomic_write
from data_sharding.storage.json_bytes import from_json, to_json
from data_sharding.storage.records import Shape
from fitv2_scale.run.log import now
from fitv2_scale.run.redact import redact
from fitv2_scale.run.run import Run

_FILE = "tracking/state.json"


class _State(Shape):
    trouble: str
    tell: bool


def write_state(run: Run, trouble: str, tell: bool) -> None:
    """Replaces the state. A full disk is no reason to stop: it is the uploader's own report."""
    file = run.local_path(_FILE)
    with suppress(OSError, UserError):
        with atomic_write(file, durable=False) as out:
            out.write(to_json({"time": now(), "trouble": redact(trouble), "tell": tell}))
        run.upload(_FILE)


def read_state(run: Run) -> dict[str, Any]:
    """The state as this machine knows it; {} if there is none, or a damaged one, which the uploader replaces."""
    with suppress(OSError, UserError, DataError):
        file = run.local_path(_FILE)
        if file.exists():
            return from_json(file.read_bytes(), str(file), _State)
        return run.store.read_json(_FILE, _State) or {}
    return {}


class TroubleReader:
    """Training's side: what is new."""

    def __init__(self, run: Run) -> None:
        self._run, self._file = run, run.local_path(_FILE)
        self._seen = self._version()  # the uploader of an earlier attempt has written that

    def news(self) -> list[str]:
        """What training is asked to say and has not said. Cheap: for the step loop."""
        version = self._version()
        if version == self._seen:
            return []
        self._seen = version
        state = read_state(self._run)
        return [state["trouble"]] if state.get("tell") and state.get("trouble") else []

    def _version(self) -> tuple[int, int] | None:
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino
