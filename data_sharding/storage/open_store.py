"""Chooses the store for a URL."""

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.store import Store


def open_store(url: str) -> Store:
    """The store at a local path, file:// or s3:// URL, which need not hold anything yet. Raises UserError."""
    if url.startswith("s3://"):
        from data_sharding.storage.s3_store import S3Store  # only here: s3fs is an extra

        return S3Store(url)
    if "://" in url and not url.startswith("file:///"):
        raise UserError(f"{url}: give a local path, a file:/// URL or an s3:// URL.")
    return LocalStore(url)
