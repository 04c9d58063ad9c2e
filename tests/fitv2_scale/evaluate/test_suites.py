"""The suites of evaluations, and the published metrics in them."""

import re

import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.load import load_config
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.config.solvers import solver_facts
from fitv2_scale.evaluate.published_networks import PUBLISHED_NETWORKS, Network, network_of
from fitv2_scale.evaluate.suites import listing_text, load_suite, results_table, suite_table
from fitv2_scale.model.counts import parameter_count
from tests.support.repository import ROOT

SUITES = ["in1k256", "ood", "hr", "ablation"]
OURS = re.compile(r"(DiT|SiT|FiT|FiTv2)-|[A-F]: ")  # rows of networks that can be trained here
# Rows with other samplers than the same network's in their suite: their figures alone are shown.
TAB_III = ("direct", "PI", "YaRN", "NTK", "VisionYaRN", "VisionNTK", "VisionNTK + attention scale")
OTHER_SAMPLERS = {"FiT-XL/2 (ICML, 1800K)", *(f"FiTv2-XL/2, {how}" for how in TAB_III)}
OTHER_SAMPLERS |= {f"SiT-XL/2, {how}" for how in ("direct", "EI", "PI")}
# Millions, as FiTv2's Tab. I and IV to VI give them; "3B" there is 2,972. Those of DiT and SiT have the table, too.
MILLIONS = {
    "dit_b2": 131, "sit_b2": 131, "fit_b2": 159, "fitv2_b2": 128,
    "dit_xl2": 675, "dit_xl2_512": 676, "sit_xl2": 675, "fit_xl2": 824, "fitv2_xl2": 671, "fitv2_xl2_hr": 671,
    "fitv2_3b2": 2972, "fitv2_3b2_hr": 2972,
    "ablation_a": 159, "ablation_b": 159, "ablation_c": 128, "ablation_d": 159, "ablation_e": 159, "ablation_f": 159,
}  # fmt: skip
SOLVERS = {"ddpm": ("ddpm", 250), "flow": ("dopri5", None)}  # by the objective, and steps (Sec. V-A)


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_whole(name):
    suite = load_suite(name)
    table = suite_table(suite, [])
    for row in suite.published:
        assert set(row.metrics) <= set(suite.sizes) and f"| {row.model} " in table
        for fid, sfid, score, precision, recall in row.metrics.values():
            assert fid > 1 and (sfid or 2) > 1 and (score or 2) > 1
            assert 0 < (precision or 0.5) < 1 and 0 < (recall or 0.5) < 1
    for cell in suite.cells:
        SamplingConfig(**{key: value for key, value in cell.items() if key != "size"})


def test_published_rows_of_the_paper():
    by = {name: {row.model: row.metrics for row in load_suite(name).published} for name in ("in1k256", "ood", "hr")}
    assert by["in1k256"]["DiT-XL/2"]["256x256"] == (2.27, 4.60, 278.24, 0.83, 0.57)
    assert by["in1k256"]["SiT-XL/2"]["160x320"] == (17.38, 28.59, 110.32, 0.52, 0.65)
    assert by["in1k256"]["FiTv2-3B/2"]["128x384"] == (13.73, 23.26, 145.38, 0.61, 0.48)
    assert by["ood"]["FiTv2-XL/2"]["224x448"] == (5.54, 14.53, 233.11, 0.77, 0.51)
    assert by["hr"]["FiTv2-3B/2 (1.6)"]["256x768"] == (16.08, 19.75, 140.10, 0.72, 0.52)


@pytest.mark.parametrize("name", SUITES)
def test_every_row_of_a_network_that_can_be_trained_here_has_its_config(name):
    rows = load_suite(name).published
    assert {row.model for row in rows if not row.config and OURS.match(row.model)} <= OTHER_SAMPLERS
    assert not [row.model for row in rows if row.config and not OURS.match(row.model)]


def test_networks_are_those_of_the_configs():
    """The suites have them without configs/, as a job does."""
    assert {row.config for name in SUITES for row in load_suite(name).published} - {""} == set(PUBLISHED_NETWORKS)
    for name, network in PUBLISHED_NETWORKS.items():
        config = load_config(str(ROOT / "configs" / f"{name}.yaml"))
        assert network == Network(config.model, config.objective), name
        model = config.model
        table = model.sincos.train_side**2 * model.hidden if model.position == "sincos" else 0
        assert round((parameter_count(model) + table) / 1e6) == MILLIONS[name], name


@pytest.mark.parametrize("name", SUITES)
def test_each_cell_has_a_sampler_of_its_objective(name):
    for cell in load_suite(name).listing():
        sampling = SamplingConfig(**cell["sampling"])
        solver, steps = SOLVERS[cell["objective"]]
        assert sampling.solver == solver and solver_facts(solver).objective == cell["objective"]
        assert cell["sampling"].get("steps") == steps and sampling.guided_channels == "three"
        assert solver != "dopri5" or (sampling.atol, sampling.rtol) == (1e-6, 1e-3)
        assert load_config(str(ROOT / "configs" / f"{cell['config']}.yaml")).objective == cell["objective"]


def cells(suite: str, config: str) -> list[tuple]:
    """(size, guidance, rope, attention scale, sincos) of a network's cells."""
    keys = ("cfg", "rope", "attention_scale", "sincos")
    return [
        (cell["size"], *(cell["sampling"].get(key) for key in keys))
        for cell in load_suite(suite).listing()
        if cell["config"] == config
    ]


def test_positions_and_guidance_are_the_papers():
    """Sec. V-D: DiT and SiT with PI, FiT with VisionNTK beyond its training alone. EI beside PI where they differ."""
    for family in ("dit", "sit"):
        square, *others = cells("in1k256", f"{family}_xl2")
        assert square == ("256x256", 1.5, "none", "none", None)
        assert others == [(s, 1.5, "none", "none", m) for s in ("160x320", "128x384") for m in ("pi", "ei")]
        sizes = ("320x320", "224x448", "160x480")
        assert cells("ood", f"{family}_xl2") == [(s, 1.5, "none", "none", m) for s in sizes for m in ("pi", "ei")]
    assert cells("hr", "dit_xl2_512") == [
        ("512x512", 1.5, "none", "none", None),
        *((size, 1.5, "none", "none", mode) for size in ("320x640", "256x768") for mode in ("pi", "ei")),
    ]
    assert {cell[1:] for cell in cells("in1k256", "fit_xl2")} == {(1.5, "none", "none", None)}
    assert {cell[1:] for cell in cells("ood", "fit_xl2")} == {(1.5, "vision_ntk", "none", None)}
    assert {cell[1:] for cell in cells("ood", "fitv2_3b2")} == {(1.5, "vision_ntk", "released", None)}
    assert {cell[1:] for cell in cells("hr", "fitv2_xl2_hr")} == {(1.65, "vision_ntk", "none", None)}
    assert {cell[1:] for cell in cells("hr", "fitv2_3b2_hr")} == {(1.6, "vision_ntk", "none", None)}
    assert cells("ablation", "dit_b2") == [("256x256", cfg, "none", "none", None) for cfg in (1.0, 1.5)]


def test_the_ablation_has_ten_networks():
    suite = load_suite("ablation")
    rows = ["dit_b2", "sit_b2", "fit_b2", *(f"ablation_{row}" for row in "abcdef"), "fitv2_b2"]
    assert list(dict.fromkeys(cell["config"] for cell in suite.listing())) == rows
    assert len(suite.listing()) == 20 and listing_text(suite).count("\n") == 22


def test_other_networks_are_sampled_as_before():
    """A network that differs in any key of the model or in its objective is not the row's."""
    suite, published = load_suite("in1k256"), PUBLISHED_NETWORKS["dit_xl2"]
    smaller = Network(published.model.model_copy(update={"classes": 999}), "ddpm")
    assert suite.cells_of(smaller) == suite.cells and suite.cells[0]["solver"] == "dopri5"
    assert suite.cells_of(published)[0]["solver"] == "ddpm"
    assert suite.cells_of(Network(published.model, "flow"))[0]["solver"] == "dopri5"  # SiT
    suite.cells_of(smaller)[0].pop("size")
    assert suite.cells[0]["size"] == "256x256"


def own_suite(tmp_path, rows: str):
    (tmp_path / "own.yaml").write_text(
        f"title: a\nimages: 30\nsampling: {{solver: heun}}\ncells: [{{size: 64x32}}]\npublished: [{rows}]\n"
    )
    return load_suite(str(tmp_path / "own.yaml"))


def test_a_row_may_name_a_config_by_its_path(tmp_path):
    file = str(ROOT / "configs" / "sit_s2.yaml")
    suite = own_suite(tmp_path, f"{{model: A, config: {file}, sampling: {{steps: 1_0}}, 64x32: [1, 1, 1, 1, 1]}}")
    changes = {"solver": "heun", "steps": 10, "rope": "none", "attention_scale": "none"}
    assert suite.cells_of(network_of(file)) == [{"size": "64x32", **changes, "sincos": mode} for mode in ("pi", "ei")]


def test_two_samplers_for_one_network_are_refused(tmp_path):
    row = "{{model: {}, config: {}, sampling: {{steps: {}}}}}"
    with pytest.raises(UserError, match="two samplers for fit_b2, in the rows A and B: give both rows"):
        own_suite(tmp_path, row.format("A", "fit_b2", 5) + "," + row.format("B", "fit_b2", 6)).listing()
    suite = own_suite(tmp_path, row.format("A", "ablation_a", 5) + "," + row.format("D", "ablation_d", 6))
    with pytest.raises(UserError, match="own has two samplers for this network, in the rows A and D: give both"):
        suite.cells_of(PUBLISHED_NETWORKS["ablation_a"])
    with pytest.raises(UserError, match="there is no published network dit_b: give the path .* one of dit_b2, dit_xl2"):
        own_suite(tmp_path, "{model: A, config: dit_b}").cells_of(PUBLISHED_NETWORKS["dit_b2"])


@pytest.mark.parametrize(
    "text,said",
    [
        ("cells:\n- {size: 16x16}\ncells:\n- {size: 32x32}\n", "line 3: cells is given twice, first in line 1"),
        ("title: a\ncells:\n- {size: 256x256, cfg: 2, cfg: 3}\n", r"line 3: cells\.0\.cfg is given twice"),
        ("title: a\ncells:\n- {size: 256x256, steps: 010}\n", r"line 3: cells\.0\.steps: 010 begins with a zero"),
        ("cells: [", "is not YAML: line 1"),
        ("cells: 3", "is not a suite"),
    ],
)
def test_what_is_no_suite_is_refused(tmp_path, text, said):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=f"own.yaml.*{said}"):
        load_suite(str(tmp_path / "own.yaml"))


def test_values_are_those_of_a_config(tmp_path):
    """YAML 1.1 takes 1e1 for a text, and 1234 for a number where a text is meant."""
    (tmp_path / "own.yaml").write_text(
        "title: 1234\nimages: 1e3\nsampling: {cfg: 1e1}\ncells: [{size: 256x256, rope: none, steps: 1_0}]\n"
        "published: [{model: 12:30, seen: 0512, 256x256: [1e1, null, 2.5, 1, 0]}]\n"
    )
    suite = load_suite(str(tmp_path / "own.yaml"))
    assert (suite.title, suite.images) == ("1234", 1000)
    assert suite.cells == [{"size": "256x256", "rope": "none", "steps": 10, "cfg": 10.0}]
    (row,) = suite.published
    assert (row.model, row.seen, row.metrics) == ("12:30", "0512", {"256x256": (10.0, None, 2.5, 1.0, 0.0)})


def test_a_limit_of_guidance_is_in_the_table():
    result = {"size": "256x256", "weights": "w", "images": 9, "cfg": 1.5, "solver": "ddim", "nfe": 50.0, "rope": "none"}
    result |= {"fid": 2.0, "sfid": None, "is": None, "precision": None, "recall": None}
    whole, limited = results_table([result, result | {"guidance_interval": [0.25, 0.8]}]).splitlines()[2:]
    assert "cfg 1.5, ddim, NFE 50" in whole and "cfg 1.5 from t = 0.25 to 0.8, ddim, NFE 50" in limited
