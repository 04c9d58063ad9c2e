"""A config is what its file and the command line say: as it is written, or refused with one sentence."""

import codecs
import math
import os
import re

import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.load import load_config, load_slurm
from fitv2_scale.config.schema import Config

LEAST = "model: {depth: 2, hidden: 32, heads: 2}\ndata: {url: x}\ntrain: {steps: 5}\n"  # three lines


@pytest.fixture
def load(tmp_path):
    """``load(text, "key=value", …)``: the config of a file with LEAST, then ``text``."""

    def config(more: str = "", *overrides: str) -> Config:
        (tmp_path / "c.yaml").write_text(LEAST + more)
        return load_config(str(tmp_path / "c.yaml"), list(overrides))

    return config


def value_of(config: Config, dotted: str):
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    "more,said",
    [
        ("optimizer: {lr: 1e-3}\nflow: {}\noptimizer: {eps: 1}\n", "line 6: optimizer is given twice, first in line 4"),
        ("optimizer:\n  lr: 1e-3\n  eps: 1\n  lr: 2\n", r"line 7: optimizer\.lr is given twice, first in line 5"),
        ("train: {steps: 6}\n", "line 4: train is given twice, first in line 3"),
        ("checkpoint: {milestones: [{a: 1, a: 2}]}\n", r"line 4: checkpoint\.milestones\.0\.a is given twice"),
        ("ema: &e {decay: 0.5}\nslurm: {<<: *e, <<: *e}\n", "line 5: slurm.<< is given twice"),
    ],
)
def test_a_key_given_twice_is_refused(load, more, said):
    with pytest.raises(UserError, match=rf"c\.yaml, {said}.*keep one of them"):
        load(more)


def test_anchors_and_merges_are_no_repeats(load):
    """A key of the mapping itself wins over a merged one, the first of two merged ones over the second."""
    config = load(
        "slurm: {setup: &l [a, b], extra: *l}\n"
        "validation: &v {images: 7, every_steps: 9}\n"
        "sampling: {<<: [{columns: 3, steps: 4}, {steps: 6, cfg: 2}], columns: 5}\n"
    )
    assert config.slurm.extra == config.slurm.setup == ["a", "b"]
    assert (config.sampling.columns, config.sampling.steps, config.sampling.cfg) == (5, 4, 2.0)


@pytest.mark.parametrize(
    "text", ["2024-01-01", "1234", "0123", "on", "null", "~", "1e3", "12:30", "a: b", "a #b", "*", "[a"]
)
def test_a_text_is_as_typed(load, text):
    """YAML 1.1 makes a date, 83, true, None, 750 or nothing at all of them."""
    config = load("", f"run={text}", f"slurm.account={text}", f"slurm.walltime={text}")
    assert (config.run, config.slurm.account, config.slurm.walltime) == (text,) * 3
    assert load_slurm([f"slurm.account={text}"]).account == text


@pytest.mark.parametrize("text", ["2024-01-01", "1234", "0123", "on", "1e3", "12:30", "0x1f", "1_000", ".inf"])
def test_a_text_in_a_file_is_as_written(load, text):
    config = load(f"run: {text}\nslurm: {{account: {text}, setup: [{text}, {text}]}}\nsampling: {{vae: '{text}'}}\n")
    assert (config.run, config.slurm.account, config.sampling.vae) == (text,) * 3
    assert config.slurm.setup == [text, text]
    assert load("", f"slurm.setup=[{text}, b]").slurm.setup == [text, "b"]
    assert load("", f"data.url=[{text}, b]").data.url == [text, "b"]


def test_quotes_and_sections_are_yaml(load):
    config = load("", "run='1234'", 'slurm.account="a b"', "optimizer={lr: 1e-3, warmup_steps: 1_0}", "validation.url=")
    assert (config.run, config.slurm.account, config.validation.url) == ("1234", "a b", "")
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (1e-3, 10)


OPTIMIZER = "optimizer: {lr: 1e-3, warmup_steps: 10}\n"


def test_an_override_of_a_section_keeps_its_other_keys(load):
    """As the file has them, or another override; also those of a section within."""
    changed = load(OPTIMIZER, "optimizer={lr: 0.5}").optimizer
    assert (changed.lr, changed.warmup_steps, changed.eps) == (0.5, 10, 1e-8)
    split = load(OPTIMIZER, "optimizer.lr=0.5", "optimizer={warmup_steps: 3}").optimizer
    assert (split.lr, split.warmup_steps) == (0.5, 3)
    assert load(OPTIMIZER, "optimizer={}").optimizer == load(OPTIMIZER).optimizer
    model = load("", "model={rope: {mode: ntk}}", "model.rope.train_side=8", "model.classes=7").model
    assert (model.hidden, model.classes, model.rope.mode, model.rope.train_side) == (32, 7, "ntk", 8)
    assert load_slurm(["slurm.account=a", "slurm={partition: b}"]).account == "a"


@pytest.mark.parametrize(
    "key,first,second",
    [
        ("optimizer.lr", "optimizer.lr=0.5", "optimizer.lr=0.7"),
        ("optimizer.lr", "optimizer.lr=0.5", "optimizer={lr: 0.7}"),
        ("optimizer.lr", "optimizer={eps: 1, lr: 0.7}", "optimizer.lr=0.5"),
        ("model.rope.mode", "model={rope: {mode: pi}}", "model.rope={mode: ntk}"),
        ("run", "run=a", "run=a"),
    ],
)
def test_a_key_in_two_overrides_is_refused(load, key, first, second):
    said = f"{key} is given twice, by '{first}' and by '{second}': keep one of them"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        load(OPTIMIZER, first, "seed=3", second)


@pytest.mark.parametrize(
    "key,text,value",
    [
        ("optimizer.lr", "1e-4", 1e-4),
        ("optimizer.lr", "2", 2.0),
        ("optimizer.lr", "0x10", 16.0),
        ("seed", "1_000", 1000),
        ("seed", "0x10", 16),
        ("seed", "1e3", 1000),
        ("seed", "2.5e6", 2_500_000),
        ("seed", "18446744073709551615", (1 << 64) - 1),
        ("seed", "1.8446744073709551615e19", (1 << 64) - 1),
        ("layout.replicate", "2", 2),
        ("layout.replicate", "auto", "auto"),
        ("layout.compile", "off", False),
        ("slurm.exclusive", "yes", True),
        ("checkpoint.every_minutes", "null", None),
        ("checkpoint.every_minutes", "1.5", 1.5),
        ("data.weights", "[1e0, 2]", [1.0, 2.0]),
        ("checkpoint.milestones", "[1e3, 2_000]", [1000, 2000]),
    ],
)
def test_a_number_is_what_it_shows(load, key, text, value):
    section, _, name = key.rpartition(".")
    in_file = f"{section}: {{{name}: {text}}}\n" if section and section != "data" else ""
    for config in [load("", f"{key}={text}"), *([load(in_file)] if in_file else [])]:
        found = value_of(config, key)
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "override,said",
    [
        ("seed=010", "seed=010: 010 begins with a zero, which some read as octal: leave it out"),
        ("optimizer.lr=010", "010 begins with a zero"),
        ("batch.images=12:30", "batch.images = '12:30': .* a valid integer"),
        ("train.steps=yes", "train.steps = 'yes': .* a valid integer"),
        ("train.steps=2M", "train.steps = '2M': .*give a whole number, as in 1000 or 1e3"),
        ("train.steps=1e-3", "train.steps = 0.001: .*whole number"),
        ("train.steps=1e999999999", "train.steps = inf"),
        ("optimizer.lr=true", "optimizer.lr = 'true': .* a valid number"),
        ("run=a\0b", "run=a.b: .* characters that are no text"),
        ("run=a\udcff", "no text"),
        ("=5", "'=5' is not of the form key=value"),
        ("a..b=5", "is not of the form key=value"),
        ("data.url=[a", r"data.url=\[a is not YAML: line 1"),
        ("data.url=", "data.url = '': give the folder or URL of a dataset"),
        ("optimizer={lr: 1, lr: 2}", "lr is given twice"),
        ("sampling.sizes=[]", r"sampling.sizes = \[\]: give at least one size, as in \[256x256\]"),
        ("checkpoint.milestones=[5, -5]", r"checkpoint.milestones.1 = -5: .*greater than or equal to 0"),
    ],
)
def test_what_is_no_value_is_refused(load, override, said):
    with pytest.raises(UserError, match=said):
        load("", override)


def test_sizes_of_samples_are_multiples_of_the_models_token(load):
    assert load("sampling: {sizes: [32x48]}\n").sampling.sizes == ["32x48"]
    assert load("sampling: {sizes: [32x64]}\n", "model.patch=4").sampling.sizes == ["32x64"]
    for patch, multiple in ((2, 16), (4, 32), (8, 64)):
        with pytest.raises(UserError, match=rf"sampling.sizes: size '40x128': .* multiples of {multiple} \(a token\)"):
            load("sampling: {sizes: [256x256, 40x128]}\n", f"model.patch={patch}")


def test_who_is_to_blame(load, tmp_path):
    """An override's fault is not the file's."""
    with pytest.raises(UserError, match=r"^unknown key modle, did you mean model\?"):
        load("", "modle.depth=3")
    with pytest.raises(UserError, match=r"^seed = -1: "):
        load("seed: -2\n", "seed=-1")
    with pytest.raises(UserError, match=rf"^{tmp_path}/c.yaml: unknown key modle, did you mean model\?"):
        load("modle: {depth: 3}\n", "seed=3")
    with pytest.raises(UserError, match=rf"^{tmp_path}/c.yaml: optimizer.lr = 'fast': "):
        load("optimizer: {lr: fast}\n", "optimizer.eps=1", "optimizer={beta1: 0.5}")


def float_keys(section: type = Config, prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            found += float_keys(field.annotation, f"{prefix}{name}.")
        elif "float" in str(field.annotation):
            found.append(f"{prefix}{name}")
    return found


LISTS = ("data.weights", "sampling.guidance_interval")


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "inf", "nan", "1e400"])
def test_no_number_is_infinite(load, text):
    """Neither survives as JSON, where a run keeps its config."""
    keys = float_keys()
    assert len(keys) > 25 and {"optimizer.max_norm", *LISTS} <= {*keys}
    for key in keys:
        with pytest.raises(
            UserError, match=rf"^{key}(\.0)? = -?(inf|nan): Input should be (a finite number|greater|less)"
        ):
            load("", f"{key}=[{text}]" if key in LISTS else f"{key}={text}")
    assert math.isfinite(load("", "optimizer.max_norm=1e9").optimizer.max_norm)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_encodings_with_a_mark_are_read(tmp_path, encoding):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "c.yaml").write_bytes(mark + (LEAST + "run: Bücher\n").encode(encoding))
    assert load_config(str(tmp_path / "c.yaml")).run == "Bücher"


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "data,said",
    [
        (LEAST.encode("utf-16-le"), "is not YAML: .*#x0000"),
        ((LEAST + "run: Bücher\n").encode("latin-1"), "is not text in UTF-8 .*saved as UTF-8"),
        (bytes(range(1, 256)), "is not text in UTF-8"),
        (b"model:\n\tdepth: 2\n", r"is not YAML: line 2, column 1: found character '\\t'"),
        (b"", "must hold a mapping"),
        (b"x" * (100 << 20), "is larger than 1 MiB"),
        ((LEAST + "a: " + "[" * 5000).encode(), "is nested too deeply"),
        ((LEAST + ALIASES).encode(), "line .: more than 100000 values"),
        ((LEAST + "a: &a {b: *a}\n").encode(), "an alias stands for a value that holds it"),
        ((LEAST + "a: &a {<<: *a}\n").encode(), "an alias stands for a value that holds it"),
        ((LEAST + "run: !!python/object/apply:os.getcwd []\n").encode(), "run = .*valid string"),
        ((LEAST + "run: !x y\n").encode(), "line 4: run has the tag !x"),
        ((LEAST + "run:\n").encode(), 'line 4: run is null: give a text, or "" for none'),
        ((LEAST + "optimizer.lr: 3\n").encode(), "line 4: optimizer.lr is written with a dot"),
        ((LEAST + "? [a]\n: 3\n").encode(), "line 4: a key is a list"),
        ((LEAST + "---\na: 3\n").encode(), "is not YAML: line 4"),
    ],
)
def test_files_that_are_no_config(tmp_path, data, said):
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(UserError, match=f"c.yaml.*({said})") as error:
        load_config(str(tmp_path / "c.yaml"))
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for path, said in [("folder", "Is a directory"), ("link", "No such file"), ("a\0b", "null byte")]:
        with pytest.raises(UserError, match=f"cannot read the config .*{said}"):
            load_config(os.path.join(tmp_path, path))


def test_a_pipe_is_read_only_where_a_shell_opened_it(tmp_path):
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(UserError, match=r"c.yaml is a pipe: give a file, or <\(COMMAND\)"):
        load_config(str(tmp_path / "c.yaml"))
    reader, writer = os.pipe()
    with open(writer, "w") as file:
        file.write(LEAST)
    assert load_config(f"/dev/fd/{reader}").train.steps == 5
    os.close(reader)


def test_a_section_without_keys_has_its_defaults(load):
    assert load("optimizer:\n  # lr: 3\n", "optimizer.eps=0.5").optimizer.lr == 1e-4
