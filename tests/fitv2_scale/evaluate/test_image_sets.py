"""Pictures of a folder, cut to one size."""

import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_sharding.errors import UserError
from fitv2_scale.evaluate import image_sets
from fitv2_scale.evaluate.evaluate import is_network
from fitv2_scale.evaluate.features import Features
from fitv2_scale.evaluate.image_sets import image_set_digest, open_image_set
from fitv2_scale.evaluate.reference_statistics import features_of_images
from fitv2_scale.run.weights_source import is_weights
from tests.support.pictures import file_of, noise


def test_images_cover_the_size_and_are_not_stretched(tmp_path):
    """Bands of a wide picture: what is cut off is at its ends."""
    wide = np.zeros((40, 200, 3), np.uint8)
    wide[:, 60:140] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (square,) = open_image_set(str(tmp_path), (32, 32), 1).read()
    (band,) = open_image_set(str(tmp_path), (16, 160), 1).read()
    assert (square == 200).all()
    assert band.shape == (16, 160, 3) and (band[:, 60:100] == 200).all() and not band[:, [0, 40, 120, 159]].any()


def test_what_cannot_be_read_is_left_out_by_name(tmp_path):
    """Links are followed, whatever lies in between; a photograph that is none does not end the evaluation."""
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    for i in range(4):
        noise(32, 32, i).save(root / f"deep/{i}.png")
    noise(32, 32, 9).save(tmp_path / "elsewhere/9.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "deep/1.png").write_bytes(b"no image")
    (root / "deep/2.png").write_bytes((root / "deep/2.png").read_bytes()[:300])
    (root / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(root / "pipe.png")
    images = open_image_set(str(root), (32, 32), 50)
    assert images.count == 5
    for _ in range(2):  # the second time without trying again
        found = list(images.read())
        assert images.count == len(found) == 3
        for picture, seed in zip(found, (0, 3, 9), strict=True):
            np.testing.assert_array_equal(picture, np.asarray(noise(32, 32, seed)))
    assert images.left_out.keys() == {"gone.png", "pipe.png", "deep/1.png", "deep/2.png"}
    assert images.left_out["deep/1.png"] == "not an image of a known format"
    assert (
        "4 of the images" in images.left_out_sentence() and "gone.png (a link to nothing)" in images.left_out_sentence()
    )


def test_features_are_those_of_the_readable_images(tmp_path, monkeypatch, capsys):
    for i in range(7):
        noise(32, 32, i).save(tmp_path / f"{i}.png")
    (tmp_path / "6.png").write_bytes(b"")  # the last one: the batch before it must not be lost

    def network(pictures):
        means = pictures.reshape(len(pictures), -1).mean(1, keepdims=True).astype(np.float32)
        return Features(means, None, None)

    features = features_of_images(open_image_set(str(tmp_path), (32, 32), 50), network)
    np.testing.assert_allclose(features.pool[:, 0], [np.asarray(noise(32, 32, i)).mean() for i in range(6)], rtol=1e-6)
    assert "1 of the images in" in capsys.readouterr().err
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="7 of the images in .* cannot be read and were left out: 0.png"):
        features_of_images(open_image_set(str(tmp_path), (32, 32), 50), network)


def test_tars_and_odd_folders(tmp_path):
    with tarfile.open(tmp_path / "ant.TAR", "w") as tar:
        for name in ("1.png", "2.png"):
            (tmp_path / name).write_bytes(file_of(noise(32, 32), "PNG"))
            tar.add(tmp_path / name, name)
            (tmp_path / name).unlink()
    assert open_image_set(str(tmp_path), (32, 32), 50).count == 2
    (tmp_path / "train").mkdir()  # a folder of images need not have classes
    noise(32, 32).save(tmp_path / "train/1.png")
    assert open_image_set(str(tmp_path), (32, 32), 50).count == 1
    for name, message in (("nothing", "there is nothing at"), ("train/1.png", "is a file, not a folder")):
        with pytest.raises(UserError, match=message):
            open_image_set(str(tmp_path / name), (32, 32), 50)


def test_the_order_of_a_folder_is_as_before(tmp_path):
    """Folder by folder, as sorted paths are: which images are chosen depends on it."""
    for name in ("a/1.png", "a-b/1.png", "a.png", "b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise(32, 32).save(tmp_path / name)
    found, _ = image_sets._list_files(str(tmp_path))
    expected = sorted(path for path in tmp_path.rglob("*.png"))
    assert [name for name, _ in found] == [str(path.relative_to(tmp_path)) for path in expected]


@pytest.mark.parametrize("name", ["photos.npz", "photos.bin", "photos.tar", "pho{to}s", "photos.pt"])
def test_a_folder_may_be_called_as_a_file_is(tmp_path, name):
    (tmp_path / name).mkdir()
    noise(32, 32, 3).save(tmp_path / name / "a.png")
    folder = str(tmp_path / name)
    assert not is_network(folder)
    (picture,) = open_image_set(folder, (32, 32), 50).read()
    np.testing.assert_array_equal(picture, np.asarray(noise(32, 32, 3)))
    assert image_set_digest(folder, 50)
    (tmp_path / name / "run.json").write_text("{}")
    assert is_network(folder) and not is_weights(folder)
