"""Pictures of a folder, cut to one size."""

import numpy as np
from PIL import Image

from fitv2_scale.evaluate.image_sets import open_image_set


def test_images_cover_the_size_and_are_not_stretched(tmp_path):
    """Bands of a wide picture: what is cut off is at its ends."""
    wide = np.zeros((40, 200, 3), np.uint8)
    wide[:, 60:140] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (square,) = open_image_set(str(tmp_path), (32, 32), 1).read()
    (band,) = open_image_set(str(tmp_path), (16, 160), 1).read()
    assert (square == 200).all()
    assert band.shape == (16, 160, 3) and (band[:, 60:100] == 200).all() and not band[:, [0, 40, 120, 159]].any()
