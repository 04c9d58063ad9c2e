"""Patches of a network that are larger than stored tokens: the same images, in fewer tokens."""

import numpy as np
import pytest

from data_sharding.errors import UserError
from data_sharding.format.patches import patchify, unpatchify
from data_sharding.plan.plan import Plan, Segment
from data_sharding.plan.size_presets import open_preset, sizes_only
from data_sharding.plan.token_grid import STORED_TOKENS, TokenGrid
from data_sharding.plan.view_sizes import require_a_token
from tests.oracle.patches import latent_of, tokens_of


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("channels", [4, 3, 16])
@pytest.mark.parametrize("size", [(4, 8), (7, 5), (9, 11)])
def test_tokens_hold_the_latents_of_their_patch(patch, channels, size):
    """Latents are numbered, so a value says where it comes from: 1000 channel + 40 row + column."""
    height, width = (2 * side for side in size)
    latent = 1000.0 * np.arange(channels)[:, None, None] + 40 * np.arange(height)[:, None] + np.arange(width)
    grid, tokens = TokenGrid(patch, channels), TokenGrid(patch, channels).group(patchify(latent))
    assert tokens.shape == (height // patch, width // patch, channels * patch**2) == (*grid.sizes(size), grid.channels)
    assert grid.lengths(np.array(size)) == tokens.shape[0] * tokens.shape[1] <= grid.longest(size[0] * size[1])
    np.testing.assert_array_equal(tokens, tokens_of(latent, patch))
    np.testing.assert_array_equal(latent_of(patchify(latent)), latent)
    whole = latent[:, : height // patch * patch, : width // patch * patch]
    np.testing.assert_array_equal(unpatchify(tokens, patch), whole)


def test_a_token_written_out():
    """One channel, 4 x 4 latents in four stored tokens; the token reads them row by row."""
    stored = np.array([[[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 12, 13], [10, 11, 14, 15]]])
    assert TokenGrid(4, 1).group(stored).tolist() == [[list(range(16))]]
    assert STORED_TOKENS.group(np.zeros((3, 5, 16))).shape == (3, 5, 16)


@pytest.mark.parametrize("patch", [4, 8])
@pytest.mark.parametrize("views", ["mixed", "resize", "crop"])
def test_a_plan_takes_the_same_images_whatever_the_patch(patch, views):
    """Through a change of the batch, whose plan is another object; lengths are those of the sizes, by hand."""
    manifests = [open_preset("preset:imagenet256", images=3000)]
    plain, grouped = (
        Plan(manifests, 3, views, [Segment(0, 32, (1,))], grid) for grid in (STORED_TOKENS, TokenGrid(patch))
    )
    assert plain.hash == grouped.hash and plain.cursor(5) == grouped.cursor(5)
    plain, grouped = (plan.continued(plan.cursor(5), 5, Segment(0, 48, (1,))) for plan in (plain, grouped))
    change, side = grouped.schedule[1].start, patch // 2
    assert plain.max_seqlen == 256 and grouped.max_seqlen == 256 // side**2
    for step in (0, 4, change - 1, change, change + 3):
        a, b = plain.step(step), grouped.step(step)
        for column in ("dataset", "epoch", "row", "sample_id", "label", "view", "flip"):
            assert np.array_equal(getattr(a, column), getattr(b, column)), column
        rows, columns = manifests[0].size[a.row, a.view].astype(int).T
        assert np.array_equal(a.tokens, rows * columns)
        assert np.array_equal(b.tokens, (rows // side) * (columns // side))
        assert b.tokens.max() <= grouped.max_seqlen
    assert np.array_equal(grouped.lengths(0, 0)[0], grouped.step(0).tokens)


# Stored rows and columns of the resize and the crop view: 1, 3 and 4 have a side below 2, of which 4 has a crop.
SIZES = [[(2, 9), (4, 4)], [(1, 9), (0, 0)], [(2, 2), (0, 0)], [(5, 1), (0, 0)], [(1, 16), (4, 4)], [(4, 4), (1, 1)]]


@pytest.mark.parametrize(
    "views,patch,sentence",
    [
        ("resize", 4, r"3 of the 6 .* of 32 x 32 pixels .* is trained on: give a dataset with larger images"),
        ("mixed", 4, r"4 of the 6 .* of 32 x 32 pixels .* is trained on: give a dataset with larger images"),
        ("crop", 4, r"3 of the 6 .* of 32 x 32 pixels .* is trained on: give a dataset with larger images"),
        ("crop", 8, r"4 of the 6 images of small are .* of 64 x 64 pixels .*: give a dataset with larger images"),
    ],
)
def test_images_of_less_than_a_patch_are_refused(views, patch, sentence):
    manifest = sizes_only("small", np.array(SIZES, np.uint16), 16)
    require_a_token(manifest, views, STORED_TOKENS)
    with pytest.raises(UserError, match=sentence):
        require_a_token(manifest, views, TokenGrid(patch))


def test_images_that_are_never_trained_on_in_a_small_view_are_not():
    """Those with crops of 4 x 4, in crops alone."""
    manifest = sizes_only("small", np.array([SIZES[0], SIZES[4]], np.uint16), 16)
    require_a_token(manifest, "crop", TokenGrid(4))
    require_a_token(manifest, "crop", TokenGrid(8))
    with pytest.raises(UserError, match=r"1 of the 2 .*: set data\.views=crop, or give a dataset with larger images"):
        require_a_token(manifest, "mixed", TokenGrid(4))
