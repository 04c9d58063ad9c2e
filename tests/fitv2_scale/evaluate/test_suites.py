"""The suites of evaluations, and the published metrics in them."""

import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.suites import load_suite, results_table, suite_table


@pytest.mark.parametrize("name", ["in1k256", "ood", "hr", "ablation"])
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
