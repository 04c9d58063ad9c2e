"""Sources other than a folder: ImageNet's tar of tars, class tars, WebDataset; and the oddities of real images."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from data_sharding.storage.tar_members import list_tar
from data_sharding.stream.frames import read_frame
from data_sharding.verify import verify
from data_sharding.write.entries import sample_id
from data_sharding.write.image_sources import open_source
from data_sharding.write.images import write_dataset
from tests.support.written_datasets import bytes_of, make_images

OPTIONS = {"max_tokens": 16, "images_per_shard": 7, "workers": 1, "progress": False, "allow_empty": True}


def write_tar(path: Path, files: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of three classes and a class without any, in class folders."""
    root = tmp_path_factory.mktemp("images")
    make_images(root, 24)
    (root / "bat").mkdir()
    return root


@pytest.fixture(scope="module")
def from_folder(folder, tmp_path_factory) -> Path:
    dst = tmp_path_factory.mktemp("from_folder") / "set"
    write_dataset(str(folder), str(dst), **OPTIONS)
    return dst


def same_but_for_counts(a: Path, b: Path) -> bool:
    """The tars hold further files, which are counted in source.json."""
    a_files, b_files = bytes_of(a), bytes_of(b)
    return a_files.pop("source.json") != b_files.pop("source.json") and a_files == b_files


def class_tars(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    for name in ("cow", "ant", "bee", "bat"):
        files = {file.name: file.read_bytes() for file in sorted((folder / name).iterdir(), reverse=True)}
        write_tar(to / f"{name}.tar", {"README": b"left aside"} | files)
    return to


def imagenet(folder: Path, tmp_path: Path) -> Path:
    """As ILSVRC2012_img_train.tar: it holds one tar per class."""
    tars = class_tars(folder, tmp_path / "tars")
    inner = {file.name: file.read_bytes() for file in sorted(tars.iterdir())}
    return write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner)


def test_a_tar_of_tars_is_the_same_source_as_its_folders(folder, from_folder, tmp_path):
    src = imagenet(folder, tmp_path)
    source = open_source(str(src))
    assert source.classes == ("ant", "bat", "bee", "cow")
    assert source.digest == open_source(str(folder)).digest
    write_dataset(str(src), str(tmp_path / "set"), **OPTIONS)
    assert same_but_for_counts(tmp_path / "set", from_folder)
    write_dataset(str(src), str(from_folder), **OPTIONS)  # and continues it


def test_a_folder_of_class_tars_too(folder, from_folder, tmp_path):
    write_dataset(str(class_tars(folder, tmp_path / "tars")), str(tmp_path / "set"), **{**OPTIONS, "workers": 2})
    assert same_but_for_counts(tmp_path / "set", from_folder)


def test_sorted_wnids_are_the_labels(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (40, 40)).save(picture, "JPEG")
    wnids = [f"n{i:08d}" for i in (7, 1440764, 9, 123)]
    inner = {}
    for wnid in wnids:
        tar = write_tar(tmp_path / "inner.tar", {f"{wnid}_1.JPEG": picture.getvalue()})
        inner[f"{wnid}.tar"] = tar.read_bytes()
    source = open_source(str(write_tar(tmp_path / "train.tar", inner)))
    assert source.classes == tuple(sorted(wnids))
    assert {e.key: e.label for e in source.entries} == {f"{w}/{w}_1.JPEG": i for i, w in enumerate(sorted(wnids))}
    assert all(entry.data.read() == picture.getvalue() for entry in source.entries)


def webdataset(folder: Path, to: Path, label, tars: int = 3, kind: int = tarfile.GNU_FORMAT) -> dict[str, bytes]:
    """Tars of the folder's images; returns key to bytes."""
    to.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.rglob("*.jpg"))
    keys = {}
    for number in range(tars):
        members = {}
        for i, file in enumerate(files[number::tars]):
            stem = f"./deep.er/{i:04d}"
            members |= {f"{stem}.{name}": data for name, data in label(file).items() if name < "jpg"}
            members[f"{stem}.JPG"] = file.read_bytes()
            members |= {f"{stem}.{name}": data for name, data in label(file).items() if name > "jpg"}
            keys[f"train-{number:04d}/deep.er/{i:04d}.JPG"] = file
        write_tar(to / f"train-{number:04d}.tar", members, kind)
    return keys


CLASSES = ("ant", "bee", "cow")


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        (lambda f: {"cls": str(2 * CLASSES.index(f.parent.name)).encode() + b"\n"}, ("0", "1", "2", "3", "4")),
        (lambda f: {"cls": f.parent.name.encode()}, CLASSES),
        (lambda f: {"json": json.dumps({"label": CLASSES.index(f.parent.name)}).encode()}, ("0", "1", "2")),
        (lambda f: {"json": b'{"caption": "x"}', "cls": f.parent.name.encode(), "txt": b"y"}, CLASSES),
    ],
)
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_tars(folder, tmp_path, label, classes, kind):
    keys = webdataset(folder, tmp_path / "wds", label, kind=kind)
    source = open_source(str(tmp_path / "wds"))
    assert source.classes == classes and {entry.key for entry in source.entries} == keys.keys()
    for entry in source.entries:
        assert entry.data.read() == keys[entry.key].read_bytes() and entry.id == sample_id(entry.key)
        name = keys[entry.key].parent.name
        assert source.classes[entry.label] == (name if classes == CLASSES else str(entry.label))
        assert entry.label == CLASSES.index(name) * (2 if len(classes) == 5 else 1)
    pattern = open_source(f"{tmp_path}/wds/train-{{0000..0002}}.tar")
    assert (pattern.digest, pattern.classes) == (source.digest, source.classes)
    report = write_dataset(str(tmp_path / "wds"), str(tmp_path / "set"), **OPTIONS)
    assert report.images == 24 and verify(str(tmp_path / "set")).problems == ()


def test_webdataset_agrees_with_the_librarys_own_reader(folder, tmp_path):
    wds = pytest.importorskip("webdataset")
    keys = webdataset(folder, tmp_path / "wds", lambda f: {"cls": str(CLASSES.index(f.parent.name)).encode()})
    source = open_source(str(tmp_path / "wds"))
    ours = sorted((entry.data.read(), entry.label) for entry in source.entries)
    urls = [str(path) for path in sorted((tmp_path / "wds").iterdir())]
    theirs = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("cls")
    raw = wds.WebDataset(urls, shardshuffle=False)
    assert ours == sorted((sample["jpg"], label) for sample, (label,) in zip(raw, theirs, strict=True))
    assert len(keys) == len(ours)


def test_bad_tars_are_one_sentence_each(folder, tmp_path):
    def refused(src, match):
        with pytest.raises(UserError, match=match):
            write_dataset(str(src), str(tmp_path / "dst"), **OPTIONS)
        assert not (tmp_path / "dst").exists()

    good = imagenet(folder, tmp_path)
    data = good.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut.tar", "cut.tar is not a complete tar")
    header = next(iter(list_tar(str(good)))).data
    end = header.start + -(-header.size // 512) * 512
    (tmp_path / "boundary.tar").write_bytes(data[:end])  # at a member's end: tarfile alone would see nothing wrong
    refused(tmp_path / "boundary.tar", "boundary.tar is truncated or damaged")
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    refused(tmp_path / "text.tar", "text.tar is not a complete tar")
    import gzip

    (tmp_path / "zipped.tar").write_bytes(gzip.compress(data[:10000]))
    refused(tmp_path / "zipped.tar", "is compressed")
    image = next((folder / "ant").iterdir()).read_bytes()
    refused(write_tar(tmp_path / "none.tar", {"a.txt": b""}), "holds no images")
    refused(write_tar(tmp_path / "folders.tar", {"ant/a.jpg": image}), "holds folders of images: unpack it")
    refused(write_tar(tmp_path / "label.tar", {"a.jpg": image, "a.json": b"{}"}), r"label.tar: a.jpg has no label")
    twice = [("a.jpg", image), ("a.cls", b"1"), ("b.jpg", image), ("b.cls", b"1"), ("a.jpg", image), ("a.cls", b"1")]
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name, content in twice:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    refused(tmp_path / "twice.tar", "the sample twice/a.jpg occurs twice")
    refused(tmp_path / "missing.tar", "there is nothing at .*missing.tar: check the path")
    refused(tmp_path / "missing-{0..1}.tar", "the tar .*missing-0.tar cannot be used: No such file")


def test_a_missing_library_is_one_sentence(folder, tmp_path, monkeypatch):
    import sys

    webdataset(folder, tmp_path / "wds", lambda f: {"cls": b"1"})
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[webdataset\]'"):
        open_source(str(tmp_path / "wds"))


def test_a_tar_that_shrinks_while_it_is_read_is_an_error_not_a_bad_image(folder, tmp_path):
    src = imagenet(folder, tmp_path)
    source = open_source(str(src))
    src.write_bytes(src.read_bytes()[:1000])
    with pytest.raises(UserError, match="it has changed; run the command again"):
        source.entries[-1].data.read()


@pytest.mark.parametrize("max_tokens", [256, 1024])
def test_the_oddities_of_imagenet(tmp_path, max_tokens):
    """CMYK JPEGs, a PNG and a GIF named .JPEG, grayscale, EXIF rotation: in a tar of tars, by FiT's rule."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (375, 500, 3), np.uint8))
    large = Image.fromarray(rng.integers(0, 256, (600, 700, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6

    def file(picture, kind, **options) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    files = {
        "cmyk.JPEG": file(image.convert("CMYK"), "JPEG"),
        "png.JPEG": file(image, "PNG"),
        "gif.JPEG": file(image, "GIF"),
        "gray.JPEG": file(image.convert("L"), "JPEG"),
        "turned.JPEG": file(image, "JPEG", exif=exif),
        "large.JPEG": file(large, "JPEG"),
    }
    inner = write_tar(tmp_path / "n00000001.tar", files)
    src = write_tar(tmp_path / "train.tar", {inner.name: inner.read_bytes()})
    report = write_dataset(str(src), str(tmp_path / "set"), **{**OPTIONS, "max_tokens": max_tokens})
    assert (report.images, report.skipped) == (6, 0)
    manifest = Manifest.load(str(tmp_path / "set"))
    sizes = {s.id: s.size for f in range(len(manifest.frame_shard)) for s in read_frame(manifest, f)}
    found = {name: sizes[sample_id(f"n00000001/{name}")] for name in files}
    wide, side = ((13, 18), 16) if max_tokens == 256 else ((23, 31), 32)
    crop = (side, side) if max_tokens == 256 else (0, 0)  # 375 pixels are no more than 512
    assert all(found[name] == (wide, crop) for name in ("cmyk.JPEG", "png.JPEG", "gif.JPEG", "gray.JPEG"))
    assert found["turned.JPEG"] == (wide[::-1], crop)
    assert found["large.JPEG"][1] == (side, side)


def test_other_labels_are_another_source(folder, tmp_path):
    digests = set()
    for name, label in (("a", b"1"), ("b", b"2")):
        webdataset(folder, tmp_path / name, lambda f, label=label: {"cls": label if "ant" in str(f) else b"2"})
        digests.add(open_source(str(tmp_path / name)).digest)
    assert len(digests) == 2


def test_the_source_may_be_moved(folder, from_folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert write_dataset(str(tmp_path / "elsewhere"), str(from_folder), **OPTIONS).encoded == 0
