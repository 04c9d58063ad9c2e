"""One step as numbers: seed 5, epoch 3, two images, by every engine.

The numbers were written down from tests/oracle (plain integers and float64) and from arithmetic by hand. The first
image is dropped in epoch 3 and in none before; the other in epoch 0 but not in 3, although the draw of its time lies
below the fraction that is dropped; with seed 0 neither is dropped. Their ids need both words.
"""

import math

import numpy as np
import pytest

from data_sharding.plan.pack_layout import PackShape, lay_out
from data_sharding.stream.batch import Pack, StepBatch
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.config.sections import OptimizerConfig
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.parallel.world import join
from fitv2_scale.train.step import train_step
from tests.oracle.draws import NOISE, noise_of, philox, words
from tests.support.layout_grid import Boxes, engine_of, make_config, values_of
from tests.support.ranks import run_ranks

SEED, EPOCH, STEP = 5, 3, 2  # the third step of a warm-up of ten
IDS, LABELS, VALUES, SIZES = (55065681212735499, 55065681212735577), (1, 4), (0.5, -0.25), ((2, 2), (1, 3))
TIMES, TRAINED_LABELS = (0x3F2FA1A4, 0x3E2B2AEC), (5, 4)  # bits of 0.68606019 and 0.16715592; 5 is no class
NOISE_WORDS = (  # the first four integers of each image
    (2388628677, 1373572178, 3512344432, 414093377),
    (2577282402, 2160375612, 1883902405, 2500373361),
)
FIRST_NOISE = (  # the float32 values of these
    (-0.46005672, 0.98071241, 0.52141941, 0.36116782),
    (-1.01047194, -0.01905965, -1.11650980, -0.63372147),
)
LOSS, NORM = 1.2785393924034447, 1.051264592332923
# Each weight before the step, and its gradient: a bias, a weight, and one that the zeros at the output keep from any.
FIRST = {
    ("final_layer.linear.bias", (3,)): (0.0, -0.01941322240357598),
    ("final_layer.linear.weight", (2, 7)): (0.0, 0.01888449835600669),
    ("blocks.0.attn.qkv.weight", (1, 2)): (-0.22713744640350342, 0.0),
}
LAYOUTS = [("fsdp", 1, 1), ("fsdp", 2, 1), ("fsdp", 2, 2), ("zero3", 2, 1), ("zero3", 2, 2)]


def step_batch(rank: int, ranks: int) -> StepBatch:
    """Both images in one pack, or one image a rank."""
    mine = [rank] if ranks == 2 else [0, 1]
    shape = PackShape(16, 6, 4)
    latents, at = np.zeros((16, 16), np.float16), 0
    for i in mine:
        tokens = SIZES[i][0] * SIZES[i][1]
        latents[at : at + tokens] = VALUES[i]
        at += tokens

    def slots(values: tuple, dtype: type) -> np.ndarray:
        return np.array([values[i] for i in mine] + [0] * (6 - len(mine)), dtype)

    pack = Pack(
        layout=lay_out([SIZES[i] for i in mine], shape),
        latents=latents,
        label=slots(LABELS, np.int64),
        weight=slots((0.5, 0.5), np.float32),
        sample_id=slots(IDS, np.int64),
        epoch=slots((EPOCH, EPOCH), np.int64),
    )
    return StepBatch(STEP, [pack], 0, 0, np.array([4, 3]), 16 * ranks, 1, 1.0, 0)


def one_step(config: Config) -> tuple[list[tuple], float, float, Boxes]:
    """(bits of t, label, first noise values) of each image of this rank, its part of the loss, the norm, the state."""
    seen = []

    def look(packed, noised) -> None:
        for slot in packed.weight_I.nonzero()[:, 0].tolist():
            first = int(packed.packing.cu_seqlens_I1[slot])
            bits, t = int(noised.t_I[slot].numpy().view(np.uint32)), noised.t_I[slot].item()
            noise = packed.latents_TC[first] - noised.target_TC[first]
            as_noised = (noised.x_TC[first] - t * noised.target_TC[first]).tolist()  # t x1 + (1 - t) x0 - t (x1 - x0)
            assert noise.tolist() == pytest.approx(as_noised, abs=1e-6)
            seen.append((bits, int(noised.label_I[slot]), noise[:4].tolist()))

    with join() as world:
        engine, layout = engine_of(config, world), Layout.of(world.size, 1, config.layout.tensor)
        batch = step_batch(layout.data_rank(world.rank), layout.data_parallel)
        sums, result = train_step(engine, batch, make_objective(config, world.device), config, world.device, audit=look)
        loss = sums[0, 0].item() if layout.tensor_rank(world.rank) == 0 else 0.0
        return seen, loss, result.norm.item(), values_of(engine.boxes())


def value(ranks: list[Boxes], name: str, at: tuple[int, ...]) -> float:
    """One element of a tensor, from the rank that holds it."""
    for boxes in ranks:
        for offset, values in boxes[name]:
            inside = tuple(i - o for i, o in zip(at, offset, strict=True))
            if all(0 <= i < n for i, n in zip(inside, values.shape, strict=True)):
                return float(values[inside])
    raise AssertionError(f"no rank holds {name} at {at}")


def test_the_generator_is_philox_as_published():
    """Known answers of Random123, the authors' own library; and the numbers below are the generator's."""
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    for number, integers, values in zip(IDS, NOISE_WORDS, FIRST_NOISE, strict=True):
        assert tuple(words(SEED, NOISE, EPOCH, number, 4)) == integers
        assert noise_of(SEED, EPOCH, number, 1)[0, :4].tolist() == pytest.approx(values, abs=1e-7)


def updated(weight: float, gradient: float) -> dict[str, float]:
    """AdamW's first update and the EMA's, by hand: lr = 0.005 * 3 / 10, decay 0.01, eps 0.1, betas 0.9 and 0.999."""
    clipped = gradient * min(1.0, 1.0 / (NORM + 1e-6))
    mean, square = 0.1 * clipped, 0.001 * clipped * clipped
    new = weight - 0.0015 * 0.01 * weight - 0.0015 * (mean / 0.1) / (math.sqrt(square / 0.001) + 0.1)
    return {"param": new, "exp_avg": mean, "exp_avg_sq": square, "ema": 0.9 * weight + 0.1 * new}


@pytest.mark.parametrize("engine,ranks,tensor", LAYOUTS)
def test_the_golden_step(engine, ranks, tensor):
    changes = {"optimizer__eps": 0.1, "layout__tensor": tensor}
    config = make_config(engine, **changes).model_copy(update={"seed": SEED})
    found = run_ranks(ranks, one_step, config)
    images = [image for seen, *_ in found for image in seen][:2]  # the ranks of a tensor group see the same
    assert [(bits, label) for bits, label, _ in images] == list(zip(TIMES, TRAINED_LABELS, strict=True))
    for (_, _, noise), expected in zip(images, FIRST_NOISE, strict=True):
        assert noise == pytest.approx(expected, abs=1e-6)
    assert sum(loss for _, loss, _, _ in found) == pytest.approx(LOSS, rel=1e-6)
    assert [norm for _, _, norm, _ in found] == pytest.approx([NORM] * ranks, rel=1e-6)
    boxes = [state for *_, state in found]
    for (name, at), (weight, gradient) in FIRST.items():
        for kind, expected in updated(weight, gradient).items():
            # float32 keeps 2**-24 of a weight, and a gradient of a sum of a few hundred numbers a little less
            off = value(boxes, f"{kind}/{name}", at) - expected
            assert abs(off) <= max(2e-6 * abs(expected), 1e-12) if weight == 0 else abs(off) <= 2**-24, (kind, name)


def test_the_learning_rate_of_the_released_recipe():
    """Warm-up over 5,000 steps: the first has a part of it, step 4,999 all of it, and all after that."""
    found = [OptimizerConfig().lr_at(step) for step in (0, 1, 4_998, 4_999, 5_000, 1_999_999)]
    assert found == pytest.approx([2e-8, 4e-8, 9.998e-5, 1e-4, 1e-4, 1e-4], rel=1e-12)
    assert OptimizerConfig(warmup_steps=0, lr=3e-4).lr_at(0) == 3e-4
