"""What an attempt says at its start."""

from pathlib import Path

from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import DONE, train
from tests.support.ranks import run_ranks


def test_another_validation_than_before_is_noted(tiny, dataset):
    """And one on the images of the training, which say nothing of others."""
    same = {"validation__every_steps": 2, "validation__url": dataset, "validation__images": 20}
    for steps, times in ((2, 2), (4, 2), (6, 3)):
        assert run_ranks(1, train, tiny(**same, train__steps=steps, validation__timesteps=times)) == [DONE]
    logs = (Path(tiny().run, f"attempts/{n}/logs/rank-00000.log") for n in (1, 2, 3))
    first, second, third = (log.read_text() for log in logs)
    assert "since attempt" not in second and "do not compare it with its old values" not in first + second
    assert "since attempt 2: validation_grid.timesteps: 2 -> 3" in third
    assert "val_loss is measured on other images or times than before: do not compare" in third
    assert all("validation.url is a dataset of the training" in told for told in (first, second, third))
    assert Run.open(tiny().run).recorded("validation_grid") == {"images": 20, "timesteps": 3}


def test_kernels_that_a_cpu_lacks_are_noted_once(tiny):
    for steps, kernels in ((1, "triton"), (2, "compiled")):
        assert run_ranks(2, train, tiny(train__steps=steps, layout__kernels=kernels)) == [DONE] * 2
    first, second = ("".join(log.read_text() for log in Path(tiny().run).glob(f"attempts/{n}/logs/*")) for n in (1, 2))
    note = "layout.kernels=triton: the CPU computes the same in plain torch, since Triton's kernels are for GPUs"
    assert first.count(note) == first.count("triton") == 1 and "triton" not in second


def test_other_images_of_validation_are_a_change_between_attempts(tmp_path):
    run = Run.open_or_create(str(tmp_path / "run"), {}, {}, "plan")
    grid = {"images": 256, "timesteps": 8}
    changed = [
        run.claim({"validation": [digit * 32], "validation_grid": grid | {"timesteps": times}}).changed
        for digit, times in (("aa", 8), ("aa", 8), ("bb", 8), ("bb", 4))
    ]
    different = f"validation: [{'aa' * 8}] -> [{'bb' * 8}]"
    assert changed == [[], [], [different], ["validation_grid.timesteps: 8 -> 4"]]
