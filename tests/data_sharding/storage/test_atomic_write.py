"""What a power cut leaves of a file: its bytes reach the disk before its name does, and that before the call ends."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from data_sharding.storage.atomic_write import atomic_create, atomic_write


def write(path: Path, durable: bool) -> None:
    with atomic_write(path, durable=durable) as file:
        file.write(b"all of it")
        assert not path.exists()


@pytest.mark.parametrize(
    "act,steps",
    [
        (lambda path: write(path, durable=True), ["9 bytes of none", "replace", "folder with name"]),
        (lambda path: write(path, durable=False), ["replace"]),
        (lambda path: atomic_create(path, b"all of it"), ["9 bytes of none", "link", "folder with name"]),
    ],
    ids=["durable", "not durable", "created"],
)
def test_what_is_on_the_disk_and_when(act: Callable[[Path], None], steps, tmp_path, monkeypatch):
    path, seen = tmp_path / "name", []

    def fsync(file: int) -> None:
        status, named = os.fstat(file), "name" if path.exists() else "none"
        if stat.S_ISDIR(status.st_mode):
            assert os.path.samestat(status, os.stat(tmp_path))
            seen.append(f"folder with {named}")
        else:
            seen.append(f"{status.st_size} bytes of {named}")

    def noted(name: str) -> None:
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *paths: seen.append(name) or call(*paths))

    noted("replace")
    noted("link")
    monkeypatch.setattr(os, "fsync", fsync)
    act(path)
    assert seen == steps and path.read_bytes() == b"all of it" and os.listdir(tmp_path) == ["name"]
