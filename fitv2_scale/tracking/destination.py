"""Where a run is published: what `tracking.uri` means, and whether training may write there itself.

`auto` is one SQLite file for all runs that lie side by side. SQLite rests on locks that network file systems do not
keep well, and there each run's uploader may be on another node. So on a shared file system `auto` means that training
writes its journal alone, and `fitv2 track sync` is the one writer (see ``locks.Writer``).
"""

import re
from pathlib import Path

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.open_store import open_store

_MOUNTS = Path("/proc/self/mountinfo")
_SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "cifs", "smb3", "ceph", "glusterfs", "panfs"} | {
    "orangefs",
    "pvfs2",
    "wekafs",
    "afs",
    "gfs2",
    "ocfs2",
    "pohmelfs",
}
_ESCAPED = re.compile(r"\\([0-7]{3})")


def resolve_uri(run_url: str, uri: str) -> str:
    """The tracking URI that ``uri`` means: "auto" is one SQLite file for all the runs that lie side by side.

    Raises UserError if they do not lie on a disk, or if ``uri`` is "none".
    """
    if uri == "none":
        raise UserError(f"{run_url} has tracking.uri=none: say where to publish it with --uri.")
    if uri != "auto":
        return uri
    store = open_store(run_url)
    if not isinstance(store, LocalStore):
        raise UserError(f"{run_url}: beside a run on S3 there can be no MLflow file; give its URI.")
    return f"sqlite:///{Path(store.url).parent / 'mlflow.db'}"


def database(uri: str) -> Path | None:
    """The file of an SQLite URI; None for any other."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def artifact_root(uri: str) -> str | None:
    """Where a new experiment's pictures go: beside a SQLite file; None, wherever the server likes, otherwise."""
    file = database(uri)
    return None if file is None else str(file.parent / "mlartifacts")  # MLflow would take the working directory


def why_journal_only(run_url: str, uri: str) -> str | None:
    """A sentence for the user if training must not publish to ``uri`` itself; None if it may."""
    if uri != "auto" or (kind := shared_file_system(Path(open_store(run_url).url))) is None:
        return None
    return (
        f"{run_url} is on a shared file system ({kind}), where an SQLite file takes no writers from several nodes: "
        f"the metrics stay in the journal; `fitv2 track sync {run_url} --follow` on a login node brings them to MLflow"
    )


def shared_file_system(path: Path, mounts: str | None = None) -> str | None:
    """The type of the file system at ``path`` if other machines may write to it too, as "nfs4"; else None.

    ``path`` need not exist yet. ``mounts`` is the text of /proc/self/mountinfo (proc(5)), None to read it. FUSE counts
    as shared, for nothing tells what is behind it.
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
        if path.is_relative_to(point) and len(point.parts) >= depth:  # of two at one point the later one is on top
            kind, depth = details.split()[0], len(point.parts)
    return kind if kind in _SHARED or kind.startswith("fuse.") or kind == "fuse" else None
