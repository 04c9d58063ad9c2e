"""Publishes a run's journal to one MLflow and remembers its progress. Imports mlflow: for the uploader's process only.

Beside the run's identity in MLflow (see ``identity``) it keeps a file in the run folder:

    tracking/ack.json       {"mlflow_run": "8d0f…", "attempt": 3, "segment": 7, "offset": 8123}

ack.json says how much of the canonical curve MLflow has, and is written after each batch. So a killed publisher sends
at most one batch again, with the same times, and MLflow's SQL stores drop the repeats.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from fitv2_scale.run.differences import flatten
from fitv2_scale.run.log import LogEntry, newest_attempt
from fitv2_scale.run.redact import redact
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.tracking import identity, journal, tags
from fitv2_scale.tracking.destination import artifact_root
from fitv2_scale.tracking.live_run import LiveRuns, final_status, ms
from fitv2_scale.tracking.mlflow_writer import MAX_METRICS_PER_BATCH, Server, ServerError, ServerRun

__all__ = ["Publisher", "ServerError"]

_ACK = "tracking/ack.json"
_PICTURE_TRIES = 3


class _Ack(journal.PositionShape):
    """ack.json."""

    mlflow_run: str | None = None


@dataclass
class _Connection:
    """The run on the server, and what was published to it."""

    canonical: ServerRun
    live: LiveRuns
    acknowledged: journal.Position
    tagged_attempt: int = 0  # the newest whose tags were sent
    entries: int = 0  # length of the run's log when everything committed had been sent
    lag: str = ""  # the tag


class Publisher:
    """Publishes one run to the MLflow at ``uri``. For one process at a time: hold the ``RunLock``.

    It connects when it first publishes, and again after an error, since the run on the server may be gone by then.
    ``say`` takes a sentence for the uploader's log.
    """

    def __init__(self, run: Run, uri: str, experiment: str, say: Callable[[str], None]) -> None:
        self._run, self._uri, self._experiment, self._say = run, uri, experiment, say
        self._connection: _Connection | None = None
        self._picture_failures: Counter[str] = Counter()

    @property
    def mlflow_run(self) -> str:
        """MLflow's id of the run, once ``publish`` has succeeded."""
        assert self._connection is not None
        return self._connection.canonical.id

    def publish(self) -> dict[str, int]:
        """Sends everything that is committed and not yet acknowledged, then the live runs.

        Returns {"metrics": 1200, "pictures": 3, "missing": 0, "refused": 0}, for the canonical run alone. ``missing``
        counts pictures without a file; ``refused`` counts metrics (by name) and pictures that MLflow refuses and that
        are kept in the run folder only. Raises ServerError; what was acknowledged before remains acknowledged.
        """
        counts = {"metrics": 0, "pictures": 0, "missing": 0, "refused": 0}
        try:
            connection = self._connection = self._connection or self._connect()
            entries = self._run.log.entries()
            self._tag_attempt(connection, newest_attempt(entries))
            if len(entries) > connection.entries:  # only a COMMIT makes the curve longer
                for batch in _batches(journal.read(self._run, connection.acknowledged)):
                    self._send(connection.canonical, batch, counts)
                    ack = connection.acknowledged = batch[-1].end
                    self._run.store.put_json(_ACK, {"mlflow_run": connection.canonical.id} | asdict(ack))
                connection.entries = len(entries)
            connection.live.publish(entries)
            self._tag_lag(connection, entries)
        except ServerError:
            self._connection = None
            raise
        return counts

    def finish(self) -> None:
        """Sets MLflow's final status by the newest attempt's end.json. Call after ``publish``, when training is known
        to have ended."""
        connection = self._connection
        if connection is None or connection.tagged_attempt == 0:
            return  # no attempt was ever made
        connection.live.close()
        connection.canonical.terminate(*final_status(Attempt(connection.tagged_attempt, self._run)))

    def _connect(self) -> _Connection:
        run = self._run
        server = Server(self._uri, self._experiment, artifact_root(self._uri))
        before, uri = identity.published(run), redact(self._uri)
        if before.moved_from:
            before = identity.unless_taken(run, before, server.tag_of(tags.RUN_ID, before.name, tags.PLACE))
        known = before.mlflow_run if (before.uri, before.experiment) == (uri, self._experiment) else None
        own = tags.run_tags(run) | ({tags.COPY_OF: run.id} if before.name != run.id else {})
        if before.copied_from:
            self._say(f"{run.url} is a copy of {before.copied_from}: it gets an MLflow run of its own")
            identity.record(run, uri, self._experiment, None, before.name)  # first: a second try has the same name
        found = server.open_run(
            tags.RUN_ID, before.name, start_ms=ms(run.created), name=before.name, tags=own, known=known
        )
        for refused in found.log_params(redact(flatten(run.config))):
            self._say(f"MLflow refused a parameter, which is left out: {refused}")
        if known and known != found.id:
            self._say(f"the MLflow run {known} no longer exists: everything is sent again to a new one ({found.id})")
        if known != found.id or before.moved_from:
            found.set_tags({tags.PLACE: redact(run.url)})
            identity.record(run, uri, self._experiment, found.id, before.name)
        return _Connection(found, LiveRuns(run, server, found.id, before.name), acknowledged(run, found.id))

    def _send(self, canonical: ServerRun, batch: Sequence[journal.Record], counts: dict[str, int]) -> None:
        rows = [(name, v, r.time_ms, r.step) for r in batch for name, v in (r.metrics or {}).items()]
        for refused in canonical.log_metrics(rows):
            counts["refused"] += 1
            self._say(f"MLflow refused a metric, which is kept in the journal only: {refused}")
        counts["metrics"] += len(rows)
        for picture in (r.picture for r in batch if r.picture is not None):
            counts[self._send_picture(canonical, picture)] += 1

    def _send_picture(self, canonical: ServerRun, picture: str) -> str:
        if not self._run.store.exists(picture):
            return "missing"
        try:
            canonical.log_artifact(self._run.download(picture), "samples")
        except ServerError as error:
            self._picture_failures[picture] += 1
            if self._picture_failures[picture] < _PICTURE_TRIES:
                raise
            self._say(f"{picture} could not be sent to MLflow and is kept in the run folder only: {error}")
            return "refused"
        return "pictures"

    def _tag_attempt(self, connection: _Connection, newest: int) -> None:
        if newest != connection.tagged_attempt:
            start = Attempt(newest, self._run).read_start()
            connection.canonical.set_tags(tags.attempt_tags(newest, start))
            connection.tagged_attempt = newest

    def _tag_lag(self, connection: _Connection, entries: Sequence[LogEntry]) -> None:
        committed = max((e.fields["step"] for e in entries if e.kind == "COMMIT"), default=0)
        measured = max(connection.live.step, committed)
        lag = f"{measured - committed} steps: {measured} measured, {committed} committed"
        if connection.live.step and lag != connection.lag:
            connection.canonical.set_tags({tags.LAG: lag})
            connection.lag = lag


def acknowledged(run: Run, mlflow_run: str) -> journal.Position:
    """How much of the curve the MLflow run has; another server, or a new MLflow run, gets everything."""
    ack = run.store.read_json(_ACK, _Ack, journal.SEND_AGAIN)
    return journal.Position.of(ack) if ack and ack.get("mlflow_run") == mlflow_run else journal.Position()


def _batches(records: Iterable[journal.Record]) -> Iterator[list[journal.Record]]:
    """Lists of records with at most MAX_METRICS_PER_BATCH metrics in total; a larger record is a list by itself."""
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
