"""Tokens that are groups of stored ones: what would train on other images, other latents or other sizes."""

from tests.mutation.named import Named

GRID, PLAN, SMALL = "data_sharding/plan/token_grid.py", "data_sharding/plan/plan.py", "data_sharding/plan/view_sizes.py"
OF_GRID, OF_DATA_PY = "tests/data_sharding/plan/test_token_grid.py", "tests/fitv2_scale/test_data.py"
OF_GRIDS = "tests/fitv2_scale/evaluate/sampling/test_image_grid.py"
OF_VAE = "tests/data_sharding/write/test_images_sd_vae.py"

OF_TOKENS = (
    Named(
        "tokens: a patch has its columns before its rows", GRID,
        "transpose(0, 2, 4, 1, 5, 3, 6)", "transpose(0, 2, 4, 3, 6, 1, 5)", (OF_GRID,),
    ),
    Named(
        "tokens: a patch has its stored tokens one after the other", GRID,
        "transpose(0, 2, 4, 1, 5, 3, 6)", "transpose(0, 2, 4, 1, 3, 5, 6)", (OF_GRID,),
    ),
    Named(
        "tokens: what fills no patch is left out at the top", GRID,
        "tokens[: rows * side,", "tokens[len(tokens) - rows * side :,", (OF_GRID,),
    ),
    Named(
        "tokens: the patch decides which images a step has", PLAN,
        "assign_to_steps(stored[order],", "assign_to_steps(images.tokens[order],", (OF_GRID,),
    ),
    Named(
        "tokens: and which frames come first", PLAN,
        "order_frames(self._frame_starts(images), stored)", "order_frames(self._frame_starts(images), images.tokens)",
        (OF_GRID,),
    ),
    Named(
        "tokens: a changed batch has stored ones", PLAN,
        "self.views, schedule, self.token_grid)", "self.views, schedule)", (OF_GRID,),
    ),
    Named(
        "tokens: packs have room for stored ones", PLAN,
        "self.token_grid.longest(max(", "int(max(", (OF_GRID, OF_DATA_PY),
    ),
    Named(
        "tokens: views=crop refuses what is never read", SMALL,
        "np.where(crop, small[:, CROP], small[:, RESIZE])", "small[:, RESIZE]", (OF_GRID,),
    ),
    Named(
        "tokens: images of less than a patch train", "fitv2_scale/data.py",
        "require_a_token(manifest, config.data.views, token_grid)", "pass", (OF_DATA_PY,),
    ),
    Named(
        "tokens: latents of other channels train", "fitv2_scale/data.py",
        "!= config.model.latent_channels:", "< 0:", (OF_DATA_PY,),
    ),
    Named(
        "tokens: a substitute has as many stored ones", "data_sharding/stream/substitutes.py",
        "self.token_grid.lengths(", "STORED_TOKENS.lengths(", ("tests/data_sharding/stream/test_substitutes.py",),
    ),
    Named(
        "tokens: validation divides as stored", "fitv2_scale/train/in_loop_eval.py",
        "token_grid=data.plan.token_grid,", "token_grid=type(data.plan.token_grid)(),",
        ("tests/fitv2_scale/evaluate/test_validation.py::test_the_same_loss_with_larger_patches",),
    ),
    Named(
        "tokens: pictures are put together as stored", "fitv2_scale/evaluate/sampling/image_grid.py",
        "isqrt(tokens.shape[-1] // codec.channels)", "2", (OF_GRIDS,),
    ),
    Named(
        "tokens: sizes of samples as of the smallest patch", "fitv2_scale/config/schema.py",
        "parse_size(size, self.model.pixels_per_token)", "parse_size(size, 16)",
        ("tests/fitv2_scale/config/test_load.py",),
    ),
    Named(
        "tokens: a VAE of 16 channels is recorded as any", "data_sharding/format/sd_vae.py",
        "if self.channels != LATENT_CHANNELS:", "if False:", (OF_VAE,),
    ),
    Named(
        "tokens: datasets of 4 channels get other digests", "data_sharding/format/sd_vae.py",
        "if self.channels != LATENT_CHANNELS:", "if True:", (OF_VAE,),
    ),
)  # fmt: skip
