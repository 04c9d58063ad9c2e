"""Sentences about a config whose keys do not suit each other, or are of the wrong kind."""

import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.load import parse_config
from fitv2_scale.config.schema import Config

LEAST = {"model": {"depth": 1, "classes": 2, "heads": 6, "hidden": 96}, "data": {"url": "d"}, "train": {"steps": 5}}
SECTIONS = [name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")]
FSDP, BITS = "layout.engine=fsdp", "leave one of them out"


@pytest.mark.parametrize(
    "overrides,said",
    [
        (
            ["layout.attention=flash4", "layout.precision=fp32", "deterministic=true"],
            [
                "layout.attention=flash4 does not compute in float32: set layout.precision=bf16 on a Hopper or "
                "Blackwell GPU, and layout.attention=auto on any other device",
                "deterministic=true is not for layout.attention=flash4, which is not known to give equal bits each "
                f"time: {BITS}",
            ],
        ),
        (
            ["layout.engine=zero3", "layout.replicate=2", "layout.kernels=triton", "layout.prefetch_blocks=2"],
            [
                f"layout.replicate is 2, but zero3 keeps one copy: use {FSDP}",
                "layout.prefetch_blocks=2 and layout.kernels=triton are for layout.engine=fsdp: leave them out with "
                "zero3",
            ],
        ),
        (
            ["layout.tensor=4", "layout.precision=fp8"],
            [
                "layout.tensor is 4, which does not divide the 6 heads of the model",
                f"layout.precision=fp8 is for {FSDP} and layout.tensor=1: set these, or use bf16",
                "layout.precision=fp8 needs packs of a multiple of 16 tokens: set layout.pad_to_multiple_of=16",
            ],
        ),
    ],
)
def test_all_that_is_wrong_with_a_layout_is_said_at_once(overrides, said):
    with pytest.raises(UserError) as refused:
        parse_config(LEAST, "c.yaml", overrides)
    assert str(refused.value) == "; ".join(said)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_value_for_a_section_is_told_by_the_name_of_the_section(section):
    with pytest.raises(UserError) as refused:
        parse_config(LEAST, "c.yaml", [f"{section}=5"])
    assert str(refused.value) == f"{section} = '5': it is a section: give its keys, as in {section}.KEY=VALUE"
    assert "model" in SECTIONS and len(SECTIONS) > 10
