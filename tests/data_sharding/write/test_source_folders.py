"""Class folders with what people and systems put in them: links, pipes, system folders, odd names, wrong levels. What
is written has the right label; everything else is counted, named or refused."""

import json
import os
import socket
import stat
from pathlib import Path

import fsspec
import pytest

from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from data_sharding.write import source_files
from data_sharding.write.entries import sample_id
from data_sharding.write.image_sources import open_folder, open_source
from data_sharding.write.images import write_dataset
from data_sharding.write.write_report import to_text
from tests.support.pictures import file_of, noise

JPEG = file_of(noise(32, 32), "JPEG")


def put(root: Path, *names: str, data: bytes = JPEG) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write(src: Path, dst: Path, **options):
    options = {"max_tokens": 16, "workers": 1, "progress": False} | options
    return write_dataset(str(src), str(dst), **options)


def labels(src: Path) -> dict[str, int]:
    return {entry.key: entry.label for entry in open_source(str(src)).entries}


def reasons(dst: Path) -> dict[str, str]:
    return {entry["source"]: entry["reason"] for entry in json.loads((dst / "skipped.json").read_bytes())}


def test_linked_folders_and_files_are_followed(tmp_path):
    """As torchvision's ImageFolder (os.walk with followlinks) finds them."""
    elsewhere = put(tmp_path / "elsewhere", "x/1.jpg", "x/deep/2.jpg", "y/2.jpg", "3.jpg")
    src = put(tmp_path / "src", "bee/0.jpg")
    (src / "ant").symlink_to(elsewhere / "x")
    (src / "cow").mkdir()
    (src / "cow/herd").symlink_to(elsewhere / "y")
    (src / "cow/3.jpg").symlink_to("../../elsewhere/3.jpg")
    expected = {"ant/1.jpg": 0, "ant/deep/2.jpg": 0, "bee/0.jpg": 1, "cow/herd/2.jpg": 2, "cow/3.jpg": 2}
    walked = {
        str((Path(folder) / file).relative_to(src))
        for folder, _, files in os.walk(src, followlinks=True)
        for file in files
    }
    assert labels(src) == expected and walked == expected.keys()
    assert write(src, tmp_path / "set").images == 5
    assert set(Manifest.load(str(tmp_path / "set")).sample_id.tolist()) == {sample_id(key) for key in expected}


def test_what_is_no_file_is_left_out_by_name_and_the_rest_is_written(tmp_path):
    src = put(tmp_path / "src", "ant/1.jpg", "bee/2.jpg")
    latin = os.fsdecode(b"caf\xe9.jpg")
    put(src, f"ant/{latin}", "ant/a::b.jpg", "ant/#1?x=%20.jpg")
    (src / "ant/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (src / "ant/gone").symlink_to(tmp_path / "nowhere")
    (src / "ant/self.jpg").symlink_to("self.jpg")
    (src / "bee/up").symlink_to(src)
    (src / "bee/round").symlink_to("../bee")
    os.mkfifo(src / "bee/pipe.jpg")
    (src / "bee/zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(src / "bee", os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket.jpg")
        os.close(here)
        report = write(src, tmp_path / "set")
    expected = {
        "ant/caf\\xe9.jpg": "the name is not UTF-8: rename the file",
        "ant/gone": "a link to nothing",
        "ant/gone.jpg": "a link to nothing",
        "ant/self.jpg": "a link that leads back to itself",
        "bee/pipe.jpg": "a pipe, a socket or a device, not a file",
        "bee/round/": "a link back to a folder above it",
        "bee/socket.jpg": "a pipe, a socket or a device, not a file",
        "bee/up/": "a link back to a folder above it",
        "bee/zero.jpg": "a pipe, a socket or a device, not a file",
    }
    assert reasons(tmp_path / "set") == expected
    assert (report.images, report.skipped, report.seen) == (4, 9, {".jpg": 10, "no suffix": 1})
    assert write(src, tmp_path / "set").skipped == 9  # and so again, when nothing is left to do


def test_a_pipe_is_known_before_it_is_opened(tmp_path):
    """Whoever opens one waits until somebody writes to it."""
    src = put(tmp_path / "src", "ant/1.jpg")
    os.mkfifo(src / "ant/2.jpg")
    source = open_source(str(src))
    assert [entry.key for entry in source.entries] == ["ant/1.jpg"]
    assert source.findings.left_out == [("ant/2.jpg", "a pipe, a socket or a device, not a file")]


def test_a_folder_or_file_without_permission_is_left_out_by_name(tmp_path, monkeypatch):
    """The tests may run as root, whom nothing is forbidden: the system calls answer as they would to others."""
    src = put(tmp_path / "src", "ant/1.jpg", "ant/private.jpg", "bee/2.jpg", "cow/shut/3.jpg", "cow/4.jpg")
    (src / "ant/private.jpg").chmod(0o600)
    honest = os.scandir

    def scandir(path):
        if str(path).rstrip("/").endswith(("/bee", "/shut")):
            raise PermissionError(13, "Permission denied", path)
        return honest(path)

    monkeypatch.setattr(source_files.os, "scandir", scandir)
    monkeypatch.setattr(source_files.os, "access", lambda path, mode: bool(os.stat(path).st_mode & stat.S_IROTH))
    report = write(src, tmp_path / "set")
    assert reasons(tmp_path / "set") == {
        "ant/private.jpg": "it cannot be opened: Permission denied",
        "bee/": "the folder cannot be opened: Permission denied",
        "cow/shut/": "the folder cannot be opened: Permission denied",
    }
    manifest = Manifest.load(str(tmp_path / "set"))
    assert manifest.classes == ("ant", "bee", "cow") and sorted(manifest.label.tolist()) == [
        0,
        2,
    ]  # bee keeps its label
    assert (report.images, report.skipped, report.without_images) == (2, 3, ("bee",))


def test_system_folders_are_no_classes_and_hold_no_images(tmp_path):
    src = put(tmp_path / "src", "ant/1.jpg", "bee/2.jpg", "bee/notes.txt")
    put(src, "__MACOSX/ant/._1.jpg", "lost+found/9.jpg", ".git/x.jpg", "@eaDir/y.jpg", "$RECYCLE.BIN/z.jpg")
    put(src, "ant/.ipynb_checkpoints/1-checkpoint.jpg", "ant/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "bee/Thumbs.db")
    report = write(src, tmp_path / "set")
    assert labels(src) == {"ant/1.jpg": 0, "bee/2.jpg": 1}
    assert (report.images, report.skipped, report.classes) == (2, 0, 2)
    assert report.left_aside == {
        "folder @eaDir": 2, ".db": 1, ".txt": 1, "folder $RECYCLE.BIN": 1, "folder .git": 1,
        "folder .ipynb_checkpoints": 1, "folder __MACOSX": 1, "folder lost+found": 1,
    }  # fmt: skip


def test_the_report_says_what_was_seen_and_what_became_of_it(tmp_path):
    src = put(
        tmp_path / "src", "ant/1.jpg", "ant/2.JPEG", "bee/3.jpg", "bee/4.jp2", "bee/5.heic", "ant/6.heic", "LICENSE"
    )
    put(src, "bee/7.jpg", data=b"no image")
    put(src, "bee/8.gif", data=file_of(noise(32, 32), "GIF", save_all=True, append_images=[noise(32, 32, 1)]))
    (src / "cow").mkdir()
    report = write(src, tmp_path / "set", allow_empty=True)
    assert to_text(report).splitlines()[1:] == [
        "  files seen: 9 (.jpg 3, .heic 2, .gif 1, .jp2 1, .jpeg 1, no suffix 1)",
        "  no images by their names, left aside: .heic 2, .jp2 1, no suffix 1",
        "  images left out, named in skipped.json: not an image of a known format 1",
        "  files with several frames or pages, of which the first was taken: 1",
        "  classes without an image: 1 (cow)",
    ]
    assert to_text(report).startswith(f"{tmp_path}/set: 4 images of 3 classes in 1 shards, ")
    assert sum(report.seen.values()) == report.images + report.skipped + sum(report.left_aside.values())
    again = write(src, tmp_path / "set", allow_empty=True)
    assert to_text(again) == to_text(report) and again.encoded == 0


def test_a_class_without_an_image_is_refused_or_keeps_its_label(tmp_path):
    src = put(tmp_path / "src", "ant/1.jpg", "bat/readme.txt", "cow/2.jpg")
    with pytest.raises(
        UserError, match=r"1 of the 3 classes in .* hold no image \(bat\): .* keep all with --allow-empty"
    ):
        write(src, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    report = write(src, tmp_path / "set", allow_empty=True)
    assert report.without_images == ("bat",) and Manifest.load(str(tmp_path / "set")).classes == ("ant", "bat", "cow")
    assert labels(src) == {"ant/1.jpg": 0, "cow/2.jpg": 2}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.jpg", "b.jpg", "ant/c.jpg"],
            r"2 images lie directly in .*src and belong to no class \(a.jpg, b.jpg\): move",
        ),
        (
            ["train/ant/1.jpg", "val/ant/2.jpg"],
            "holds train, val, which are parts of a dataset .*such as .*/src/train$",
        ),
        (["Train/ant/1.jpg"], "holds Train, which are parts of a dataset"),
        (
            ["train/1.jpg", "test/2.jpg"],
            "holds test, train, which are parts of a dataset and not classes: put the images",
        ),
        (["caf\u00e9/1.jpg", "cafe\u0301/2.jpg"], "two classes of the same name .*different Unicode"),
        (
            [os.fsdecode(b"caf\xe9/1.jpg"), "ant/1.jpg"],
            r"caf\\xe9 may be a class, but cannot be read \(the folder's name",
        ),
        (["ant.txt", "b.heic"], "has no class folders"),
    ],
)
def test_what_would_give_wrong_labels_is_refused(tmp_path, names, message):
    src = put(tmp_path / "src", *names)
    with pytest.raises(UserError, match=message):
        write(src, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_classes_may_be_called_train_or_differ_in_case(tmp_path):
    assert labels(put(tmp_path / "one", "train/1.jpg")) == {"train/1.jpg": 0}
    assert labels(put(tmp_path / "two", "train/1.jpg", "bus/1.jpg")) == {"bus/1.jpg": 0, "train/1.jpg": 1}
    assert labels(put(tmp_path / "three", "Cat/1.jpg", "cat/1.jpg", "cat/1.png")) == {
        "Cat/1.jpg": 0, "cat/1.jpg": 1, "cat/1.png": 1,
    }  # fmt: skip


def test_links_that_would_lose_or_double_a_class_are_refused(tmp_path):
    src = put(tmp_path / "src", "ant/1.jpg")
    (src / "bee").symlink_to(tmp_path / "unmounted")
    with pytest.raises(
        UserError, match=r"src/bee may be a class, but cannot be read \(a link to nothing\): correct it"
    ):
        open_folder(str(src))
    (src / "bee").unlink()
    (src / "bee").symlink_to("ant")
    with pytest.raises(UserError, match="the classes ant, bee in .* are one folder, one of them a link"):
        open_folder(str(src))


@pytest.mark.parametrize("name", ["cow.tar", "cow.TAR", "cow.tar.gz", "cow.zip"])
def test_an_archive_beside_class_folders_may_be_a_class(tmp_path, name):
    src = put(tmp_path / "src", "ant/1.jpg", "bee/2.jpg", name)
    with pytest.raises(UserError, match=rf"holds archives \({name}\), each of which may be a class .*: unpack each"):
        write(src, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_source_that_is_no_folder_is_refused_with_the_reason(tmp_path):
    put(tmp_path, "photos.zip", "a::b/ant/1.jpg", "{x}/ant/1.jpg")
    (tmp_path / "link").symlink_to("/mnt/nowhere")
    for name, message in {
        "nothing": "there is nothing at .*nothing: check the path",
        "photos.zip": "photos.zip is a file, not a folder: give a folder .*unpack other archives first",
        "photos.zip/ant": "there is nothing at .*: a part of this path is a file",
        "link": "link is a link to /mnt/nowhere, where there is nothing",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / name))
    for name in ("a::b", "{x}"):  # neither a chain of file systems nor a pattern
        (entry,) = open_source(str(tmp_path / name)).entries
        assert entry.data.read() == JPEG


def test_a_source_without_permission_is_refused_with_the_reason(tmp_path, monkeypatch):
    src = put(tmp_path / "src", "ant/1.jpg")

    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(source_files.os, "scandir", scandir)
    with pytest.raises(UserError, match="the folder .*src cannot be opened: Permission denied$"):
        open_source(str(src))


def test_the_storages_faults_are_not_the_images(tmp_path, monkeypatch):
    src = put(tmp_path / "src", "ant/1.jpg", "bee/1.jpg")
    honest = os.scandir

    def scandir(path):
        if str(path).rstrip("/").endswith("/bee"):
            raise OSError(5, "Input/output error", path)
        return honest(path)

    monkeypatch.setattr(source_files.os, "scandir", scandir)
    with pytest.raises(UserError, match="src/bee/ cannot be listed: Input/output error; check the storage, then run"):
        open_folder(str(src))


def test_images_of_a_store_that_is_no_disk():
    memory = fsspec.filesystem("memory")
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        memory.pipe(f"/source/{name}", file_of(noise(16, 16, len(name)), "PNG"))
    source = open_source("memory://source")
    assert [entry.key for entry in source.entries] == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert list(source.classes) == ["cat", "dog"]


def test_what_else_a_store_holds_is_counted():
    memory = fsspec.filesystem("memory")
    for name in ("cat/1.png", "cat/a.txt", "dog/.cache/2.png", "dog/1.png", "__MACOSX/cat/1.png"):
        memory.pipe(f"/mixed/{name}", JPEG)
    source = open_source("memory://mixed")
    assert {entry.key: entry.label for entry in source.entries} == {"cat/1.png": 0, "dog/1.png": 1}
    assert (source.classes, source.empty) == (("cat", "dog"), ())
    assert source.findings.left_aside == {".txt": 1, "in .cache/": 1, "in __MACOSX/": 1}
