"""A run continues under a newer version, and its labels keep their meaning."""

import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest
from xxhash import xxh3_128_hexdigest

from data_sharding.errors import DataError, UserError
from data_sharding.format.class_names import class_difference
from data_sharding.write.images import write_dataset
from fitv2_scale.checkpoint.weights import export_weights, import_weights
from fitv2_scale.data import Data
from fitv2_scale.identity import check_start, open_run
from fitv2_scale.parallel.world import join
from fitv2_scale.run.fork import Fork
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import train
from fitv2_scale.train.setup import claim
from launchers.submit import submit
from tests.support.newer_config import newer
from tests.support.other_weights import replace_weights, weights_of
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import CLASSES, make_pictures

NAMES = [f"class{i}" for i in range(CLASSES)]


def digest_of(value) -> str:
    """The sha256 of canonical JSON, written apart from the code."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def opened(config) -> Run:
    return open_run(config, Data.open(config, (1,)).plan)


def identity(config) -> Path:
    return Path(config.run) / "run.json"


def rewrite(config, change) -> bytes:
    """Lets ``change`` edit the recipe of a run, with a hash that fits: what another version would have written."""
    record = json.loads(identity(config).read_text())
    change(record["recipe"])
    record["recipe_hash"] = digest_of(record["recipe"])
    identity(config).write_text(json.dumps(record))
    return identity(config).read_bytes()


@pytest.fixture(scope="module")
def subset(tmp_path_factory) -> str:
    """A dataset of the last two of the classes: its label 0 is the other's 3."""
    root = tmp_path_factory.mktemp("subset")
    make_pictures(root, 60)
    for name in NAMES[:3]:
        shutil.rmtree(root / name)
    url = str(tmp_path_factory.mktemp("data") / "subset")
    write_dataset(str(root), url, max_tokens=16, workers=1, holdout=0.2, progress=False)
    return url


def test_new_keys_at_their_defaults_continue_an_old_run(tiny):
    config, before = tiny(), opened(tiny())
    made = identity(config).read_bytes()
    run = opened(newer(config))
    assert run == before and identity(config).read_bytes() == made
    for change, difference in (
        ({"model": {"registers": 4}}, r"\(model\.registers: 0 -> 4\)"),
        ({"optimizer": {"schedule": {"name": "cosine"}}}, r'\(optimizer\.schedule\.name: "constant" -> "cosine"\)'),
        ({"data": {"mixup": {"share": 0.1}}}, r"data\.mixup\.share: \(absent\) -> 0\.1"),
    ):
        with pytest.raises(UserError, match=difference):
            opened(newer(config, **change))


def test_a_newer_run_continues_with_what_it_was_made_with(tiny):
    config = newer(tiny(), model={"registers": 4}, data={"mixup": {"share": 0.1}})
    before = opened(config)
    assert opened(config) == before
    with pytest.raises(UserError, match=r"model\.registers: 4 -> 0"):
        opened(newer(config, model={"registers": 0}))


def test_a_key_of_another_version_is_named_not_compared(tiny):
    config = tiny()
    opened(newer(config))  # even at its default: this version cannot know what it means
    with pytest.raises(UserError, match=r"run: model\.registers, .*optimizer\.schedule are no keys of this version"):
        opened(config)


@pytest.mark.parametrize(
    "absent, wanted",
    [
        (lambda recipe: recipe["optimizer"].pop("beta2"), None),
        (lambda recipe: recipe["model"].pop("rope"), None),
        (lambda recipe: recipe["model"]["rope"].pop("train_side"), None),
        (lambda recipe: recipe.pop("data"), None),
        (lambda recipe: recipe.pop("trainable"), None),
        (lambda recipe: recipe.pop("objective"), None),
        (lambda recipe: recipe.pop("ddpm"), None),
        (lambda recipe: recipe.update(objective="ddpm"), r'\(objective: "ddpm" -> "flow"\)'),
        (lambda recipe: recipe.update(init_from="", init_new=[]), None),
        (lambda recipe: recipe["data"].update(max_substituted=0.5), None),  # today runtime, once of the recipe
        (lambda recipe: recipe.pop("ema"), r"\(ema\.decay: 0\.9999 -> 0\.9\)"),
        (lambda recipe: recipe["model"].pop("classes"), r"\(model\.classes: 1000 -> 5\)"),
        (lambda recipe: recipe["model"].pop("depth"), r"\(model\.depth: \(absent\) -> 2\)"),
        (lambda recipe: recipe.update(init_from="a@1"), r'\(init_from: "a@1" -> ""\)'),
        (lambda recipe: recipe["flow"].update(shift=1), r"flow\.shift is no key of this version"),
    ],
)
def test_an_absent_key_means_its_default(tiny, absent, wanted):
    config = tiny()
    opened(config)
    stored = rewrite(config, absent)
    if wanted is None:
        opened(config)
    else:
        with pytest.raises(UserError, match=wanted):
            opened(config)
    assert identity(config).read_bytes() == stored


def test_an_edited_recipe_is_found_out_whatever_is_asked_for(tiny):
    config = tiny()
    opened(config)
    text = identity(config).read_text()
    for now in ('"beta2": 0.99', None):
        edited = text.replace('"beta2": 0.999', now) if now else text.replace('"adaln": "lora",', "")
        assert edited != text
        identity(config).write_text(edited)
        for asked in (config, tiny(optimizer={"beta2": 0.99, "lr": 1e-3, "warmup_steps": 10}), newer(config)):
            with pytest.raises(DataError, match=r"run\.json was edited"):
                opened(asked)


def test_classes_of_mixed_datasets_are_compared(tiny, dataset, subset):
    with pytest.raises(
        UserError, match=r"label 0 is 'class3' in .*subset and 'class0' in .*set, but a label must mean"
    ):
        Data.open(tiny(data__url=[dataset, subset]), (1,))
    other = tiny(data__url=subset, validation={"every_steps": 2, "url": f"{dataset}"})
    with pytest.raises(UserError, match="label 0 is 'class0' in .*set and 'class3' in .*subset"):
        run_ranks(1, train, other)
    own = tiny("own", data__url=subset, validation={"every_steps": 2, "url": f"{subset}/holdout"}, train__steps=2)
    assert run_ranks(1, train, own) == [0]


@pytest.mark.parametrize(
    "others, difference",
    [
        (("ant", "bee"), None),
        (("bee", "ant"), "label 0 is 'ant' in A and 'bee' in B"),
        (("ant", "Bee"), "label 1 is 'bee' in A and 'Bee' in B"),
        (("ant", "bee", "cow"), "A has 2 classes and B has 3"),
        (("ant",), "A has 2 classes and B has 1"),
    ],
)
def test_class_lists_differ_where_they_do(others, difference):
    assert class_difference("A", ("ant", "bee"), "B", others) == difference


def test_a_run_records_the_classes_of_its_data(tiny, subset):
    assert opened(tiny()).classes == digest_of(NAMES) == json.loads(identity(tiny()).read_text())["classes"]
    assert opened(tiny("other", data__url=subset)).classes == digest_of(NAMES[3:])


def forget_classes(config) -> bytes:
    record = json.loads(identity(config).read_text())
    del record["classes"]
    identity(config).write_text(json.dumps(record))
    return identity(config).read_bytes()


def test_a_run_without_a_class_list_adopts_that_of_its_next_attempt(tiny):
    config = tiny()
    opened(config)
    before = forget_classes(config)
    assert Run.open(config.run).classes is None
    assert opened(config).classes == digest_of(NAMES)
    assert identity(config).read_bytes() == before  # run.json is never written again
    assert Run.open(config.run).classes == digest_of(NAMES)
    assert json.loads((Path(config.run) / "classes.json").read_text()) == {"classes": digest_of(NAMES)}


def test_racing_attempts_adopt_one_class_list(tiny, subset, tmp_path):
    """An import knows neither data nor plan, so either may come first; the other's labels would mean something else."""
    sides = [tiny(), tiny(data__url=subset)]
    for _ in range(5):
        shutil.rmtree(tiny().run, ignore_errors=True)
        open_run(tiny(), None)
        begin, outcomes = threading.Barrier(2), []

        def attempt(config, begin=begin, outcomes=outcomes) -> None:
            plan = Data.open(config, (1,)).plan
            begin.wait()
            try:
                outcomes.append(open_run(config, plan).classes)
            except UserError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=attempt, args=(config,)) for config in sides]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused, adopted = sorted(outcomes, key=len, reverse=True)
        assert "was begun with another class list" in refused
        assert adopted == Run.open(tiny().run).classes and adopted in (digest_of(NAMES), digest_of(NAMES[3:]))


def test_imported_weights_take_their_classes_from_their_own_data(tiny, two_step_run, subset, tmp_path):
    file = str(tmp_path / "weights.safetensors")
    export_weights(two_step_run, file, ema=True)
    config = tiny(train__steps=1)
    import_weights(file, config.run, config)
    assert Run.open(config.run).classes is None
    assert run_ranks(1, train, config) == [0]
    assert Run.open(config.run).classes == digest_of(NAMES)
    # An older version trained it, and left no class list: other data cannot give it theirs.
    (Path(config.run) / "classes.json").unlink()
    other = tiny(train__steps=2, data__url=subset)
    with pytest.raises(UserError, match="trained on other data or in another order"):
        run_ranks(1, train, other)
    assert Run.open(config.run).classes is None
    assert run_ranks(1, train, tiny(train__steps=2)) == [0]
    assert Run.open(config.run).classes == digest_of(NAMES)


@pytest.mark.parametrize("known", ["by its run.json", "by its dataset", "by its dataset's digest"])
def test_weights_of_another_run_learned_its_classes(tiny, two_step_run, dataset, subset, tmp_path, known):
    """A fork onto other data, and init_from: refused, where it is known what the labels meant."""
    source = tmp_path / "source"
    shutil.copytree(two_step_run, source)
    record = json.loads((source / "run.json").read_text())
    assert record["classes"] == digest_of(NAMES) and record["config"]["data"]["url"] == dataset
    if known == "by its run.json":
        record["config"]["data"]["url"], named = str(tmp_path / "gone"), f"class list {digest_of(NAMES)[:16]}"
    else:
        named = f"label 0 is 'class0' in {source} and 'class3' in {subset}"
        del record["classes"]
    if known == "by its dataset's digest":
        record["config"]["data"]["url"] = [str(tmp_path / "gone"), dataset]
    (source / "run.json").write_text(json.dumps(record))
    plan = Data.open(tiny(data__url=subset), (1,)).plan
    fork, begun = tiny(data__url=subset), tiny(data__url=subset, init_from=f"{source}@2")
    for config, origin in ((fork, Fork.parse(f"{source}@2", fork.run)), (begun, None)):
        with pytest.raises(UserError) as refused:
            check_start(config, plan, origin)
        assert f"{source}@2 learned other classes than those of {subset}" in str(refused.value)
        assert named in str(refused.value)
    check_start(tiny(init_from=f"{source}@2"), Data.open(tiny(), (1,)).plan, Fork.parse(f"{source}@2", tiny().run))


def test_where_its_classes_are_not_known_a_run_may_begin(tiny, two_step_run, subset, tmp_path):
    """Its dataset was replaced by another, which says nothing about it; a weights file never says what it learned."""
    source, file = tmp_path / "source", str(tmp_path / "weights.safetensors")
    shutil.copytree(two_step_run, source)
    record = json.loads((source / "run.json").read_text())
    del record["classes"]
    record["config"]["data"]["url"] = subset
    (source / "run.json").write_text(json.dumps(record))
    export_weights(two_step_run, file, ema=True)
    for origin in (f"{source}@2", file):
        config = tiny(data__url=subset, init_from=origin)
        check_start(config, Data.open(config, (1,)).plan, None)


def test_train_and_submit_refuse_a_fork_onto_other_classes(tiny, two_step_run, subset, tmp_path):
    config = tiny(data__url=subset, slurm={"gpus": "none", "folder": str(tmp_path / "jobs")})
    with pytest.raises(UserError, match="learned other classes"):
        run_ranks(1, train, config, f"{two_step_run}@2")
    with pytest.raises(UserError, match="learned other classes"):
        submit(config, "1", dry_run=True, fork_from=f"{two_step_run}@2")
    assert not identity(config).exists()


def test_a_weights_file_that_was_replaced_before_the_first_commit(tiny, two_step_run, tmp_path):
    """A killed first attempt leaves no commit; the next would begin with other weights under the same recipe."""
    file, _ = weights_of(two_step_run, tmp_path / "first")
    config = tiny(init_from=file, train__steps=1)
    plan = Data.open(config, (1,)).plan
    with join() as world:
        first = claim(config, plan, None, world)
        assert first.run.recorded("init_from") == xxh3_128_hexdigest(Path(file).read_bytes())
        assert claim(config, plan, None, world).number == 2
        replace_weights(file)
        with pytest.raises(UserError, match="no longer holds the weights that .*run began with: restore them"):
            claim(config, plan, None, world)
        weights_of(two_step_run, tmp_path / "first")
        assert claim(config, plan, None, world).number == 3
        first.run.log.commit(3, 1, "steps/1", "00")
        Path(file).unlink()  # from the first commit on, it is not read any more
        assert claim(config, plan, None, world).number == 4
        begun = claim(tiny("other", init_from=f"{two_step_run}@2"), plan, None, world)
    entry = json.loads((Path(two_step_run) / "log" / "00000002").read_text())
    assert begun.run.recorded("init_from") == entry["manifest"]
