"""Changes of one line that would ruin a run of two million steps in silence, and the tests that must notice each.

A line is found by its text, which must stand in its file exactly once: if it changed, this fails loudly, and the
mutant is written again.
"""

from dataclasses import dataclass

GOLDEN, LAYOUTS = "tests/fitv2_scale/train/test_golden_step.py", "tests/system/test_layouts.py"
OPTIMIZER, ENGINES = "tests/fitv2_scale/parallel/test_optimizer.py", "tests/fitv2_scale/parallel/test_gradients.py"
FLOW, STEP = "fitv2_scale/model/flow.py", "fitv2_scale/config/sections.py"
NOISE, DDPM, LEVELS = (f"fitv2_scale/model/{name}.py" for name in ("noise", "ddpm", "ddpm_schedule"))
ON_DDPM, ON_LEVELS = (f"tests/fitv2_scale/model/test_{name}.py" for name in ("ddpm", "ddpm_schedule"))


@dataclass(frozen=True)
class Named:
    name: str
    file: str
    search: str
    replace: str
    tests: tuple[str, ...]

    def applied(self, source: str) -> str:
        """``source`` with the change. Raises ValueError if its line is not there exactly once."""
        if (count := source.count(self.search)) != 1:
            raise ValueError(f"{self.name!r}: {self.file} has {count} times {self.search!r}: write this mutant again")
        return source.replace(self.search, self.replace)


NAMED = (
    Named(
        "time keyed without the epoch", FLOW,
        "t_I = sample_t(self.config.t_sampler, self.seed, batch.epoch_I, batch.sample_id_I)",
        "t_I = sample_t(self.config.t_sampler, self.seed, 0 * batch.epoch_I, batch.sample_id_I)",
        (GOLDEN,),
    ),
    Named(
        "every label dropped in all epochs", NOISE,
        "batch.label_I.masked_fill(drop_I, classes)",
        "batch.label_I.masked_fill(drop_I | True, classes)",
        (GOLDEN,),
    ),
    Named(
        "the same labels dropped in all epochs", NOISE,
        "Purpose.LABEL_DROP, seed, batch.epoch_I,",
        "Purpose.LABEL_DROP, seed, 0 * batch.epoch_I,",
        (GOLDEN,),
    ),
    Named(
        "labels dropped in no epoch", NOISE,
        "batch.label_I.masked_fill(drop_I, classes)",
        "batch.label_I",
        (GOLDEN,),
    ),
    Named("labels dropped by the stream of t", NOISE, "Purpose.LABEL_DROP,", "Purpose.TIMESTEP,", (GOLDEN,)),
    Named("noise of seed 0 whatever the seed", FLOW, "Purpose.NOISE, self.seed)", "Purpose.NOISE, 0)", (GOLDEN,)),
    Named(
        "a bound of a thousandth", DDPM,
        "loss_TC + self._bits(",
        "loss_TC + 0.001 * self._bits(",
        (ON_DDPM,),
    ),
    Named("noise that learns from the bound", DDPM, "error_TC.detach()", "error_TC", (ON_DDPM,)),
    Named("a bound in nats", DDPM, "nats_TC / math.log(2)", "nats_TC", (ON_DDPM,)),
    Named("a first level like the others", DDPM, "torch.where(level_T1 == 0,", "torch.where(level_T1 < 0,", (ON_DDPM,)),
    Named("levels clamped to 1", DDPM, "t_I=level_I.float()", "t_I=level_I.float().clamp(max=1)", (ON_DDPM,)),
    Named(
        "levels keyed without the epoch", DDPM,
        "self._seed, batch.epoch_I, batch.sample_id_I)",
        "self._seed, 0 * batch.epoch_I, batch.sample_id_I)",
        (ON_DDPM,),
    ),
    Named("validation from the image to noise", DDPM, "LEVELS - LEVELS * u_I", "LEVELS * u_I", (ON_DDPM,)),
    Named(
        "alpha_bar of the level itself", LEVELS,
        "torch.cat((alpha_bar_K.new_ones(1), alpha_bar_K[:-1]))",
        "alpha_bar_K",
        (ON_LEVELS, ON_DDPM),
    ),
    Named(
        "the first level's variance is its own", LEVELS,
        "torch.cat((variance_K[1:2], variance_K[1:])).log()",
        "variance_K.clamp(min=1e-20).log()",
        (ON_LEVELS, ON_DDPM),
    ),
    Named(
        "a warm-up twice as long", STEP,
        "(step + 1) / self.warmup_steps)",
        "(step + 1) / (2 * self.warmup_steps))",
        (GOLDEN,),
    ),
    Named(
        "the learning rate of the step before", STEP,
        "(step + 1) / self.warmup_steps)",
        "step / self.warmup_steps)",
        (GOLDEN,),
    ),
    Named(
        "gradients reduced in bf16", "fitv2_scale/parallel/fsdp.py",
        "MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)",
        "MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, cast_forward_inputs=False)",
        (ENGINES,),
    ),
    Named(
        "copies of a tensor group drift under zero3", "fitv2_scale/parallel/zero3.py",
        "broadcast_in_group([zero.get_local_fp32_grad_for_param(p) for p in replicated], self._groups.tensor)",
        "pass",
        (ENGINES,),
    ),
    Named(
        "copies of a tensor group drift under fsdp", "fitv2_scale/parallel/fsdp.py",
        "broadcast_in_group(_local_grads(self._replicated), self._groups.tensor)",
        "pass",
        (ENGINES,),
    ),
    Named(
        "a substitute with the label of the lost image", "data_sharding/stream/loader.py",
        "replace(images, row=row, label=label)",
        "replace(images, row=row)",
        ("tests/data_sharding/stream/test_substitutes.py",),
    ),
    Named(
        "two VAEs mixed", "fitv2_scale/data.py",
        'if manifest.header.codec["digest"] != first.header.codec["digest"]:',
        "if False:",
        ("tests/fitv2_scale/test_data.py",),
    ),
    Named(
        "the cost ignored when images are dealt", "data_sharding/plan/balance.py",
        "rank, ranks = partition_over_nodes(cost.of(tokens), nodes)",
        "rank, ranks = partition_over_nodes(np.ones_like(tokens), nodes)",
        ("tests/data_sharding/plan/test_balance.py",),
    ),
    Named(
        "old commits retired though the newest are gone", "fitv2_scale/checkpoint/checkpointer.py",
        "if (problem := quick_check(run, entry))",
        "if (problem := None)",
        ("tests/fitv2_scale/checkpoint/test_retiring.py",),
    ),
    Named(
        "a save over a commit whose reply was lost", "fitv2_scale/checkpoint/checkpointer.py",
        "folder = commit_folder(step, number, self._failed)",
        "folder = commit_folder(step, number)",
        ("tests/fitv2_scale/checkpoint/test_retiring.py",),
    ),
    # Others, of the same kind.
    Named(
        "gradients never clipped", "fitv2_scale/parallel/optimizer.py",
        "grad_scale=((result.norm + _NORM_EPS) / max_norm).clamp(min=1.0),",
        "grad_scale=torch.ones_like(result.norm),",
        (GOLDEN, OPTIMIZER),
    ),
    Named(
        "an EMA with the decay of its complement", "fitv2_scale/parallel/optimizer.py",
        "lr=-(1.0 - decay),",
        "lr=-decay,",
        (GOLDEN, OPTIMIZER),
    ),
    Named(
        "no image is ever mirrored", "data_sharding/stream/batch.py",
        "arrays[i][flip]",
        "arrays[i][0]",
        ("tests/data_sharding/stream/test_loader.py", LAYOUTS),
    ),
    Named(
        "an image weighs by the images of its pack", "data_sharding/stream/batch.py",
        "1 / len(images.tokens)",
        "1 / len(members)",
        ("tests/data_sharding/stream/test_loader.py", LAYOUTS),
    ),
    Named(
        "a resumed AdamW counts its steps from zero", "fitv2_scale/parallel/fsdp.py",
        'self._adamw.steps.fill_(scalars["optimizer_step"])',
        "pass",
        ("tests/system/test_any_to_any.py", "tests/system/test_resume.py"),
    ),
)  # fmt: skip
