"""The digest of a local file's content. A path says where a file lies, not which file it is."""

from pathlib import Path

import xxhash

_BLOCK = 1 << 20  # bytes read at once


def file_digest(path: str | Path) -> str:
    """Hex xxh3_128 of the file, read at the speed of the disk. Raises OSError."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
