"""Files of a run that grow, its journal and logs. S3 has whole objects only.

The files of a local run grow in the run. Those of a run on S3 grow on the node's own disk, in
$TMPDIR/fitv2-<user id>/<run id>/, and are uploaded when they are complete. If a node is lost, so is what it had not
uploaded since its last commit.
"""

import os
import tempfile
from pathlib import Path

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.store import Store


def user_folder() -> Path:
    """This user's folder on the node's own disk, $TMPDIR/fitv2-<user id>. Raises UserError if another user owns it."""
    folder = Path(tempfile.gettempdir()) / f"fitv2-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user; set TMPDIR to a folder of your own.")
    return folder


def local_path(store: Store, run_id: str, rel: str) -> Path:
    """Where ``rel``, relative to the run, grows."""
    return Path(store.path(rel)) if isinstance(store, LocalStore) else user_folder() / run_id / rel


def upload(store: Store, run_id: str, rel: str) -> None:
    """Copies the file ``rel``, or all files below it, from this node to the run. Safe to repeat; no file, no error."""
    if isinstance(store, LocalStore):
        return
    here = local_path(store, run_id, rel)
    for file in [here] if here.is_file() else sorted(path for path in here.rglob("*") if path.is_file()):
        store.put(str(Path(rel) / file.relative_to(here)), file.read_bytes())


def download(store: Store, run_id: str, rel: str) -> Path:
    """The object ``rel`` of the run as a file on this node. Raises FileNotFoundError."""
    here = local_path(store, run_id, rel)
    if not isinstance(store, LocalStore):
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_bytes(store.read(rel))
    return here
