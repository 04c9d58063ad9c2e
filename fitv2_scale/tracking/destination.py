"""Where a run is published: the meaning of `tracking.uri`, and whether training may write there itself.

`auto` is one SQLite file for all runs in the same folder. SQLite relies on file locks, which are unreliable on network
file systems, and there the uploader of each run may be on a different node. So on a shared file system `auto` means
that training writes its journal only, and `fitv2 track sync` is the one writer (see ``locks.writer_lock``).
"""

import re
from pathlib import Path

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.open_store import open_store

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "afs", "ceph", "glusterfs", "pohmelfs"}
_PARALLEL = {"lustre", "gpfs", "beegfs", "beegfs_nodev", "panfs", "orangefs", "pvfs2", "wekafs"}
_SHARED = _NETWORK | _PARALLEL | {"gfs2", "ocfs2"}
_ESCAPED = re.compile(r"\\([0-7]{3})")


def resolve_uri(run_url: str, uri: str) -> str:
    """The tracking URI that ``uri`` stands for: "auto" is one SQLite file for all runs in the same folder.

    Raises UserError for "auto" if the run is not on a disk, and for "none".
    """
    if uri == "none":
        raise UserError(f"{run_url} has tracking.uri=none: give the MLflow to publish it to with --uri.")
    if uri != "auto":
        return uri
    store = open_store(run_url)
    if not isinstance(store, LocalStore):
        raise UserError(f"{run_url} is on S3, which cannot hold an SQLite file: give the URI of an MLflow server.")
    return f"sqlite:///{Path(store.url).parent / 'mlflow.db'}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI; None for any other."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix).partition("?")[0]).absolute() if uri.startswith(prefix) else None


def artifact_root(uri: str) -> str | None:
    """The folder for a new experiment's artifacts: beside an SQLite file; None, the server's choice, otherwise."""
    file = sqlite_path(uri)
    return None if file is None else str(file.parent / "mlartifacts")  # MLflow's default is the working directory


def journal_only_reason(run_url: str, uri: str) -> str | None:
    """A sentence for the user if training must not publish to ``uri`` itself; None if it may."""
    if uri != "auto" or (kind := shared_file_system(Path(open_store(run_url).url))) is None:
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
