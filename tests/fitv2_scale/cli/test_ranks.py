"""Commands on several ranks of which one was told something else, or cannot read its part: all of them end at once with
one code, and the sentence appears where it arose, not once a rank."""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from fitv2_scale.cli.__main__ import main
from fitv2_scale.parallel import agreement
from fitv2_scale.run.run import Run
from tests.support.ranks import run_ranks
from tests.support.small_vae import save_vae

NOTHING = "/no/such/set"
ELSEWHERE = r"rank \d+ on \S+ says why this ends"


def run_as(*words: list[str]) -> tuple[int, str]:
    """Exit code and what this rank prints as an error; the command line of the last ranks is the last one."""
    own = words[min(int(os.environ["RANK"]), len(words) - 1)]
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(own)
        except SystemExit as exit:
            code = exit.code
    assert "Traceback" not in stderr.getvalue(), stderr.getvalue()
    return code, "\n".join(line for line in stderr.getvalue().splitlines() if line.startswith("fitv2"))


def run_in(folders: list[str], words: list[str]) -> tuple[int, str]:
    """As ``run_as``, each rank in its folder: what a relative path names is another file there."""
    os.chdir(folders[int(os.environ["RANK"])])
    agreement._APPEARING = 0.1  # seconds: a copied folder never gets the file
    return run_as(words)


def assert_refused(found: list[tuple[int, str]], *printed: str) -> None:
    """All ranks exit with 2; ``printed``: a pattern of what each prints, "" for no more than who says why."""
    assert [code for code, _ in found] == [2] * len(found), found
    for (_, said), pattern in zip(found, printed, strict=True):
        assert re.fullmatch(f"fitv2: {pattern or ELSEWHERE}", said), said


@pytest.fixture
def config_file(tiny, tmp_path):
    def write(name: str, **changes) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny(**changes).model_dump(mode="json")))
        return str(path)

    return write


def test_training_that_one_rank_is_told_to_do_otherwise(config_file, tmp_path):
    train = ["train", config_file("config")]
    found = run_ranks(3, run_as, train, [*train, "optimizer.lr=0.1"])
    told = r"the ranks were not told the same: optimizer.lr is 0.001 on rank 0 \(\S+\) and 0.1 on ranks 1-2 \(\S+\); .*"
    assert_refused(found, told, "", "")
    assert not (tmp_path / "run").exists()


def run_on_two_nodes(*words: list[str]) -> tuple[int, str]:
    """As ``run_as``, by torchrun on nodes of two ranks each."""
    os.environ |= {"LOCAL_RANK": str(int(os.environ["RANK"]) % 2), "LOCAL_WORLD_SIZE": "2"}
    return run_as(*words)


def test_where_to_look_is_told_once_a_node(config_file):
    """And not on the first, whose terminal has the sentence."""
    train = ["train", config_file("config")]
    (_, why), *others = run_ranks(4, run_on_two_nodes, train, [*train, "optimizer.lr=0.1"])
    assert "not told the same" in why
    first, second, third = (said for _, said in others)
    assert (first, third) == ("", "") and re.fullmatch(r"fitv2: rank 0 on \S+ says why this ends", second)


@pytest.mark.parametrize(
    "lacks,sentence",
    [
        ({"data__url": NOTHING}, f"there is no dataset at {NOTHING} .*"),
        ("none.yaml", "cannot read the config .*none.yaml.*: No such file or directory.*"),
        ("bad.yaml", "unknown key optimizer.lrr, did you mean optimizer.lr.*"),
    ],
    ids=str,
)
def test_training_that_one_rank_cannot_begin(config_file, tmp_path, lacks, sentence):
    """Its dataset is not mounted, or its config cannot be read, so that it fails before it has joined the others."""
    file = config_file("other", **lacks) if isinstance(lacks, dict) else str(tmp_path / lacks)
    if lacks == "bad.yaml":
        Path(file).write_text(Path(config_file("config")).read_text().replace("lr:", "lrr:"))
    found = run_ranks(3, run_as, ["train", config_file("config")], ["train", file])
    sentence = sentence if lacks != "bad.yaml" else ".*bad.yaml: " + sentence
    assert_refused(found, rf"rank 1 on \S+: {sentence}", sentence, "")


def test_a_command_line_that_one_rank_does_not_understand(config_file):
    train = ["train", config_file("config")]
    (code, said), (other, usage) = run_ranks(2, run_as, train, [*train, "--no-such-option"])
    assert (code, other) == (2, 2)
    assert re.fullmatch(r"fitv2: rank 1 on \S+: fitv2: unrecognized arguments: --no-such-option", said)
    assert "error: unrecognized arguments: --no-such-option" in usage


def test_what_no_rank_can_read_is_said_once(config_file):
    found = run_ranks(3, run_as, ["train", config_file("config", data__url=NOTHING)])
    assert_refused(found, f"there is no dataset at {NOTHING} .*", "", "")
    found = run_ranks(3, run_as, ["train", "none.yaml"])
    assert_refused(found, "cannot read the config .*none.yaml.*", "", "")


SAMPLE = ["--size", "32x32", "--images", "2", "--steps", "2"]


def test_sampling(two_step_run, tmp_path):
    """Of other settings, with another config or without the run."""
    sample = ["sample", two_step_run, *SAMPLE, "--folder", str(tmp_path / "pictures")]
    assert_refused(
        run_ranks(2, run_as, sample, [*sample[:-1], "here"]), '.* --folder is .* and "here" on rank 1 .*', ""
    )
    assert_refused(run_ranks(2, run_as, sample, [*sample, "--seed", "3"]), ".* --seed is 0 on rank 0 .*", "")
    assert_refused(
        run_ranks(2, run_as, sample, [*sample, "sampling.cfg=3"]), '.* --overrides is .*"sampling.cfg=3".*', ""
    )
    alone = [*sample[:1], str(tmp_path), *sample[2:]]
    assert_refused(run_ranks(2, run_as, sample, alone), ".* --weights is .*", "")
    assert not (tmp_path / "pictures").exists()


@pytest.fixture
def two_folders(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    return folders


def test_weights_of_other_content(two_step_run, two_folders, config_file):
    """One path, and on each node a file of its own behind it; or none."""
    first, second = (folder / "w.safetensors" for folder in two_folders)
    assert main(["checkpoint", "export", two_step_run, str(first), "--ema"]) == 0
    words = ["sample", "w.safetensors", "--config", config_file("config"), *SAMPLE]
    folders = list(map(str, two_folders))
    missing = ".*no weights file w.safetensors.*"
    assert_refused(run_ranks(2, run_in, folders, words), rf"rank 1 on \S+: {missing}", missing)
    tensors = load_file(first)
    name = min(tensors)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, second)
    told = 'the ranks were not told the same: content of w.safetensors is "[0-9a-f]{32}" on rank 0 .*'
    assert_refused(run_ranks(2, run_in, folders, words), told, "")
    save_file(load_file(first), second)
    unshared = r"samples.pictures of rank 1 \(\S+\) is not that of rank 0, .*"  # pictures would not come together
    assert_refused(run_ranks(2, run_in, folders, words), unshared, "")
    shutil.copytree(two_folders[0] / "samples.pictures", two_folders[1] / "samples.pictures")  # its request.json, too
    assert_refused(run_ranks(2, run_in, folders, words), unshared, "")
    assert [path.name for path in (two_folders[0] / "samples.pictures").iterdir()] == ["request.json"]
    words += ["--folder", str(two_folders[0] / "pictures")]
    assert [code for code, _ in run_ranks(2, run_in, folders, words)] == [0, 0]


def test_a_vae_of_other_content(two_step_run, two_folders, config_file):
    """No dataset tells whose latents they are, and rank 0 alone decodes the grid: they are compared all the same."""
    for seed, folder in enumerate(two_folders):
        save_vae(folder / "vae", seed)
    weights = str(two_folders[0] / "w.safetensors")
    assert main(["checkpoint", "export", two_step_run, weights, "--ema"]) == 0
    words = ["sample", weights, "data.url=nowhere", "sampling.vae=vae", "--config", config_file("config"), *SAMPLE[:2]]
    words += ["--steps", "1", "--columns", "1"]
    folders = list(map(str, two_folders))
    told = 'the ranks were not told the same: digest of the codec is "[0-9a-f]{64}" on rank 0 .*'
    for compare in ([], ["--compare"]):
        assert_refused(run_ranks(2, run_in, folders, [*words, *compare]), told, "")
    (two_folders[1] / "vae/config.json").unlink()
    missing = "vae holds no VAE .*give the folder of a diffusers AutoencoderKL"
    assert_refused(run_ranks(2, run_in, folders, words), rf"rank 1 on \S+: {missing}", missing)


def test_a_folder_that_the_ranks_do_not_share(two_folders, config_file):
    """A run on the disk of each node: its commits would lack every other rank's part."""
    words = ["train", config_file("config"), "run=run"]
    sentence = r"run of rank 1 \(\S+\) is not that of rank 0, whose files do not appear there: .*"
    folders = list(map(str, two_folders))
    assert_refused(run_ranks(2, run_in, folders, words), sentence, "")
    shutil.copytree(two_folders[0] / "run", two_folders[1] / "run")  # as of a node that was prepared by a copy
    assert_refused(run_ranks(2, run_in, folders, words), sentence, "")
    assert Run.open(str(two_folders[0] / "run")).log.commits() == []


def test_validation(two_step_run, dataset):
    validate = ["validate", two_step_run, f"validation.url={dataset}"]
    found = run_ranks(2, run_as, validate, [*validate[:2], f"validation.url={NOTHING}"])
    assert_refused(found, ".* --overrides is .*", "")


def test_evaluation(two_step_run, tmp_path):
    """One rank takes what the others sample from for a folder of images: it does not see the run."""
    evaluate = ["evaluate", two_step_run, "--reference", "r.npz", "--images", "8"]
    (tmp_path / "folder").mkdir()
    found = run_ranks(2, run_as, evaluate, ["evaluate", str(tmp_path / "folder"), *evaluate[2:]])
    assert_refused(found, '.* WHAT is "weights" on rank 0 .* and "images" on rank 1 .*', "")
    found = run_ranks(2, run_as, evaluate)
    assert_refused(found, "give the network that computes features of images as --network.*", "")


def test_doctor(config_file):
    found = run_ranks(2, run_as, ["doctor", config_file("config")], ["doctor", config_file("other", train__steps=7)])
    assert_refused(found, ".* train.steps is 6 on rank 0 .*", "")
