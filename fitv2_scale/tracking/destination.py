"""Where a run is published: the meaning of `tracking.uri`, and whether training may write there itself.

Unless MLFLOW_TRACKING_URI is set, `auto` is one SQLite file for all runs in the same folder. SQLite relies on file
locks, which are unreliable on network file systems, and there the uploader of each run may be on a different node. So
on a shared file system such an `auto` means that training writes its journal only, and `fitv2 track sync` is the one
writer (see ``locks.writer_lock``).
"""

import os
import re
import sqlite3
from contextlib import closing, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.open_store import open_store
from fitv2_scale.config.sections import TrackingConfig
from fitv2_scale.run.log import newest_attempt
from fitv2_scale.run.paths import absolute_paths
from fitv2_scale.run.redact import HIDDEN, redact
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.identity import place_of, published

URI_VARIABLE = "MLFLOW_TRACKING_URI"
_SQLITE = re.compile(r"sqlite(\+\w+)?:///")
_REMEDY = "give tracking.uri=http://HOST:PORT, sqlite:////ABSOLUTE/PATH or auto"
_NOTHING = {"", "none", "null", "no", "off", "false"}  # what people write for no MLflow, in any case
_SERVERS = {"http", "https", "databricks", "databricks-uc", "uc"}
_DATABASES = {"sqlite", "mysql", "postgresql", "mssql"}
_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "afs", "ceph", "glusterfs", "pohmelfs"}
_PARALLEL = {"lustre", "gpfs", "beegfs", "beegfs_nodev", "panfs", "orangefs", "pvfs2", "wekafs"}
_SHARED = _NETWORK | _PARALLEL | {"gfs2", "ocfs2"}
_ESCAPED = re.compile(r"\\([0-7]{3})")


class Settings(NamedTuple):
    """`tracking.uri` and `tracking.experiment`."""

    uri: str
    experiment: str


def configured(run: Run) -> Settings:
    """The settings of the newest attempt that recorded them; if none did, those that the run was made with. Without
    secrets."""
    told, default = run.recorded("tracking") or run.config.get("tracking") or {}, TrackingConfig()
    return Settings(told.get("uri", default.uri), told.get("experiment", default.experiment))


def settings_of(run: Run) -> Settings:
    """Where a command that is no training publishes the run: where the newest attempt did, or where it was published
    since then. So a change of the settings holds for later commands, and so does a place given to `fitv2 track sync`.

    Raises as ``published``.
    """
    place, told = published(run), configured(run)
    if not place.uri or (run.recorded("tracking") and place.attempt < newest_attempt(run.log.entries())):
        return told
    return Settings(place.uri if _is_there(place.uri) else told.uri, place.experiment)


def resolve_uri(run_url: str, uri: str) -> str:
    """The tracking URI that ``uri`` stands for. "auto" is where the run has been published before; else what
    $MLFLOW_TRACKING_URI says; else one SQLite file for all runs in the same folder.

    Raises UserError for "auto" if the run is not on a disk and the variable is not set, and for "none".
    """
    if uri == "none":
        raise UserError(f"{run_url} has tracking.uri=none: give the MLflow to publish it to with --uri.")
    if uri != "auto":
        return _absolute(uri)
    store = open_store(run_url)
    before = place_of(store).get("uri", "")
    if before and _is_there(before):
        return before
    if told := os.environ.get(URI_VARIABLE):
        return _absolute(told)
    if not isinstance(store, LocalStore):
        raise UserError(
            f"{run_url} is on S3, which cannot hold an SQLite file: give the URI of an MLflow server as tracking.uri, "
            f"or in {URI_VARIABLE}."
        )
    return sqlite_uri(Path(store.url).parent / "mlflow.db")


def _absolute(uri: str) -> str:
    """``uri`` for later commands too, which begin in other folders: that of an SQLite file with its whole path."""
    return absolute_paths({"uri": uri})["uri"]


def _is_there(uri: str) -> bool:
    """Whether ``uri``, where a run was published before, can be used as it is: not if its login is hidden, or if it is
    a file that is gone."""
    return HIDDEN not in uri and ((file := sqlite_path(uri)) is None or file.exists())


def sqlite_uri(file: Path) -> str:
    """The URI of an SQLite file at an absolute path. Only what means something in a URI is quoted, so that URIs of
    earlier versions stay the same."""
    quoted = re.sub("[%?#]", lambda found: quote(found[0]), str(file))
    # For sqlite:/// alone MLflow makes the folder of the quoted name, too.
    return f"sqlite:///{file}" if quoted == str(file) else f"sqlite+pysqlite:///{quoted}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI; None for any other."""
    found = _SQLITE.match(uri)
    return Path(unquote(uri[found.end() :].partition("?")[0])).absolute() if found else None


def artifact_root(uri: str) -> str | None:
    """The folder for a new experiment's artifacts, as a URI: beside an SQLite file; None, the server's choice,
    otherwise."""
    file = sqlite_path(uri)
    return None if file is None else (file.parent / "mlartifacts").as_uri()  # MLflow's default is the working directory


def uri_problem(uri: str) -> str | None:
    """A sentence for the user if ``uri`` names no place where MLflow could be."""
    if uri.lower() in _NOTHING:
        return f"tracking.uri={uri} names no MLflow: write none, in small letters, if you want none; or {_REMEDY}"
    scheme = uri.partition(":")[0] if ":" in uri else ""
    if scheme in ("http", "https") and not urlsplit(uri).hostname:
        return f"tracking.uri={redact(uri)} names no host: {_REMEDY}"
    known = {"file", *_SERVERS, *_DATABASES} | {entry.name for entry in entry_points(group="mlflow.tracking_store")}
    if scheme and scheme.partition("+")[0] not in known:
        return f"tracking.uri={redact(uri)} begins with {scheme}:, which MLflow does not know: {_REMEDY}"
    return None


def folder_problem(uri: str) -> str | None:
    """A sentence for the user if ``uri`` is a folder, which MLflow refuses unless a variable of its own is set."""
    is_folder = uri.startswith("file:") or (":" not in uri and uri not in _SERVERS)
    if not is_folder or os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return None
    return f"tracking.uri={uri} is a folder, in which MLflow keeps no runs any more: {_REMEDY}"


def deleted_experiment(uri: str, experiment: str) -> str | None:
    """A sentence for the user if ``experiment`` was deleted in the SQLite file at ``uri``. It takes no runs then."""
    file = sqlite_path(uri)
    if file is None or not file.exists():
        return None
    query = "select experiment_id from experiments where name = ? and lifecycle_stage = 'deleted'"
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=1)) as db:
        found = db.execute(query, (experiment,)).fetchone()
        return deleted_sentence(experiment, str(found[0])) if found else None
    return None


def deleted_sentence(experiment: str, experiment_id: str) -> str:
    return (
        f"the experiment {experiment} was deleted in MLflow: restore it with `mlflow experiments restore -x "
        f"{experiment_id}`, or give another one: tracking.experiment=NAME to `fitv2 train`, --experiment NAME to "
        "`fitv2 track sync`"
    )


def notes_at_start(run: Run, uri: str, experiment: str) -> list[str]:
    """What the user should know before training begins: where ``uri`` leads if that is not obvious, and what can never
    work there."""
    target, variable, before = resolve_uri(run.url, uri), os.environ.get(URI_VARIABLE), published(run)
    notes = []
    if before.copied_from:
        notes.append(f"{run.url} is a copy of {before.copied_from}: it gets an MLflow run of its own")
    if before.moved_from:
        notes.append(f"{run.url} was at {before.moved_from} before: it stays the same MLflow run")
    if uri == "auto" and variable and target == _absolute(variable) != before.uri:
        notes.append(f"metrics go to MLflow at {redact(variable)}, as {URI_VARIABLE} says")
    elif uri == "auto" and variable and target != _absolute(variable):
        notes.append(
            f"metrics go to MLflow at {redact(target)}, where this run has been published before, not to "
            f"{URI_VARIABLE}={redact(variable)}: give that as tracking.uri to change it"
        )
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        if (other := os.environ.get(name)) not in (None, "", experiment):
            notes.append(
                f"metrics go to the experiment {experiment}; {name}={other} is not used: give tracking.experiment=NAME "
                "to change it"
            )
    if problem := uri_problem(target) or folder_problem(target) or deleted_experiment(target, experiment):
        notes.append(f"nothing is published to MLflow: {problem}; the journal keeps the metrics")
    return notes


def journal_only_reason(run_url: str, uri: str) -> str | None:
    """A sentence for the user if training must not publish to ``uri`` itself; None if it may."""
    if uri != "auto" or sqlite_path(resolve_uri(run_url, uri)) is None:
        return None
    if (kind := shared_file_system(Path(open_store(run_url).url))) is None:
        return None
    return (
        f"{run_url} is on a shared file system ({kind}), where several nodes cannot safely write one SQLite file: "
        f"metrics go to the journal only; run `fitv2 track sync {run_url} --follow` on a login node to publish them to "
        "MLflow"
    )


def shared_file_system(path: Path, mounts: str | None = None) -> str | None:
    """The type of the file system at ``path``, for example "nfs4", if other machines may write to it too; else None.

    ``path`` need not exist yet. ``mounts`` is the text of /proc/self/mountinfo (proc(5)); None reads it. FUSE counts as
    shared, since its type does not tell what is behind it.
    """
    if mounts is None:
        if not _MOUNTS.exists():
            return None
        mounts = _MOUNTS.read_text()
    path = path.resolve()
    kind, depth = "", -1
    for line in mounts.splitlines():
        place, _, details = line.partition(" - ")
        point = Path(_ESCAPED.sub(lambda m: chr(int(m[1], 8)), place.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= depth:  # a later mount hides an earlier one
            kind, depth = details.split()[0], len(point.parts)
    return kind if kind in _SHARED or kind.startswith("fuse.") or kind == "fuse" else None
