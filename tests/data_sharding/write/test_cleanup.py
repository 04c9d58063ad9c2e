"""In the folder of a dataset its writers remove their own files, and nothing that somebody else put there."""

from pathlib import Path

import fsspec
import pytest

from data_sharding.errors import UserError
from data_sharding.write.cleanup import clean, holds_shards, remove_unfinished
from data_sharding.write.images import write_dataset
from tests.support.written_datasets import make_images

OPTIONS = {"max_tokens": 16, "images_per_shard": 4, "workers": 1, "progress": False}
UNFINISHED = ".shard-000000.tar.zst.0123456789abcdef.tmp"
FOREIGN = (
    "notes.tmp",
    "drafts/thesis.tmp",
    "drafts/parts/1.json",
    "drafts/shard-000000.tar.zst",
    ".thesis.docx.0123456789abcdef.tmp",
    "drafts/.shard-000000.tar.zst.0123456789abcdef.tmp",
    "parts/wheel.stl",
    "parts/wheel.json",
    "parts/wheels/rim.tar",
    "shard-notes.txt",
    "shard-000000.tar.zst.md5",
    "holdout/notes.tmp",
)


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"bytes")


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_what_is_not_the_datasets_stays(tmp_path):
    make_images(tmp_path / "images", 10)
    dst = tmp_path / "set"
    put(dst, *FOREIGN, UNFINISHED, f"holdout/{UNFINISHED}", f"manifest/{UNFINISHED}", "parts/.options.json.tmp")
    assert write_dataset(str(tmp_path / "images"), str(dst), holdout=0.2, **OPTIONS).images == 8
    written = {"manifest.json", "source.json", "shard-000000.tar.zst", "shard-000001.tar.zst", "holdout/manifest.json"}
    written |= {"holdout/shard-000000.tar.zst"}
    left = {name for name in files(dst) if not (name.endswith(".npy") and "manifest/" in name)}
    assert left == {*FOREIGN, *written, f"manifest/{UNFINISHED}", "parts/.options.json.tmp"}
    assert not (dst / "holdout/parts").exists()


def test_unpacked_archives_and_unfinished_files_are_removed(tmp_path):
    archives = f"parts/{'0a' * 16}"
    own = ["options.json", "software.json", "shard-000000.tar.zst.json", "shard-1000000.tar.zst.json"]
    own += [f"{'0a' * 16}/from_16_to_256.tar{end}" for end in ("", ".beat", ".0.tmp")]
    kept = {f"{archives}/mine.txt", f"parts/{'0b' * 16}", "parts/shard-1.tar.zst.json", "shard-000000.tar.zst"}
    put(tmp_path, *(f"parts/{name}" for name in own), *kept, f"manifest/.label.npy.{'0a' * 8}.tmp")
    clean(str(tmp_path))
    assert files(tmp_path) == kept
    put(tmp_path, unfinished := f"{archives}/.from_16_to_256.tar.beat.{'0a' * 8}.tmp", f"holdout/{UNFINISHED}")
    remove_unfinished(str(tmp_path))
    assert unfinished not in files(tmp_path) and files(tmp_path) == kept
    for name in kept:
        (tmp_path / name).unlink()
    put(tmp_path, *(f"parts/{name}" for name in own))
    clean(str(tmp_path))
    assert not (tmp_path / "parts").exists()


def test_on_a_store_that_is_no_disk():
    memory = fsspec.filesystem("memory")
    names = ("parts/options.json", "parts/wheel.stl", "notes.tmp", "shard-000000.tar.zst", "a/b.tmp")
    for name in names:
        memory.pipe(f"/cleaned/{name}", b"bytes")
    clean("memory://cleaned")
    assert set(memory.find("/cleaned")) == {f"/cleaned/{name}" for name in names[1:]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shard-000000.tar.zst", True),
        ("holdout/shard-1000000.tar.zst", True),
        ("parts/shard-000003.tar.zst.json", True),  # of a shard all of whose images were left out
        ("shard-0.tar.zst", False),
        ("shard-notes.txt", False),
        ("old/shard-000000.tar.zst", False),
    ],
)
def test_only_names_of_shards_are_shards(tmp_path, name, expected):
    put(tmp_path, name)
    assert holds_shards(str(tmp_path)) == expected


def test_the_folder_of_a_run_is_refused(tmp_path):
    put(tmp_path, "run/run.json", "run/log/1.tmp")
    make_images(tmp_path / "images", 3)
    with pytest.raises(UserError, match=r"/run is the folder of a run \(it holds run.json\): choose another folder"):
        write_dataset(str(tmp_path / "images"), str(tmp_path / "run"), **OPTIONS)
    assert files(tmp_path / "run") == {"run.json", "log/1.tmp"}
