"""The names of networks, of the papers' switches written down here, and their FLOPs by the papers."""

import pytest

from fitv2_scale.config.families import family_of, network_name
from fitv2_scale.config.load import load_config
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import forward_flops, parameter_count
from fitv2_scale.planning.scaling.published_fid import MODELS
from tests.support.tiny_networks import DIT, FIT

B = {"depth": 12, "hidden": 768, "heads": 12, "classes": 1000}


@pytest.mark.parametrize(
    "switches, objective, name",
    [
        ({"depth": 15}, "flow", "FiTv2-B/2"),
        (DIT, "ddpm", "DiT-B/2"),
        (DIT, "flow", "SiT-B/2"),
        (FIT, "ddpm", "FiT-B/2"),
        (DIT | {"patch": 4}, "ddpm", "DiT-B/4"),
        (DIT | {"depth": 28, "hidden": 1152, "heads": 16}, "flow", "SiT-XL/2"),
        (DIT | {"depth": 6}, "ddpm", "DiT-6x768/2"),
        ({}, "flow", "FiTv2-12x768/2"),  # FiTv2's B has 15 blocks
        ({"depth": 15}, "ddpm", "other-15x768/2"),
        (FIT, "flow", "other-12x768/2"),
        (DIT | {"outputs": 1}, "ddpm", "other-12x768/2"),
        (DIT | {"qk_norm": "layernorm"}, "flow", "other-12x768/2"),
        ({"depth": 15, "adaln": "full"}, "flow", "other-15x768/2"),
        (DIT | {"position": "none"}, "ddpm", "other-12x768/2"),
    ],
)
def test_a_network_has_a_papers_name_only_with_all_of_its_switches(switches, objective, name):
    model = ModelConfig(**B | switches)
    assert network_name(model, objective) == name and family_of(model, objective) == name.partition("-")[0]


@pytest.mark.parametrize("family, sizes", [
    ("FiTv2", ("S", "B", "L", "XL", "3B")), ("FiT", ("B", "XL")), ("DiT", ("S", "B", "L", "XL")),
    ("SiT", ("S", "B", "L", "XL")),
])  # fmt: skip
def test_the_configs_are_what_they_are_called(family, sizes):
    for size in sizes:
        config = load_config(f"configs/{family.lower()}_{size.lower()}2.yaml")
        assert network_name(config.model, config.objective) == f"{family}-{size}/2"


def test_published_networks_cost_what_their_papers_say():
    """In multiply-adds of 256 tokens; FiT's paper leaves out the two products of attention."""
    attention = 12 * 2 * 256**2 * 768
    for name, paper, left_out in (("DiT-B/2", 23.0e9, 0), ("SiT-B/2", 23.0e9, 0), ("FiT-B/2", 29.1e9, attention)):
        assert forward_flops(MODELS[name], 256) / 2 - left_out == pytest.approx(paper, rel=0.01)
    assert parameter_count(MODELS["DiT-B/2"]) == parameter_count(MODELS["SiT-B/2"]) == 130_315_808
    assert parameter_count(MODELS["FiT-B/2"]) == 158_664_224
