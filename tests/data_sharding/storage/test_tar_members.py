"""Tars with links, sparse files and devices: a link has the bytes of its target, and what has none is named."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from data_sharding.errors import UserError
from data_sharding.storage.tar_members import check_tar, first_names, list_tar


def listed(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    unusable: dict[str, str] = {}
    members = {member.name: member.data.read() for member in list_tar(str(path), unusable=unusable.__setitem__)}
    return members, unusable


@pytest.mark.skipif(not shutil.which("tar"), reason="needs GNU tar")
def test_links_have_the_bytes_that_tar_unpacks(tmp_path):
    src = tmp_path / "src"
    (src / "deep").mkdir(parents=True)
    (src / "a.jpg").write_bytes(b"first")
    (src / "deep/b.jpg").write_bytes(b"second")
    os.link(src / "a.jpg", src / "deep/hard.jpg")
    os.link(src / "a.jpg", src / "z.jpg")
    (src / "0.jpg").symlink_to("deep/b.jpg")  # before its target
    (src / "deep/up.jpg").symlink_to("../z.jpg")  # to a hard link
    (src / "twice.jpg").symlink_to("0.jpg")
    for kind in ("gnu", "pax", "ustar"):
        subprocess.run(
            ["tar", "--sort=name", f"--format={kind}", "-C", src, "-cf", tmp_path / "t.tar", "."], check=True
        )
        members, unusable = listed(tmp_path / "t.tar")
        unpacked = {str(file.relative_to(src)): file.read_bytes() for file in src.rglob("*") if file.is_file()}
        assert members == unpacked and len(members) == 7 and not unusable
    with tarfile.open(tmp_path / "t.tar") as tar:
        kinds = [info.type for info in tar]
    assert kinds.count(tarfile.LNKTYPE) == 2 and kinds.count(tarfile.SYMTYPE) == 3


def test_what_has_no_bytes_is_named(tmp_path):
    kinds = {
        "gone.jpg": (tarfile.SYMTYPE, "nowhere.jpg"), "out.jpg": (tarfile.SYMTYPE, "/etc/passwd"),
        "up.jpg": (tarfile.SYMTYPE, "../../etc/passwd"), "loop.jpg": (tarfile.SYMTYPE, "loop.jpg"),
        "later.jpg": (tarfile.LNKTYPE, "real.jpg"), "pipe.jpg": (tarfile.FIFOTYPE, ""),
        "null.jpg": (tarfile.CHRTYPE, ""), "folder": (tarfile.DIRTYPE, ""), "to_folder": (tarfile.SYMTYPE, "folder"),
    }  # fmt: skip
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, (kind, link) in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
        info = tarfile.TarInfo("real.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"real"))
    members, unusable = listed(tmp_path / "t.tar")
    no_target, no_file = "a link to a file that is not in the tar", "a device, a pipe or another member that is no file"
    assert members == {"real.jpg": b"real"}
    assert unusable == {
        **dict.fromkeys(["gone.jpg", "out.jpg", "up.jpg", "loop.jpg", "to_folder"], no_target),
        **dict.fromkeys(["pipe.jpg", "null.jpg"], no_file),
        "later.jpg": "a link to a file that is not before it in the tar",
    }


@pytest.mark.skipif(not shutil.which("tar"), reason="needs GNU tar")
@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_sparse_file_is_named_not_misread(tmp_path, kind):
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    command = ["tar", "-S", f"--format={kind}", "-C", tmp_path, "-cf", tmp_path / "t.tar", "hole.jpg"]
    subprocess.run(command, check=True)
    assert listed(tmp_path / "t.tar") == (
        {}, {"hole.jpg": "a sparse file, whose bytes do not lie together in the tar"}
    )  # fmt: skip


def test_headers_are_not_kept(tmp_path):
    """A tar of ImageNet has a million: its check takes the memory of one header."""
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for i in range(2000):
            tar.addfile(tarfile.TarInfo(f"{i}.jpg"))
    tracemalloc.start()
    check_tar(str(tmp_path / "t.tar"))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2000 * sys.getsizeof("0.jpg")  # less than the names alone


def test_the_first_names_are_read_without_the_rest(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in "abc":
            tar.addfile(tarfile.TarInfo(name))
    assert first_names(str(tmp_path / "t.tar"), 2) == ["a", "b"]
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "t.tar").read_bytes()[:1024])
    assert first_names(str(cut), 2) == ["a", "b"]
    with pytest.raises(UserError, match="is truncated"):
        check_tar(str(cut))
    with pytest.raises(UserError, match="the tar .*gone.tar cannot be used: No such file or directory"):
        check_tar(str(tmp_path / "gone.tar"))
