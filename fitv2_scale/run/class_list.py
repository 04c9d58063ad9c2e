"""The digest of a run's class list: it says which class a label means.

run.json holds it. Runs of earlier versions and imported weights have none there; they adopt that of their data when the
next attempt begins, before its CLAIM:

    classes.json   {"classes": "41be…"}

run.json is created once and no store replaces an object only if it is unchanged, so the digest gets an object of its
own, made by a conditional create like run.json: it is there as a whole or not at all, and of racing attempts one makes
it and the others compare theirs with it. It holds the digest alone, so if a reply is lost and the create is repeated,
what is found is the same.
"""

from contextlib import suppress
from dataclasses import dataclass

from data_sharding.errors import UserError
from data_sharding.storage.store import Store
from fitv2_scale.run.log import RunLog
from fitv2_scale.run.shapes import Classes, Start

_FILE = "classes.json"


@dataclass(frozen=True)
class DataIdentity:
    """The digest of the class list of a run's datasets, and the digests of the datasets themselves."""

    classes: str
    datasets: tuple[str, ...]


def adopted(store: Store) -> str | None:
    """What the run in ``store`` has adopted; None if nothing."""
    return (store.read_json(_FILE, Classes) or {}).get("classes")


def agreed(store: Store, classes: str | None, wanted: str) -> str:
    """The digest ``classes`` of the run in ``store``, if it is ``wanted``, that of its data; a run that has none adopts
    it. Raises UserError if the two differ."""
    if classes is None:
        with suppress(FileExistsError):
            store.create_json(_FILE, {"classes": wanted})
        classes = adopted(store)
    if classes != wanted:
        raise UserError(
            f"{store.url} was begun with another class list ({classes:.16}) than that of data.url ({wanted:.16}), so "
            "its labels would change their meaning: give its own data, or a new run folder"
        )
    return classes


def were_trained_on(store: Store, log: RunLog, data: DataIdentity) -> bool:
    """Whether the run's newest trained commit was made with ``data``, or there is none yet."""
    trained = [entry for entry in log.commits() if entry.fields["step"] > 0]  # step 0 is imported weights
    if not trained:
        return True
    start = store.read_json(f"attempts/{trained[-1].attempt}/start.json", Start) or {}
    return tuple(start.get("datasets", ())) == data.datasets
