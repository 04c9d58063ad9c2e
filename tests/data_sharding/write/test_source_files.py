"""Links that put an image into two classes are refused. Links within a class double it, as torchvision does; hard links
are files of their own; and where no classes are asked for, links do no harm."""

from pathlib import Path

import pytest

from data_sharding.errors import UserError
from data_sharding.write.findings import Findings
from data_sharding.write.image_sources import open_source
from data_sharding.write.source_files import list_folder


@pytest.fixture
def src(tmp_path) -> Path:
    for name in ("src/ant/0.jpg", "src/ant/deep/1.jpg", "src/bee/0.jpg", "src/bee/2.jpg", "elsewhere/8.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"bytes")
    return tmp_path / "src"


@pytest.mark.parametrize(
    ("links", "named"),
    [
        ({"ant/more": "../bee"}, "ant/more/0.jpg, bee/0.jpg are one; 2 in all"),
        ({"bee/deeper": "../ant/deep"}, "ant/deep/1.jpg, bee/deeper/1.jpg are one; 1 in all"),
        ({"bee/x.jpg": "../ant/0.jpg"}, "ant/0.jpg, bee/x.jpg are one; 1 in all"),
        ({"ant/all": "../../elsewhere", "bee/8.jpg": "../../elsewhere/8.jpg"}, "ant/all/8.jpg, bee/8.jpg are one; 1"),
        ({"cow": "../elsewhere", "ant/x.jpg": "../../elsewhere/8.jpg"}, "ant/x.jpg, cow/8.jpg are one; 1 in all"),
    ],
)
def test_an_image_in_two_classes_by_links_is_refused(src, links, named):
    for link, target in links.items():
        (src / link).symlink_to(target)
    with pytest.raises(UserError, match=rf"src holds images that lie in several classes by links.*\({named}"):
        open_source(str(src))


def test_other_links_are_followed(src):
    (src / "ant/again").symlink_to("deep")
    (src / "ant/x.jpg").symlink_to("0.jpg")
    (src / "bee/8.jpg").symlink_to("../../elsewhere/8.jpg")
    (src / "bee/hard.jpg").hardlink_to(src / "ant/deep/../../bee/2.jpg")
    source = open_source(str(src))
    assert {entry.key: entry.label for entry in source.entries} == {
        "ant/0.jpg": 0, "ant/again/1.jpg": 0, "ant/deep/1.jpg": 0, "ant/x.jpg": 0,
        "bee/0.jpg": 1, "bee/2.jpg": 1, "bee/8.jpg": 1, "bee/hard.jpg": 1,
    }  # fmt: skip


def test_hard_links_alone_are_files_of_their_own(src):
    """As a tool leaves them that stores equal files once. There are links elsewhere."""
    (src / "bee/hard.jpg").hardlink_to(src / "ant/0.jpg")
    (src / "bee/8.jpg").symlink_to("../../elsewhere/8.jpg")
    assert [entry.label for entry in open_source(str(src)).entries] == [0, 0, 1, 1, 1, 1]
    (src / "ant/x.jpg").symlink_to("0.jpg")
    assert list_folder(str(src), (".jpg",), Findings()).linked == [["ant/0.jpg", "ant/x.jpg", "bee/hard.jpg"]]
