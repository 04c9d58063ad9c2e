"""`fitv2 evaluate`: references, images that any number of ranks makes, evaluations that go on, suites, bad input."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.weights import export_weights
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.evaluate import Means, evaluate_pictures, evaluate_weights
from fitv2_scale.evaluate.features import read_npz
from fitv2_scale.evaluate.generated_features import Cell
from fitv2_scale.evaluate.image_sets import open_pictures
from fitv2_scale.evaluate.suites import load_suite, suite_table
from fitv2_scale.train.loop import train
from tests.support.feature_networks import POOL, Tiny, save_network
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import CLASSES


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def photographs(shared_folder) -> str:
    """80 pictures of many sizes, in two folders."""
    rng = np.random.default_rng(0)
    for i in range(80):
        height, width = rng.integers(24, 150, 2)
        ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * rng.uniform(0.2, 2, 3)
        folder = shared_folder / "photographs" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((ramp + rng.integers(0, 40, ramp.shape)).astype(np.uint8)).save(folder / f"{i}.png")
    return str(shared_folder / "photographs")


@pytest.fixture(scope="module")
def network(shared_folder) -> dict[str, str]:
    """Options of the command line, and of ``Means``."""
    file, digest = save_network(Tiny(), shared_folder)
    return {"network": file, "network_sha256": digest}


@pytest.fixture(scope="module")
def reference(shared_folder, photographs, network) -> str:
    file = str(shared_folder / "32x48.npz")
    evaluate_pictures(photographs, "32x48", Means(**network), file)
    return file


@pytest.fixture(scope="module")
def run(dataset, shared_folder) -> str:
    from tests.support.tiny_runs import make_tiny

    config = make_tiny(dataset, shared_folder, "run", train__steps=2, ema__decay=0.1)
    assert run_ranks(2, train, config) == [0, 0]
    return config.run


def cells(weights, size="32x48", images=40, steps=(2, 4)) -> list[Cell]:
    return [Cell(size, SamplingConfig(cfg=2.0, steps=n), images, 7, tuple(range(weights.classes))) for n in steps]


def evaluated(source: str, means: Means, out: str | None = None, config: str | None = None) -> list[dict] | None:
    return evaluate_weights(source, cells, means, out=out, config_file=config).results


def test_statistics_are_in_adms_format(photographs, network, reference):
    """As its evaluator reads them: mu and sigma of all, the spatial ones too, and pictures."""
    arrays = read_npz(reference)
    assert {n: a.shape for n, a in arrays.items() if n != "network"} == {
        "mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (12,), "sigma_s": (12, 12),
        "arr_0": (80, 32, 48, 3), "pool": (80, POOL),
    }  # fmt: skip
    assert arrays["arr_0"].dtype == np.uint8 and arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    again = evaluate_pictures(photographs, "32x48", Means(**network, reference=reference), None)
    assert again["fid"] < 1e-3 and again["sfid"] < 1e-3 and (again["precision"], again["recall"]) == (1.0, 1.0)


def test_a_reference_that_others_made(shared_folder, photographs, network, reference):
    """Without our extra arrays: the features for precision and recall are computed from its pictures. And a batch of
    pictures alone, as `fitv2 sample --npz` writes it, is a reference too."""
    arrays = read_npz(reference)
    published, batch = str(shared_folder / "published.npz"), str(shared_folder / "batch.npz")
    np.savez(published, **{name: arrays[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")})
    np.savez(batch, arr_0=arrays["arr_0"])
    ours = evaluate_pictures(photographs, "32x32", Means(**network, reference=reference), None)
    for other in (published, batch):
        found = evaluate_pictures(photographs, "32x32", Means(**network, reference=other), None)
        assert [found[n] for n in ("fid", "sfid", "is")] == pytest.approx([ours[n] for n in ("fid", "sfid", "is")])
        assert (found["precision"], found["recall"]) == (ours["precision"], ours["recall"])
    assert ours["fid"] > 1e-4


def test_two_halves(shared_folder, photographs, network, reference):
    """Of precomputed features, against the formula with scipy's root."""
    pool = read_npz(reference)["pool"]
    first, second = str(shared_folder / "first.npz"), str(shared_folder / "second.npz")
    np.savez(first, pool=pool[::2])
    np.savez(second, pool=pool[1::2])
    found = evaluate_pictures(first, None, Means(reference=second), None)
    a, b = (np.cov(half.astype(np.float64), rowvar=False) for half in (pool[::2], pool[1::2]))
    shift = pool[::2].mean(0, dtype=np.float64) - pool[1::2].mean(0, dtype=np.float64)
    expected = shift @ shift + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert found["fid"] == pytest.approx(expected, abs=1e-6) and found["fid"] < 0.1 * np.trace(a)
    assert found["sfid"] is found["is"] is None and found["images"] == 40


def test_a_dataset_is_measured_as_decoded(dataset, photographs, network):
    means = Means(**network, reference=dataset, reference_images=100)
    assert evaluate_pictures(dataset, "32x48", means, None)["fid"] < 1e-3
    pictures = open_pictures(dataset, (48, 32), 100)
    assert pictures.count == 100 and {p.shape for p in pictures.read()} == {(48, 32, 3)}
    assert evaluate_pictures(photographs, "32x48", means, None)["fid"] > 1e-2  # others


def test_pictures_cover_the_size_and_are_not_stretched(tmp_path):
    """Bands of a wide picture: what is cut off is at its ends."""
    wide = np.zeros((40, 200, 3), np.uint8)
    wide[:, 60:140] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (square,) = open_pictures(str(tmp_path), (32, 32), 1).read()
    (band,) = open_pictures(str(tmp_path), (16, 160), 1).read()
    assert (square == 200).all()
    assert band.shape == (16, 160, 3) and (band[:, 60:100] == 200).all() and not band[:, [0, 40, 120, 159]].any()


def test_the_same_figures_on_any_number_of_ranks(shared_folder, run, network, reference):
    means = Means(**network, reference=reference, keep_features=True)
    outs = [str(shared_folder / f"ranks{size}") for size in (1, 2, 3)]
    for size, out in zip((1, 2, 3), outs, strict=True):
        first, *others = run_ranks(size, evaluated, run, means, out)
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


def test_an_evaluation_goes_on_where_it_was_killed(shared_folder, run, network, reference, monkeypatch):
    """And is not made again when it is there, but for another reference."""
    from fitv2_scale.evaluate import generated_features

    out, means = str(shared_folder / "killed"), Means(**network, reference=reference)
    made, real = [], generated_features.sample

    def counted(network, requests, *, kill_at=99, **options):
        if len(made) >= kill_at:
            raise Killed
        made.append([request.index for request in requests])
        return real(network, requests, **options)

    def some(requests, weights, sampling):
        return [requests[i : i + 15] for i in range(0, len(requests), 15)]

    monkeypatch.setattr(generated_features, "chunks", some)
    monkeypatch.setattr(generated_features, "sample", partial(counted, kill_at=2))
    with pytest.raises(Killed):
        evaluated(run, means, out)
    monkeypatch.setattr(generated_features, "sample", counted)
    results = evaluated(run, means, out)
    assert made[:3] == [list(range(15)), list(range(15, 30)), list(range(30, 40))]
    assert sum(map(len, made)) == 80  # two cells of 40
    assert evaluated(run, means, out) == results and len(made) == 6
    assert not list(Path(out).rglob("part-*"))
    evaluated(run, Means(**network, reference=str(Path(reference).parent / "photographs")), out)
    assert len(made) == 12
    step = json.loads(Path(out, "evaluations/2.json").read_text())
    assert step["fid"] == step["cells"][0]["fid"] and step["step"] == 2 and len(step["cells"]) == 2
    assert [cell["nfe"] for cell in step["cells"]] == [4.0, 2.0]


def test_weights_from_a_file(shared_folder, run, network, reference, tiny, tmp_path):
    import yaml

    weights, config = str(tmp_path / "weights.safetensors"), tmp_path / "config.yaml"
    export_weights(run, weights, ema=True)
    config.write_text(yaml.safe_dump(tiny().model_dump(mode="json")))
    means, out = Means(**network, reference=reference), str(tmp_path / "out")
    found = evaluated(weights, means, out, str(config))
    of_run = evaluated(run, means, str(tmp_path / "of_run"))
    assert [r["fid"] for r in found] == [r["fid"] for r in of_run] and found[0]["step"] is None
    assert Path(out, "evaluations/weights.json").exists()
    with pytest.raises(UserError, match="give a folder as --out"):
        evaluated(weights, means, None, str(config))
    config.write_text(yaml.safe_dump(tiny(model__hidden=64).model_dump(mode="json")))
    with pytest.raises(UserError, match="the config wants"):
        evaluated(weights, means, out, str(config))


def test_figures_reach_mlflow_at_their_step(shared_folder, run, network, reference, dataset, capfd):
    """And leave the run's status alone; sent again, they are there once."""
    from mlflow import MlflowClient

    copy = str(shared_folder / "tracked" / "run")
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluations"))
    record = Path(copy, "run.json")
    tracking = {"uri": "auto", "experiment": "tests", "peak_tflops": None}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"config": _config(record) | {"tracking": tracking}}))
    call = ["evaluate", copy, *options(network), "--reference", reference, "--size", "32x48", "--images", "30"]
    call += ["--nfe", "1"]
    assert main(call) == 0 and "MLflow does not know the run yet" in capfd.readouterr().out
    assert main(["track", "sync", copy]) == 0
    client = MlflowClient(f"sqlite:///{shared_folder}/tracked/mlflow.db")
    found = client.get_run(json.loads(Path(copy, "tracking/mlflow.json").read_text())["mlflow_run"])
    for _ in range(2):
        assert main(call) == 0 and "MLflow: 5 figures in run" in capfd.readouterr().out
    step = json.loads(Path(copy, "evaluations/2.json").read_text())
    for name in ("fid", "recall"):
        (sent,) = client.get_metric_history(found.info.run_id, f"evaluate/32x48-cfg1.5-euler1-none-30/{name}")
        assert (sent.step, sent.value) == (2, step[name])
    assert client.get_run(found.info.run_id).info.status == found.info.status


def _config(record: Path) -> dict:
    return json.loads(record.read_text())["config"]


@pytest.mark.parametrize("name", ["in1k256", "ood", "hr", "ablation"])
def test_suites_are_whole(name):
    suite = load_suite(name)
    table = suite_table(suite, [])
    for row in suite.published:
        assert set(row.figures) <= set(suite.sizes) and f"| {row.model} " in table
        for fid, sfid, score, precision, recall in row.figures.values():
            assert fid > 1 and (sfid or 2) > 1 and (score or 2) > 1
            assert 0 < (precision or 0.5) < 1 and 0 < (recall or 0.5) < 1
    for cell in suite.cells:
        SamplingConfig(**{key: value for key, value in cell.items() if key != "size"})


def test_published_rows_of_the_paper():
    by = {name: {row.model: row.figures for row in load_suite(name).published} for name in ("in1k256", "ood", "hr")}
    assert by["in1k256"]["DiT-XL/2"]["256x256"] == (2.27, 4.60, 278.24, 0.83, 0.57)
    assert by["in1k256"]["SiT-XL/2"]["160x320"] == (17.38, 28.59, 110.32, 0.52, 0.65)
    assert by["in1k256"]["FiTv2-3B/2"]["128x384"] == (13.73, 23.26, 145.38, 0.61, 0.48)
    assert by["ood"]["FiTv2-XL/2"]["224x448"] == (5.54, 14.53, 233.11, 0.77, 0.51)
    assert by["hr"]["FiTv2-3B/2 (1.6)"]["256x768"] == (16.08, 19.75, 140.10, 0.72, 0.52)


def options(network: dict[str, str]) -> list[str]:
    return [word for name, value in network.items() for word in (f"--{name.replace('_', '-')}", value)]


def test_the_command_with_a_suite_and_with_few_steps(shared_folder, run, network, reference, tmp_path, capfd):
    suite = tmp_path / "small.yaml"
    suite.write_text(
        "title: Small\nimages: 30\nsampling: {solver: heun, steps: 2}\ncells:\n  - {size: 32x48, rope: vision_ntk}\n"
        "  - {size: 48x32, cfg: 1.0}\npublished:\n  - {model: Other, seen: 5M, 32x48: [1, 2, null, 0.5, 0.25]}\n"
    )
    references = tmp_path / "references"
    references.mkdir()
    for size in ("32x48", "48x32"):
        (references / f"{size}.npz").write_bytes(Path(reference).read_bytes())
    common = ["evaluate", run, *options(network), "--out", str(tmp_path / "out")]
    assert main([*common, "--suite", str(suite), "--reference", str(references), "--json"]) == 0
    first, second = json.loads(capfd.readouterr().out)
    assert (first["size"], first["cfg"], first["nfe"], first["rope"]) == ("32x48", 1.5, 4, "vision_ntk")
    assert (second["size"], second["cfg"], second["nfe"], second["rope"]) == ("48x32", 1.0, 4, "none")
    assert first["reference"]["source"].endswith("32x48.npz") and second["reference"]["source"].endswith("48x32.npz")
    table = (tmp_path / "out/evaluations/2/small.md").read_text()
    assert "| Other" in table and "| 5M" in table and f"{second['fid']:.2f}" in table.split("## 48x32")[1]

    few = ["--size", "32x48", "--size", "48x32", "--images", "30", "--nfe", "2,6", "--solver", "heun"]
    assert main([*common, *few, "--reference", reference]) == 0
    text = capfd.readouterr().out
    line = f"the images of {reference} are 32x48, those measured are 48x32"
    assert text.count(", those measured are") == text.count(line) == 1
    assert "NFE 2" in text and "NFE 6" in text and "nfe.png: FID against NFE" in text
    assert Image.open(tmp_path / "out/evaluations/2/nfe.png").size > (300, 200)


@pytest.mark.parametrize(
    "words,sentence",
    [
        (["RUN", "NETWORK", "REFERENCE", "--size", "100x100"], "size '100x100': give HEIGHTxWIDTH in pixels"),
        (["RUN", "NETWORK", "REFERENCE", "--size", "32x48", "--images", "12"], "12 images are too few for a"),
        (["RUN", "NETWORK", "REFERENCE", "--size", "32x48", "--classes", "0,9"],
         f"--classes 0,9: give numbers from 0 to {CLASSES - 1}, separated by commas"),
        (["RUN", "NETWORK", "REFERENCE", "--nfe", "5", "--solver", "heun"], "--nfe 5: give even numbers as in 4,8,50"),
        (["RUN", "NETWORK", "REFERENCE", "--nfe", "5", "--solver", "dopri5"], "--nfe needs a solver of fixed steps"),
        (["RUN", "NETWORK", "REFERENCE", "--suite", "none"], "there is no suite none: .*hr, in1k256, ood"),
        (["RUN", "NETWORK", "REFERENCE", "--suite", "hr", "--size", "32x48"], "leave --size out"),
        (["RUN", "NETWORK", "--size", "32x48"], "give what to compare with as --reference"),
        (["RUN", "REFERENCE", "--size", "32x48"], "give the network .* as --network"),
        (["RUN", "NETWORK", "REFERENCE", "--suite", "configs/demo.yaml"], "demo.yaml is no suite: it has no cells"),
        (["/no/run@7", "NETWORK", "REFERENCE", "--size", "32x48"], "/no/run is not a run"),
        (["RUN@7", "NETWORK", "REFERENCE", "--size", "32x48"], "has no commit at step 7"),
        (["RUN", "NETWORK", "--reference", "/no/ref.npz", "--size", "32x48"], "cannot read the reference /no/ref.npz"),
        (["RUN", "NETWORK", "--reference", "SMALL", "--size", "32x48"], "the network gives 12 features and .* is of 5"),
        (["RUN", "NETWORK", "--reference", "OTHER", "--size", "32x48"], "is of the network 00000"),
        (["PHOTOGRAPHS", "NETWORK", "REFERENCE"], "pictures of many sizes: say the one to measure at as --size"),
        (["PHOTOGRAPHS", "REFERENCE", "--size", "32x48"], "holds pictures: give the network"),
        (["PHOTOGRAPHS", "REFERENCE", "--size", "32x48", "--network", "TINY"], "give its digest as --network-sha256"),
        (["PHOTOGRAPHS", "REFERENCE", "--size", "32x48", "--network", "TINY", "--network-sha256", "ab"],
         "has the sha256 .* not ab"),
        (["NAN", "REFERENCE"], "pool features: row 3 holds NaN or infinity"),
        (["FEW", "REFERENCE"], "9 images are too few for a covariance of 12 pool features: give at least 13"),
        (["/no/such/pictures", "NETWORK", "REFERENCE", "--size", "32x48"], "/no/such/pictures is not a folder"),
        (["SMALL", "NETWORK", "REFERENCE"], "arr_0 is missing, not uint8"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    words, sentence, shared_folder, run, network, reference, photographs, tmp_path, capfd
):
    pool = np.random.default_rng(0).normal(size=(40, POOL)).astype(np.float32)
    files = {name: str(tmp_path / f"{name}.npz") for name in ("SMALL", "OTHER", "NAN", "FEW")}
    np.savez(files["SMALL"], mu=np.zeros(5), sigma=np.eye(5))
    np.savez(files["OTHER"], mu=np.zeros(POOL), sigma=np.eye(POOL), network=np.array("00" * 32))
    np.savez(files["NAN"], pool=np.where(np.arange(40)[:, None] == 3, np.nan, pool))
    np.savez(files["FEW"], pool=pool[:9])
    single = files | {"RUN": run, "RUN@7": f"{run}@7", "PHOTOGRAPHS": photographs, "TINY": network["network"]}
    many = {"NETWORK": options(network), "REFERENCE": ["--reference", reference]}
    given = [word for name in words for word in many.get(name, [single.get(name, name)])]
    before = sorted(Path(run).rglob("*"))
    assert main(["evaluate", *given]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fitv2: ")]
    assert len(lines) == 1
    assert re.search(sentence, lines[0]), lines[0]
    assert sorted(Path(run).rglob("*")) == before
