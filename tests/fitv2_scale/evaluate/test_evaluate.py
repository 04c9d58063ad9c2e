"""Evaluations: images that any number of ranks makes, continued where they were killed, of a run and of weights."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_128_hexdigest

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.weights import export_weights
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.evaluate import EvaluationOptions, evaluate_weights
from fitv2_scale.evaluate.features import read_npz
from fitv2_scale.evaluate.generated_features import Cell
from tests.support.ranks import run_ranks


def cells(weights, size="32x48", images=40, steps=(2, 4)) -> list[Cell]:
    return [Cell(size, SamplingConfig(cfg=2.0, steps=n), images, 7, tuple(range(weights.classes))) for n in steps]


def evaluated(
    source: str, means: EvaluationOptions, out: str | None = None, config: str | None = None
) -> list[dict] | None:
    done = evaluate_weights(source, cells, means, out=out, config_file=config)
    return None if done is None else done.results


def test_the_same_metrics_on_any_number_of_ranks(two_step_run, feature_network, reference, tmp_path):
    means = EvaluationOptions(**feature_network, reference=reference, keep_features=True)
    outs = [str(tmp_path / f"ranks{size}") for size in (1, 2, 3)]
    for size, out in zip((1, 2, 3), outs, strict=True):
        first, *others = run_ranks(size, evaluated, two_step_run, means, out)
        assert [result["nfe"] for result in first] == [2.0, 4.0] and others == [None] * (size - 1)
    kept = [{path.name: read_npz(str(path)) for path in Path(out, "evaluations/2").glob("*.npz")} for out in outs]
    assert len(kept[0]) == 2 and kept[0].keys() == kept[1].keys() == kept[2].keys()
    for name, alone in kept[0].items():
        assert alone["pool"].std(0).min() > 1e-3  # pictures that differ
        for other in kept[1:]:
            # A pixel may round the other way; that moves no feature by more.
            np.testing.assert_allclose(other[name]["pool"], alone["pool"], atol=2e-4)
            np.testing.assert_allclose(other[name]["spatial"], alone["spatial"], atol=2e-3)


class Killed(Exception):
    pass


def test_an_evaluation_continues_where_it_was_killed(
    two_step_run, feature_network, photographs, reference, tmp_path, monkeypatch
):
    """And is not made again when it is there, but for another reference."""
    from fitv2_scale.evaluate import generated_features

    out, means = str(tmp_path / "killed"), EvaluationOptions(**feature_network, reference=reference)
    made, real = [], generated_features.sample

    def counted(network, requests, *, kill_at=99, **options):
        if len(made) >= kill_at:
            raise Killed
        made.append([request.index for request in requests])
        return real(network, requests, **options)

    def some(requests, weights, sampling):
        return [requests[i : i + 15] for i in range(0, len(requests), 15)]

    monkeypatch.setattr(generated_features, "chunk_requests", some)
    monkeypatch.setattr(generated_features, "sample", partial(counted, kill_at=2))
    with pytest.raises(Killed):
        evaluated(two_step_run, means, out)
    monkeypatch.setattr(generated_features, "sample", counted)
    results = evaluated(two_step_run, means, out)
    assert made[:3] == [list(range(15)), list(range(15, 30)), list(range(30, 40))]
    assert sum(map(len, made)) == 80  # two cells of 40
    assert evaluated(two_step_run, means, out) == results and len(made) == 6
    assert not list(Path(out).rglob("part-*"))
    evaluated(two_step_run, EvaluationOptions(**feature_network, reference=photographs), out)
    assert len(made) == 12
    step = json.loads(Path(out, "evaluations/2.json").read_text())
    assert step["fid"] == step["cells"][0]["fid"] and step["step"] == 2 and len(step["cells"]) == 2
    assert [cell["nfe"] for cell in step["cells"]] == [4.0, 2.0]


def test_weights_from_a_file(two_step_run, feature_network, reference, tiny, tmp_path):
    import yaml

    weights, config = str(tmp_path / "weights.safetensors"), tmp_path / "config.yaml"
    export_weights(two_step_run, weights, ema=True)
    config.write_text(yaml.safe_dump(tiny().model_dump(mode="json")))
    means, out = EvaluationOptions(**feature_network, reference=reference), str(tmp_path / "out")
    found = evaluated(weights, means, out, str(config))
    of_run = evaluated(two_step_run, means, str(tmp_path / "of_run"))
    assert [r["fid"] for r in found] == [r["fid"] for r in of_run] and found[0]["step"] is None
    assert Path(out, f"evaluations/weights-{xxh3_128_hexdigest(Path(weights).read_bytes()):.8}.json").exists()
    with pytest.raises(UserError, match="give a folder as --out"):
        evaluated(weights, means, None, str(config))
    config.write_text(yaml.safe_dump(tiny(model__hidden=64).model_dump(mode="json")))
    with pytest.raises(UserError, match="another network than the config describes .model.hidden is 32, not 64"):
        evaluated(weights, means, out, str(config))
