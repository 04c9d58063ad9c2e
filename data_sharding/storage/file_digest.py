"""Digests of the content of local files. A path says where a file lies, not which file it is."""

import hashlib
from collections.abc import Sequence
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


def code_digest(root: Path, packages: Sequence[str]) -> str:
    """The first 16 hex digits of the sha256 over names and contents of all modules in these folders of ``root``."""
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted((root / package).rglob("*.py")):
            data = file.read_bytes()
            digest.update(f"{file.relative_to(root)} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]
