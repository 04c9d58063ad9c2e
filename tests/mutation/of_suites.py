"""Changes of one line after which a suite's figures look plausible still, and are those of another sampler."""

from tests.mutation.named import Named

SUITES = "fitv2_scale/evaluate/suites.py"
TESTS = "tests/fitv2_scale/evaluate/test_suites.py"

OF_SUITES = (
    Named(
        "a row's network is sampled as FiTv2", SUITES,
        "_with_positions(cell | rows[0].sampling, network)",
        "_with_positions(cell, network)",
        (f"{TESTS}::test_each_cell_has_a_sampler_of_its_objective",),
    ),
    Named(
        "SiT is sampled as DiT, which has its network", SUITES,
        "if network_of(config) == network]",
        "if network_of(config).model == network.model]",
        (f"{TESTS}::test_other_networks_are_sampled_as_before",),
    ),
    Named(
        "a table of positions is not resized", SUITES,
        '_TABLE_MODES = ("pi", "ei")',
        '_TABLE_MODES = ("pi",)',
        (f"{TESTS}::test_positions_and_guidance_are_the_papers",),
    ),
    Named(
        "DiT at 512 has a table of 16 x 16", SUITES,
        "model.sincos.train_side * model.pixels_per_token",
        "16 * model.pixels_per_token",
        (f"{TESTS}::test_positions_and_guidance_are_the_papers",),
    ),
)  # fmt: skip
