"""Brings a run's journal to one MLflow and remembers how far it got. Loads mlflow: the uploader's process only.

In the run folder it keeps

    tracking/mlflow.json    {"uri": "sqlite:////runs/mlflow.db", "experiment": "fitv2", "mlflow_run": "8d0f…"}
    tracking/ack.json       {"mlflow_run": "8d0f…", "attempt": 3, "segment": 7, "offset": 8123}

ack.json says what MLflow has of the canonical curve, and is written after each batch: a killed publisher sends at most
one batch again, with the same times, which MLflow's SQL stores drop.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

from fitv2_scale.run.log import Entry, newest_attempt
from fitv2_scale.run.redact import redact
from fitv2_scale.run.run import Attempt, Run, flatten
from fitv2_scale.tracking import journal, tags
from fitv2_scale.tracking.destination import artifact_root
from fitv2_scale.tracking.live_run import Live, final_status, ms
from fitv2_scale.tracking.mlflow_writer import MAX_METRICS_PER_BATCH, Server, ServerError, ServerRun
from fitv2_scale.tracking.state import get, put

__all__ = ["Publisher", "ServerError"]

_IDENTITY, _ACK = "tracking/mlflow.json", "tracking/ack.json"
_PICTURE_TRIES = 3


class Publisher:
    """Publishes one run to the MLflow at ``uri``. For one process at a time: hold the uploader's lock.

    It connects when it first publishes, and again after an error: the run on the server may be gone by then. ``say``
    takes a sentence for whoever reads the uploader's log.
    """

    def __init__(self, run: Run, uri: str, experiment: str, say: Callable[[str], None]) -> None:
        self._run, self._uri, self._experiment, self._say = run, uri, experiment, say
        self._canonical: ServerRun | None = None
        self._picture_failed: Counter[str] = Counter()

    @property
    def mlflow_run(self) -> str:
        """MLflow's id of the run, once something was published."""
        assert self._canonical is not None
        return self._canonical.id

    def publish(self) -> dict[str, int]:
        """Sends everything committed and not yet acknowledged, then what is live.

        Returns {"metrics": 1200, "pictures": 3, "missing": 0, "refused": 0}, of the canonical run alone. Missing are
        pictures whose files are gone; refused are names of metrics, and pictures, that MLflow does not take and that
        stay in the run folder only. Raises ServerError; what was acknowledged by then stays so.
        """
        counts = {"metrics": 0, "pictures": 0, "missing": 0, "refused": 0}
        try:
            canonical = self._canonical or self._connect()
            entries = self._run.log.entries()
            self._tag_attempt(canonical, newest_attempt(entries))
            if len(entries) > self._entries:  # only a COMMIT makes the curve longer
                for batch in _batches(journal.read(self._run, self._ack)):
                    self._send(canonical, batch, counts)
                    self._ack = batch[-1].end
                    put(self._run.store, _ACK, {"mlflow_run": canonical.id} | asdict(self._ack))
                self._entries = len(entries)
            self._live.publish(entries)
            self._tag_lag(canonical, entries)
        except ServerError:
            self._canonical = None
            raise
        return counts

    def finish(self) -> None:
        """Sets MLflow's final status by the newest attempt's end.json. Call after ``publish``, when training is known
        to have ended."""
        if self._canonical is None or self._attempt == 0:
            return  # nothing was ever trained here
        self._live.close()
        self._canonical.terminate(*final_status(Attempt(self._attempt, self._run)))

    def _connect(self) -> ServerRun:
        run = self._run
        server = Server(self._uri, self._experiment, artifact_root(self._uri))
        before = get(run.store, _IDENTITY) or {}
        place = {"uri": redact(self._uri), "experiment": self._experiment}
        known = before.pop("mlflow_run", None)
        known = known if before == place else None
        found = server.open_run(
            tags.RUN_ID, run.id, start_ms=ms(run.created), name=run.id, tags=tags.run_tags(run), known=known
        )
        for refused in found.params(redact(flatten(run.config))):
            self._say(f"MLflow refuses a parameter, the run goes without: {refused}")
        if known and known != found.id:
            self._say(f"MLflow's run {known} is gone: everything is sent again, to a new one ({found.id})")
        if known != found.id:
            put(run.store, _IDENTITY, place | {"mlflow_run": found.id})
        ack = get(run.store, _ACK) or {}
        same = ack.pop("mlflow_run", None) == found.id  # another server, or a new MLflow run, gets everything
        self._ack = journal.Position(**ack) if same else journal.Position()
        self._live = Live(run, server, found.id)
        self._attempt = 0  # the newest that MLflow knows of
        self._entries = 0  # of the log, as of when everything was sent
        self._lag = ""
        self._canonical = found
        return found

    def _send(self, canonical: ServerRun, batch: Sequence[journal.Record], counts: dict[str, int]) -> None:
        rows = [(name, v, r.time_ms, r.step) for r in batch for name, v in (r.metrics or {}).items()]
        for refused in canonical.metrics(rows):
            counts["refused"] += 1
            self._say(f"MLflow refuses a metric, which stays in the journal only: {refused}")
        counts["metrics"] += len(rows)
        for picture in (r.picture for r in batch if r.picture is not None):
            counts[self._send_picture(canonical, picture)] += 1

    def _send_picture(self, canonical: ServerRun, picture: str) -> str:
        if not self._run.store.exists(picture):
            return "missing"
        try:
            canonical.picture(self._run.fetch(picture))
        except ServerError as error:
            self._picture_failed[picture] += 1
            if self._picture_failed[picture] < _PICTURE_TRIES:
                raise
            self._say(f"MLflow does not take {picture}, which stays in the run folder only: {error}")
            return "refused"
        return "pictures"

    def _tag_attempt(self, canonical: ServerRun, newest: int) -> None:
        if newest != self._attempt:
            start = get(self._run.store, f"{Attempt(newest, self._run).path}/start.json") or {}
            canonical.tag(tags.attempt_tags(newest, start))
            self._attempt = newest

    def _tag_lag(self, canonical: ServerRun, entries: Sequence[Entry]) -> None:
        committed = max((e.fields["step"] for e in entries if e.kind == "COMMIT"), default=0)
        measured = max(self._live.step, committed)
        lag = f"{measured - committed} steps: {measured} measured, {committed} committed"
        if self._live.step and lag != self._lag:
            canonical.tag({tags.LAG: lag})
            self._lag = lag


def _batches(records: Iterable[journal.Record]) -> Iterator[list[journal.Record]]:
    """Records in lists of at most MAX_METRICS_PER_BATCH metrics together; a larger record stands alone."""
    batch: list[journal.Record] = []
    size = 0
    for record in records:
        more = len(record.metrics or {})
        if batch and size + more > MAX_METRICS_PER_BATCH:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += more
    if batch:
        yield batch
