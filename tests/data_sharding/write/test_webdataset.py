"""WebDataset samples as people make them: labels of every kind, several images in a sample, dotted names. A label is
right or refused by name."""

import io
import json
import math
import os
import tarfile
from pathlib import Path

import pytest

from data_sharding.errors import UserError
from data_sharding.write.image_sources import open_source
from data_sharding.write.images import write_dataset
from tests.support.pictures import file_of, noise

PNG, OTHER = file_of(noise(32, 32), "PNG"), file_of(noise(32, 32, 1), "PNG")


def tar(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return str(path)


def labelled(path: Path, kind: str, values: list[bytes]) -> str:
    files = {}
    for i, value in enumerate(values):
        files |= {f"{i:04d}.png": PNG, f"{i:04d}.{kind}": value}
    return tar(path, files)


def label(value) -> bytes:
    return json.dumps({"label": value}).encode()


def labels(src: str) -> list[int]:
    return [entry.label for entry in open_source(src).entries]


@pytest.mark.parametrize(
    ("kind", "values", "expected", "classes"),
    [
        ("json", [label(float(i)) for i in range(12)], list(range(12)), 12),  # as texts, "10.0" would come before "2.0"
        ("json", [label("3"), label(3), label(3.0), label("3.0")], [3, 3, 3, 3], 4),
        ("cls", [b"10", b"2", b"0\r\n", b"\xef\xbb\xbf1", b" 2.0 ", b"007", b"1e1"], [10, 2, 0, 1, 2, 7, 10], 11),
        ("cls", [b"cat\r\n", b"\xef\xbb\xbfant", "b\u00e4r".encode()], [2, 0, 1], 3),
        ("json", [b"\xef\xbb\xbf" + label("cat"), label(" ant ")], [1, 0], 2),
        ("cls", [b"n01440764", b"n00000009"], [1, 0], 2),
        ("cls", [b"99999"], [99999], 100_000),
    ],
)
def test_a_number_is_that_number_and_a_name_its_place(tmp_path, kind, values, expected, classes):
    src = labelled(tmp_path / "a.tar", kind, values)
    assert labels(src) == expected and len(open_source(src).classes) == classes


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("cls", b"-1", "0001.png is -1, which is no class"),
        ("cls", b"2.5", "0001.png is 2.5, which is no class"),
        ("cls", b"", "0001.png is empty"),
        ("cls", b"3\n4", r"0001.png is 3\\n4, which holds line breaks"),
        ("cls", b"c\xe4t", "0001.png is not UTF-8"),
        ("cls", "3".encode("utf-16"), "0001.png is not UTF-8"),
        ("cls", b"nan", "0001.png is nan, which is no class but a missing value: correct it"),
        ("cls", b"NaN\n", "0001.png is NaN, which is no class"),
        ("cls", b"None", "0001.png is None, which is no class"),
        ("cls", b"null", "0001.png is null, which is no class"),
        ("cls", b"-inf", "0001.png is -inf, which is no class"),
        ("json", label("nan"), "0001.png is nan, which is no class"),
        ("json", b'{"label": 0, "label": 1}', r"0001.png is given more than once in its .json \(several \"label\"\)"),
        ("json", b'{"label": 0, "label": 0}', "0001.png is given more than once"),
        ("cls", b"cat", r"mixes labels that are numbers \(0 of .*0000.png\) with names \(cat of .*0001.png\)"),
        ("cls", b"2000000000", "0001.png is 2000000000, but there are only 2 samples"),
        ("cls", b"1440764", "0001.png is 1440764, but there are only 2 samples: .*write them with a letter before"),
        ("json", label(-1), "0001.png is -1, which is no class"),
        ("json", label(2.5), "0001.png is 2.5, which is no class"),
        ("json", label(math.nan), "0001.png is nan, which is no class"),
        ("json", label(math.inf), "0001.png is inf, which is no class"),
        ("json", label(None), "0001.png is null, neither a number nor a text"),
        ("json", label(True), "0001.png is true, neither a number nor a text"),
        ("json", label([3]), r"0001.png is \[3\], neither a number nor a text"),
        ("json", label({"id": 3}), "0001.png is {.*}, neither a number nor a text"),
        ("json", label(10**30), "but there are only 2 samples"),
        ("json", b"[" * 100_000, "0001.png has no label"),
        ("json", b"[3]", "0001.png has no label"),
    ],
)
def test_what_is_no_class_is_refused_by_name(tmp_path, kind, value, message):
    good = {"cls": b"0", "json": label(0)}[kind]
    with pytest.raises(UserError, match=message):
        open_source(labelled(tmp_path / "a.tar", kind, [good, value]))


@pytest.mark.parametrize(
    ("cls", "value", "both"),
    [
        (b"0", label(1), "0 in its .cls and 1 in its .json"),
        (b"cat", label("dog"), "cat in its .cls and dog in its .json"),
        (b"0", label("cat"), "0 in its .cls and cat in its .json"),
        (b"0", label(None), "null, neither a number nor a text"),
        (b"0", b'{"label": 0, "label": 0}', "given more than once in its .json"),
    ],
)
def test_two_labels_that_differ_are_refused_by_name(tmp_path, cls, value, both):
    good = {"0.png": PNG, "0.cls": cls, "0.json": b'{"caption": "a cat"}'}
    with pytest.raises(UserError, match=f"the label of .*1.png is {both}.*: correct it, or leave the sample out"):
        labels(tar(tmp_path / "a.tar", good | {"1.png": PNG, "1.cls": cls, "1.json": value}))


def test_two_labels_that_agree_are_one(tmp_path):
    jsons = [label(1), label("1.0"), b"{}", b"[1]", b"no json", b'{"of": {"label": 7}, "a": 1, "a": 2}']
    files = {}
    for i, value in enumerate(jsons):
        files |= {f"{i}.png": PNG, f"{i}.json": value, f"{i}.cls": b"1"}
    assert labels(tar(tmp_path / "a.tar", files)) == [1] * 6
    assert labels(labelled(tmp_path / "b.tar", "cls", [b"none", b"nanny"])) == [1, 0]


def test_names_that_look_the_same_are_refused(tmp_path):
    with pytest.raises(UserError, match="two classes of the same name"):
        open_source(labelled(tmp_path / "a.tar", "cls", ["caf\u00e9".encode(), "cafe\u0301".encode()]))


def test_of_several_images_the_plain_one_is_taken(tmp_path):
    files = {}
    for i in range(2):
        files |= {f"{i}.depth.png": OTHER, f"{i}.cls": b"0", f"{i}.png": PNG, f"{i}.mask.tif": OTHER}
    source = open_source(tar(tmp_path / "a.tar", files))
    assert [(entry.key, entry.data.read()) for entry in source.entries] == [("a/0.png", PNG), ("a/1.png", PNG)]
    assert source.findings.left_aside == {".depth.png beside .png": 2, ".mask.tif beside .png": 2}


def test_a_sample_with_several_images_and_no_plain_one_or_two_is_left_out_by_name(tmp_path):
    files = {"0.png": PNG, "0.cls": b"0", "1.jpg": OTHER, "1.png": PNG, "1.cls": b"1"}
    files |= {"2.left.png": PNG, "2.right.png": OTHER, "2.cls": b"1", "3.rgb.png": PNG, "3.cls": b"1"}
    report = write_dataset(tar(tmp_path / "a.tar", files), str(tmp_path / "set"), workers=1, progress=False)
    assert (report.images, report.skipped) == (2, 4)  # 3.rgb.png is alone in its sample
    skipped = {e["source"]: e["reason"] for e in json.loads((tmp_path / "set/skipped.json").read_bytes())}
    of = "its sample holds several images ({}), and nothing says which one is meant"
    assert skipped == {
        "a/1.jpg": of.format(".jpg and .png"),
        "a/1.png": of.format(".jpg and .png"),
        "a/2.left.png": of.format(".left.png and .right.png"),
        "a/2.right.png": of.format(".left.png and .right.png"),
    }


def test_a_name_that_ends_at_its_first_dot_is_explained(tmp_path):
    src = tar(tmp_path / "a.tar", {"img.0001.png": PNG, "img.0001.cls": b"3"})
    message = (
        r"img.0001.png has no label: .* ends at its first dot, so this is the file .0001.png of the sample img "
        r"\(with .0001.cls\), and its label would be img.cls: use another sign than the dot"
    )
    with pytest.raises(UserError, match=message):
        open_source(src)
    with pytest.raises(UserError, match=r'0.png has no label: put it in a .cls beside it, or as "label" in its .json$'):
        open_source(tar(tmp_path / "b.tar", {"0.png": PNG, "0.json": b"{}"}))


def test_files_that_are_no_images_or_in_no_sample_are_counted(tmp_path):
    files = {
        "0.png": PNG,
        "0.cls": b"0",
        "0.txt": b"a caption",
        "1.jp2": b"",
        "1.cls": b"0",
        "2.jp2": b"",
        "2.cls": b"1",
    }
    files |= {"._0.png": b"AppleDouble", ".png": PNG, "README": b"", "__MACOSX/0.png": PNG}
    source = open_source(tar(tmp_path / "a.tar", files))
    assert [entry.key for entry in source.entries] == ["a/0.png"]
    assert source.findings.seen == {".png": 3, ".cls": 3, ".jp2": 2, ".txt": 1, "no suffix": 2}
    assert source.findings.left_aside == {
        ".jp2": 2, ".cls": 2, ".txt": 1, "no suffix": 1, "._ files of macOS": 1, "in __MACOSX/": 1,
    }  # fmt: skip
    reason = "its name has no part before the first dot, so it belongs to no sample"
    assert source.findings.left_out == [("a/.png", reason)]


def test_a_name_that_is_not_utf8_is_left_out_by_name(tmp_path):
    latin = os.fsdecode(b"caf\xe9")
    files = {"0.png": PNG, "0.cls": b"0", f"{latin}.png": PNG, f"{latin}.cls": b"1"}
    source = open_source(tar(tmp_path / "a.tar", files))
    assert [(entry.key, entry.label) for entry in source.entries] == [("a/0.png", 0)]
    assert source.findings.left_out == [("a/caf\\xe9.png", "the name is not UTF-8: rename the file")]
    assert source.findings.left_aside == {".cls": 1}
