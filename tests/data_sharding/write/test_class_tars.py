"""Class tars with links, doubled names and what else tars hold; folders of tars with what lies beside them."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from data_sharding.errors import UserError
from data_sharding.write.image_sources import open_source
from data_sharding.write.images import write_dataset
from tests.support.pictures import file_of, noise

JPEG, OTHER = file_of(noise(32, 32), "JPEG"), file_of(noise(32, 32, 1), "JPEG")


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """``members``: (name, bytes, or the name that it is a hard link to)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.LNKTYPE, data
                out.addfile(info)
            else:
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return path


def found(src: Path) -> dict[str, tuple[int, bytes]]:
    return {entry.key: (entry.label, entry.data.read()) for entry in open_source(str(src)).entries}


def test_a_hard_linked_image_is_read_in_class_tars_and_in_webdatasets(tmp_path):
    tar(tmp_path / "c/ant.tar", ("1.jpg", JPEG), ("2.jpg", "1.jpg"))
    tar(tmp_path / "c/bee.tar", ("1.jpg", OTHER))
    assert found(tmp_path / "c") == {"ant/1.jpg": (0, JPEG), "ant/2.jpg": (0, JPEG), "bee/1.jpg": (1, OTHER)}
    outer = tar(tmp_path / "all.tar", ("a.tar", (tmp_path / "c/ant.tar").read_bytes()), ("b.tar", "a.tar"))
    assert found(outer) == {f"{c}/{i}.jpg": (label, JPEG) for label, c in enumerate("ab") for i in (1, 2)}
    members = [
        ("0.jpg", JPEG),
        ("0.cls", b"1"),
        ("1.jpg", "0.jpg"),
        ("1.cls", b"0"),
        ("2.jpg", OTHER),
        ("2.cls", "0.cls"),
    ]
    tar(tmp_path / "w/x.tar", *members)
    assert found(tmp_path / "w") == {"x/0.jpg": (1, JPEG), "x/1.jpg": (0, JPEG), "x/2.jpg": (1, OTHER)}


def test_what_a_tar_holds_besides_is_counted_or_named(tmp_path):
    latin = os.fsdecode(b"caf\xe9.jpg")
    tar(tmp_path / "c/ant.tar", ("1.jpg", OTHER), ("1.jpg", JPEG), ("2.jpg", "gone.jpg"), (latin, JPEG), ("x.txt", b""))
    tar(tmp_path / "c/bee.tar", ("1.jpg", OTHER), ("__MACOSX/._1.jpg", b""), ("2.heic", b""))
    (tmp_path / "c/lost+found").mkdir()
    (tmp_path / "c/preview.jpg").write_bytes(JPEG)
    assert found(tmp_path / "c") == {"ant/1.jpg": (0, JPEG), "bee/1.jpg": (1, OTHER)}  # the last counts, as unpacked
    report = write_dataset(str(tmp_path / "c"), str(tmp_path / "set"), max_tokens=16, workers=1, progress=False)
    assert {e["source"]: e["reason"] for e in json.loads((tmp_path / "set/skipped.json").read_bytes())} == {
        "ant/2.jpg": "a link to a file that is not before it in the tar",
        "ant/caf\\xe9.jpg": "the name is not UTF-8: rename the file",
        "preview.jpg": "it lies beside the tars and belongs to no class",
    }
    assert report.left_aside == {
        ".heic": 1, ".txt": 1, "folder lost+found": 1, "in __MACOSX/": 1,
        "replaced by a later file of the same name": 1,
    }  # fmt: skip


def test_what_would_lose_or_mislabel_a_class_is_refused(tmp_path):
    def refused(src: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            write_dataset(str(src), str(tmp_path / "set"), max_tokens=16, workers=1, progress=False)
        assert not (tmp_path / "set").exists()

    tar(tmp_path / "zipped/ant.tar", ("1.jpg", JPEG))
    (tmp_path / "zipped/bee.tar.gz").write_bytes(b"")
    refused(tmp_path / "zipped", r"holds compressed archives beside tars \(bee.tar.gz\): make plain tars of")
    (tmp_path / "zipped/bee.tar.gz").rename(tmp_path / "zipped/bee.ZIP")
    refused(tmp_path / "zipped", r"holds compressed archives beside tars \(bee.ZIP\)")
    refused(tar(tmp_path / "inner.tar", ("a.tar", b""), ("b.tgz", b"")), r"compressed archives beside tars \(b.tgz\)")
    tar(tmp_path / "linked/ant.tar", ("1.jpg", JPEG))
    (tmp_path / "linked/bee.tar").symlink_to("/mnt/nowhere.tar")
    refused(tmp_path / "linked", "bee.tar cannot be read: it is a link to nothing; correct it")
    os.mkfifo(tmp_path / "linked/cow.tar")
    (tmp_path / "linked/bee.tar").unlink()
    refused(tmp_path / "linked", "cow.tar cannot be read: it is a pipe, a socket or a device")
    one = (tmp_path / "zipped/ant.tar").read_bytes()
    refused(tar(tmp_path / "twice.tar", ("a/ant.tar", one), ("b/ant.tar", one)), "several tars of the class ant")
    refused(
        tar(tmp_path / "gone.tar", ("ant.tar", one), ("bee.tar", "cow.tar")), "bee.tar cannot be read .*class would"
    )
    for part in ("train", "val"):
        tar(tmp_path / f"parts/{part}.tar", ("ant/1.jpg", JPEG))
    refused(tmp_path / "parts", "holds train, val, which are parts of a dataset.*: unpack one part and give its folder")
    tar(tmp_path / "empty/ant.tar", ("1.jpg", JPEG))
    tar(tmp_path / "empty/bee.tar", ("x.txt", b""))
    refused(tmp_path / "empty", r"1 of the 2 classes in .* hold no image \(bee\)")
    images = [(f"{i}.jpg", JPEG) for i in range(101)]
    tar(tmp_path / "late/x.tar", *images, *((f"{i}.cls", b"0") for i in range(101)))
    refused(tmp_path / "late", r"holds labels \(.cls\), but not beside its images: write the tar again")


@pytest.mark.parametrize("suffix", ["json", "class", "label", "txt", "target.TXT"])
def test_a_file_beside_each_image_may_be_its_label(tmp_path, suffix):
    images = [(f"deep/{i:03d}.jpg", JPEG) for i in range(101)]
    tar(tmp_path / "c/x.tar", *images, *((f"deep/{i:03d}.{suffix}", b'{"label": 1}') for i in range(1, 101)))
    tar(tmp_path / "c/y.tar", *images)
    last = suffix.lower().rpartition(".")[2]
    with pytest.raises(UserError, match=rf"x.tar holds a .{last} for each image, which may be its label; labels are"):
        found(tmp_path / "c")
    (tmp_path / "c/x.tar").rename(tmp_path / "c/z.tar")  # not the first tar either
    with pytest.raises(UserError, match=rf"z.tar holds a .{last} for each image"):
        found(tmp_path / "c")


def test_a_few_files_in_class_tars_are_no_labels(tmp_path):
    tar(tmp_path / "c/ant.tar", ("1.jpg", JPEG), ("meta.json", b"{}"), ("2.jpg", JPEG), ("3.jpg", JPEG), ("3.txt", b""))
    tar(tmp_path / "c/bee.tar", *((f"bee.{i}.jpg", OTHER) for i in range(9)), ("bee.json", b"{}"))
    assert [label for label, _ in found(tmp_path / "c").values()] == [0] * 3 + [1] * 9
    source = open_source(str(tmp_path / "c"))
    assert source.findings.left_aside == {".json": 2, ".txt": 1}


def test_a_tar_is_a_tar_in_upper_case_too(tmp_path):
    tar(tmp_path / "c/ant.tar", ("1.jpg", JPEG))
    tar(tmp_path / "c/bee.TAR", ("1.jpg", OTHER))
    tar(tmp_path / "c/cow.Tar", ("1.jpg", JPEG))
    expected = {"ant/1.jpg": (0, JPEG), "bee/1.jpg": (1, OTHER), "cow/1.jpg": (2, JPEG)}
    assert found(tmp_path / "c") == expected
    inner = [(file.name, file.read_bytes()) for file in (tmp_path / "c").iterdir()]
    assert found(tar(tmp_path / "ALL.TAR", *inner)) == expected
    tar(tmp_path / "c/ant.TAR", ("2.jpg", JPEG))
    with pytest.raises(UserError, match="several tars of the class ant"):
        found(tmp_path / "c")


@pytest.mark.parametrize(
    ("tars", "named"),
    [
        ({"images_0": ["cat/0.jpg", "dog/0.jpg"], "images_1": ["cat/1.jpg", "dog/1.jpg"]}, "images_0.tar .*cat, dog"),
        ({"images_0": ["cat/0.jpg"], "images_1": ["data/cow/1.jpg", "data/dog/1.jpg"]}, "images_1.tar .*data/cow"),
        ({"images_0": ["cat/0.jpg"], "images_1": ["cat/1.jpg"], "images_2": ["dog/0.jpg"]}, "images_0.tar .*cat"),
    ],
)
def test_tars_that_hold_the_class_folders_are_no_classes(tmp_path, tars, named):
    for name, members in tars.items():
        tar(tmp_path / f"c/{name}.tar", *((member, JPEG) for member in members))
    with pytest.raises(UserError, match=rf"{named}.*\): unpack it and give the folder"):
        found(tmp_path / "c")


def test_folders_in_class_tars_are_allowed(tmp_path):
    """The folder that was packed, folders in it, and a folder that all classes have."""
    tar(tmp_path / "own/cat.tar", ("cat/1.jpg", JPEG), ("cat/more/2.jpg", JPEG))
    tar(tmp_path / "own/dog.tar", ("./data/dog/1.jpg", OTHER))
    assert [label for label, _ in found(tmp_path / "own").values()] == [0, 0, 1]
    tar(tmp_path / "same/cat.tar", ("images/1.jpg", JPEG))
    tar(tmp_path / "same/dog.tar", ("images/1.jpg", OTHER))
    tar(tmp_path / "same/elk.tar", ("1.jpg", OTHER), ("young/2.jpg", OTHER))
    assert [label for label, _ in found(tmp_path / "same").values()] == [0, 1, 2, 2]
