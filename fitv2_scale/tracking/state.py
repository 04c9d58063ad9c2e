"""The uploader's small files in the run folder: JSON objects, replaced as a whole."""

import json
from typing import Any

from data_sharding.storage.store import Store


def get(store: Store, path: str) -> dict[str, Any] | None:
    """The object at ``path``; None if there is none."""
    try:
        return json.loads(store.read(path))
    except FileNotFoundError:
        return None


def put(store: Store, path: str, record: dict[str, Any]) -> None:
    store.put(path, json.dumps(record).encode())
