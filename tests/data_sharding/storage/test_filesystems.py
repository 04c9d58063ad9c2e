"""A path means the file of that name, whatever characters it has."""

import os
from pathlib import Path

import pytest

from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from data_sharding.storage.byte_ranges import open_binary
from data_sharding.storage.files import fs_call, read, with_local
from data_sharding.storage.filesystems import file_system, is_local
from data_sharding.storage.open_store import open_store
from data_sharding.write.images import write_dataset
from tests.support.written_datasets import make_images

ODD = ["a::b", "https:/b", "[x]*?", "50%20off #1?a=b", "a b", "ünï", "token=v1", "-x", "'q'\"", "{0..3}"]


@pytest.mark.parametrize("name", ODD)
def test_a_local_path_is_no_url(tmp_path, name):
    for url in (f"{tmp_path}/{name}", f"file://{tmp_path}/{name}"):
        fs, path = file_system(url)
        assert is_local(fs) and path == str(tmp_path / name)
        assert file_system(fs.unstrip_protocol(path))[1] == path


def test_urls_of_other_file_systems_are_not_paths():
    assert not is_local(file_system("memory://x")[0])
    with pytest.raises(UserError, match="Protocol not known: htp"):
        file_system("htp://x")


def test_a_dataset_in_folders_of_odd_names(tmp_path):
    """Written and read; what lies beside, where a pattern or a chain would lead, is not touched."""
    images, dst = tmp_path / "[1] a::b" / "50%20 #?", tmp_path / "set[1]*" / "x::y"
    make_images(images, 6)
    (tmp_path / "set1/parts").mkdir(parents=True)
    write_dataset(str(images), str(dst), max_tokens=16, workers=1, progress=False)
    assert len(Manifest.load(str(dst)).sample_id) == 6
    assert (tmp_path / "set1/parts").is_dir() and not (dst / "parts").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"[1] a::b", "set[1]*", "set1"}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "act",
    [
        lambda path: read(path),
        lambda path: fs_call(path, "cat_file"),
        lambda path: with_local(path, lambda: Path(path).read_bytes()),
        lambda path: open_binary(path),
        lambda path: open_store(str(Path(path).parent)).read(Path(path).name),
        lambda path: Manifest.load(str(Path(path).parent)),
    ],
)
def test_a_pipe_is_refused_where_its_reader_would_wait_for_ever(tmp_path, act):
    pipe = tmp_path / "manifest.json"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="manifest.json is a pipe: give a file"):
        act(str(pipe))


def test_a_pipe_of_the_shell_is_refused_too():
    """It cannot be read again, or from the middle."""
    ours, theirs = os.pipe()
    with pytest.raises(UserError, match=f"/dev/fd/{ours} is a pipe: give a file"):
        read(f"/dev/fd/{ours}")
    os.close(theirs)
    os.close(ours)
