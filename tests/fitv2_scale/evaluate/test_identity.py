"""What an evaluation made once is found again by content: weights, references, network; never by name or path."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from xxhash import xxh3_128_hexdigest

from data_sharding.errors import UserError
from data_sharding.format.codecs import get_codec
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate import evaluate
from fitv2_scale.evaluate.evaluate import EvaluationOptions, evaluate_weights
from fitv2_scale.evaluate.features import read_npz
from fitv2_scale.evaluate.generated_features import Cell
from fitv2_scale.evaluate.image_sets import image_set_digest
from fitv2_scale.evaluate.sampling.load_weights import Weights, open_weights
from fitv2_scale.parallel.world import join
from tests.support.other_weights import replace_weights, weights_of


def cell(weights) -> list[Cell]:
    return [Cell("32x48", SamplingConfig(cfg=2.0, steps=2), 20, 7, tuple(range(weights.classes)))]


@pytest.fixture
def evaluated(feature_network, reference, tmp_path, monkeypatch):
    """``evaluated(source, config)``: the one result, and how many images were made for it."""
    made, real = [], evaluate.generate_features

    def counted(weights, cell, network, store, folder):
        made.append(cell.images)
        real(weights, cell, network, store, folder)

    monkeypatch.setattr(evaluate, "generate_features", counted)

    def run(source: str, config: str | None = None, *overrides: str, **options) -> tuple[dict, int]:
        made.clear()
        means = EvaluationOptions(**{**feature_network, "reference": reference, **options})
        out = str(tmp_path / "out")
        done = evaluate_weights(source, cell, means, config_file=config, overrides=list(overrides), out=out)
        return done.results[0], sum(made)

    return run


def test_replaced_weights_are_measured_again(two_step_run, evaluated, tmp_path):
    file, config = weights_of(two_step_run, tmp_path / "first")
    first, made = evaluated(file, config)
    assert made == 20 and evaluated(file, config) == (first, 0)
    replace_weights(file)
    second, made = evaluated(file, config)
    assert made == 20 and second["fid"] != first["fid"]
    assert second["weights_digest"] == xxh3_128_hexdigest(Path(file).read_bytes()) != first["weights_digest"]
    moved = tmp_path / "elsewhere" / "weights.safetensors"
    moved.parent.mkdir()
    shutil.move(file, moved)
    assert evaluated(str(moved), config) == (second, 0)


def test_files_of_one_name_have_results_of_their_own(two_step_run, evaluated, tmp_path):
    found = {}
    for folder in ("a", "b"):
        file, config = weights_of(two_step_run, tmp_path / folder)
        if folder == "b":
            replace_weights(file)
        result, _ = evaluated(file, config)
        found[f"weights-{xxh3_128_hexdigest(Path(file).read_bytes()):.8}"] = result["fid"]
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "evaluations").glob("*.json")}
    assert {name: step["fid"] for name, step in files.items()} == found
    assert all(len(step["cells"]) == 1 for step in files.values())


def test_parts_of_other_weights_are_not_continued(two_step_run, evaluated, tmp_path, monkeypatch):
    """Killed after all images were made, and the weights replaced before it is started again."""
    file, config = weights_of(two_step_run, tmp_path / "first")
    measure = evaluate.measure
    monkeypatch.setattr(evaluate, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluated(file, config)
    monkeypatch.setattr(evaluate, "measure", measure)
    replace_weights(file)
    undisturbed = evaluated(file, config)[0]
    shutil.rmtree(tmp_path / "out")
    assert evaluated(file, config)[0]["fid"] == undisturbed["fid"]


def test_another_network_of_the_same_shapes_is_another(two_step_run, evaluated, tmp_path):
    """QK-norm has no weights, so a weights file does not tell whether its network has it."""
    file, config = weights_of(two_step_run, tmp_path / "first")
    evaluated(file, config)
    assert evaluated(file, config, "model.qk_norm=none")[1] == 20


def test_another_codec_is_measured_again(two_step_run, evaluated, tmp_path, monkeypatch):
    """A VAE that took the place of another makes other pictures of the same latents."""
    file, config = weights_of(two_step_run, tmp_path / "first")
    first, _ = evaluated(file, config)
    codec = get_codec("dct")
    negative = SimpleNamespace(digest="00", channels=4, decode=lambda latent: 255 - codec.decode(latent))
    monkeypatch.setattr(Weights, "codec", lambda self: negative)
    second, made = evaluated(file, config)
    assert made == 20 and second["fid"] != first["fid"]
    assert (first["codec"], second["codec"]) == (codec.digest, "00")


def test_a_run_is_known_by_its_commit_not_by_its_folder(two_step_run, evaluated, tmp_path):
    shutil.copytree(two_step_run, tmp_path / "copy")
    first, made = evaluated(two_step_run)
    assert made == 20 and evaluated(str(tmp_path / "copy")) == (first, 0)
    log = json.loads((tmp_path / "copy" / "log" / "00000002").read_text())
    assert first["weights_digest"] == log["manifest"]


def test_what_an_earlier_version_measured_of_a_run_is_kept(two_step_run, evaluated, reference, tmp_path):
    """It named results by the run's URL, in a hash, and recorded no digest of weights."""
    first, _ = evaluated(two_step_run)
    (path,) = (tmp_path / "out" / "evaluations" / "2").glob("*.json")
    old = {key: value for key, value in first.items() if key not in ("weights_digest", "codec")} | {"fid": 0.125}
    record = {"size": "32x48", "images": 20, "seed": 7, "classes": 5, "cfg": 2.0, "guided_channels": "all"}
    record |= {"solver": "euler", "rope": "auto", "attention_scale": "auto", "steps": 2}
    identity = [record, [0, 1, 2, 3, 4], f"{two_step_run}@2", first["network"]]
    name = f"32x48-cfg2-euler2-auto-20-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]}"
    path.rename(path.with_name(f"{name}.json")).write_text(json.dumps(old))
    assert evaluated(two_step_run) == (old, 0)


def test_a_replaced_reference_is_another(two_step_run, evaluated, reference, photographs, tmp_path):
    npz, folder = tmp_path / "ref.npz", tmp_path / "photographs"
    shutil.copy(reference, npz)
    shutil.copytree(photographs, folder)
    for source in (npz, folder):
        first, _ = evaluated(two_step_run, reference=str(source))
        assert evaluated(two_step_run, reference=str(source)) == (first, 0)
        moved = source.with_name(f"moved-{source.name}")
        source.rename(moved)
        assert evaluated(two_step_run, reference=str(moved)) == (first, 0)
        if moved.is_file():
            arrays = read_npz(str(moved))
            np.savez(moved, **{**arrays, "mu": arrays["mu"] + 1})
        else:
            one, two, *_ = sorted(moved.rglob("*.png"))
            one.write_bytes(two.read_bytes())
        second, made = evaluated(two_step_run, reference=str(moved))
        assert made == 20 and second["fid"] != first["fid"]


def test_a_reference_that_changes_while_images_are_made_is_found_out(
    two_step_run, evaluated, reference, tmp_path, monkeypatch
):
    npz = tmp_path / "ref.npz"
    shutil.copy(reference, npz)
    real = evaluate.collect_features

    def meanwhile(*args):
        arrays = read_npz(str(npz))
        np.savez(npz, **{**arrays, "mu": arrays["mu"] + 1})
        return real(*args)

    monkeypatch.setattr(evaluate, "collect_features", meanwhile)
    with pytest.raises(UserError, match="ref.npz was changed meanwhile: run the same command again"):
        evaluated(two_step_run, reference=str(npz))
    assert not list((tmp_path / "out").rglob("*.json"))


def test_sets_of_images_are_known_by_what_is_in_them(photographs, dataset, tmp_path):
    copy = shutil.copytree(photographs, tmp_path / "copy")
    assert image_set_digest(str(copy), 80) == image_set_digest(photographs, 80) != image_set_digest(photographs, 40)
    files = sorted(Path(copy).rglob("*.png"))
    files[7].rename(files[7].with_name("zzz.png"))
    assert image_set_digest(str(copy), 80) != image_set_digest(photographs, 80)
    moved = shutil.copytree(dataset, tmp_path / "set")
    assert image_set_digest(f"{moved}/", 100) == image_set_digest(dataset, 100)
    header = json.loads((Path(moved) / "manifest.json").read_text())
    (Path(moved) / "manifest.json").write_text(json.dumps(header, indent=2))
    assert image_set_digest(str(moved), 100) != image_set_digest(dataset, 100)


def test_a_dataset_that_took_the_place_of_a_runs_own(two_step_run, dataset, tmp_path):
    """Its classes, or its codec, are not those of the weights."""
    taken = shutil.copytree(dataset, tmp_path / "set")
    header = json.loads((Path(taken) / "manifest.json").read_text())
    for change, difference in (
        ({"classes": [f"dog{i}" for i in range(5)]}, "another class list"),
        ({"codec": header["codec"] | {"digest": "00"}}, "another codec"),
        ({}, None),
    ):
        (Path(taken) / "manifest.json").write_text(json.dumps(header | change))
        with join() as world, open_weights(two_step_run, world, None, [f"data.url={taken}"]) as weights:
            if difference is None:
                assert weights.classes == 5 and weights.codec().digest == header["codec"]["digest"]
                continue
            with pytest.raises(UserError, match=f"{taken} has {difference} than the data of {two_step_run}@2"):
                weights.codec()


def test_a_vae_that_is_not_that_of_the_latents(two_step_run, vae_folder, tmp_path):
    """The run's dataset is gone, but its codec is recorded."""
    run = shutil.copytree(two_step_run, tmp_path / "run")
    start = run / "attempts/1/start.json"
    record = json.loads(start.read_text())
    with join() as world, open_weights(str(run), world, None, ["data.url=gone", f"sampling.vae={vae_folder}"]) as found:
        with pytest.raises(UserError, match=r"is not the one that encoded these latents .*give the folder"):
            found.codec()
        for codec in (get_codec("sd-vae", vae_folder, "sample").digest, "published sd-vae-ft-ema latents"):
            start.write_text(json.dumps(record | {"codec": codec}))
            assert found.codec().name == "sd-vae"


@pytest.mark.parametrize(
    "sampling, label, newer",
    [
        ({}, "32x48-cfg1.5-euler50-auto-9", {}),
        ({"guidance_interval": [0.0, 1.0], "sincos": "auto"}, "32x48-cfg1.5-euler50-auto-9", {}),
        (
            {"guidance_interval": [0.25, 0.8], "cfg": 3, "solver": "dopri5"},
            "32x48-cfg3from0.25to0.8-dopri5-auto-9",
            {"guidance_interval": [0.25, 0.8]},
        ),
        ({"solver": "ddpm", "steps": 250, "sincos": "ei"}, "32x48-cfg1.5-ddpm250-sincos_ei-9", {"sincos": "ei"}),
    ],
)
def test_newer_settings_are_told_apart_and_at_their_defaults_leave_names_as_they_were(sampling, label, newer):
    one = Cell("32x48", SamplingConfig(**sampling), 9, 0, (0,))
    of_always = {"size", "images", "seed", "classes", "cfg", "guided_channels", "solver", "rope", "attention_scale"}
    of_always |= {"atol", "rtol"} if sampling.get("solver") == "dopri5" else {"steps"}
    assert one.label == label
    assert {name: value for name, value in one.record().items() if name not in of_always} == newer
