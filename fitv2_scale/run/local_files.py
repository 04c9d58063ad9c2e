"""Files of a run that grow, its journal and logs. S3 has whole objects only.

The files of a local run grow where they belong. Those of a run on S3 grow on the node's own disk, in
$TMPDIR/fitv2-<user id>/<run id>/, and are shipped when they are complete; what a node took with it is what it had not
shipped since its last commit.
"""

import os
import tempfile
from pathlib import Path

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.store import Store


def local(store: Store, run_id: str, rel: str) -> Path:
    """Where ``rel``, relative to the run, grows."""
    if isinstance(store, LocalStore):
        return Path(store.path(rel))
    mine = Path(tempfile.gettempdir()) / f"fitv2-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.stat().st_uid != os.getuid():
        raise UserError(f"{mine} belongs to somebody else; set TMPDIR to a folder of your own.")
    return mine / run_id / rel


def ship(store: Store, run_id: str, rel: str) -> None:
    """Brings the file ``rel``, or all files below it, from this node to the run. Again is fine; none is fine."""
    if isinstance(store, LocalStore):
        return
    here = local(store, run_id, rel)
    for file in [here] if here.is_file() else sorted(path for path in here.rglob("*") if path.is_file()):
        store.put(str(Path(rel) / file.relative_to(here)), file.read_bytes())


def fetch(store: Store, run_id: str, rel: str) -> Path:
    """The object ``rel`` of the run as a file on this node. Raises FileNotFoundError."""
    here = local(store, run_id, rel)
    if not isinstance(store, LocalStore):
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_bytes(store.read(rel))
    return here
