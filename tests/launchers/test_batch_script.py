"""What `fitv2 submit` renders and takes along, without Slurm: scripts that bash reads, and what a rank is told."""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_sharding.errors import UserError
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import load_config
from fitv2_scale.config.slurm import NCCL_PROFILES, SlurmConfig
from launchers.batch_script import train_script
from launchers.rank import cache_environment, rank_environment
from launchers.secret_overrides import to_environment
from launchers.submit import sweep, write_home
from tests.support.repository import ROOT

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


def test_what_a_rank_is_told():
    told = rank_environment(TASK)
    port = told.pop("MASTER_PORT")
    assert told == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "n03",
        "OMP_NUM_THREADS": "1",
        "FITV2_NODES": "n03:8,n04:8",
    }
    others = [TASK | {"SLURM_RESTART_COUNT": "1"}, TASK | {"SLURM_JOB_ID": "4712"}]
    ports = [port, *(rank_environment(task)["MASTER_PORT"] for task in others)]
    assert len(set(ports)) == 3 and all(10_000 <= int(p) < 30_000 for p in ports)
    assert rank_environment(TASK | {"CUDA_VISIBLE_DEVICES": "5"})["LOCAL_RANK"] == "0"
    assert rank_environment(TASK | {"CUDA_VISIBLE_DEVICES": "0,1,2"})["LOCAL_RANK"] == "1"
    assert rank_environment(TASK | {"SLURM_CPUS_PER_TASK": "12"})["OMP_NUM_THREADS"] == "12"


@pytest.mark.parametrize("module", ["fitv2_scale.cli.slurm_task", "launchers.rank"])
def test_a_task_runs_its_command_with_the_environment_of_its_rank(module, tmp_path):
    """Also as the templates of earlier versions start it."""
    environment = os.environ | TASK | {"SLURMD_NODENAME": "n04", "TMPDIR": str(tmp_path)}
    python = [sys.executable, "-m", module]
    command = [*python, "config", "show", "configs/demo.yaml", "train.steps=123"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("== job 4711 task 9 on n04\n"), done.stderr
    assert re.search(r"^train\.steps = 123 ", done.stdout, re.M)
    done = subprocess.run([*python, "status", str(tmp_path)], cwd=ROOT, env=environment)
    assert done.returncode == 2


HEARD = """
import json, signal, sys
import fitv2_scale.cli.__main__ as cli
from fitv2_scale.cli.slurm_task import main
cli.run_command = lambda words: print(json.dumps([words, sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))])) or 0
sys.exit(main())
"""


@pytest.mark.parametrize("command, trains", [("train", True), ("validate", False)])
def test_a_task_that_trains_holds_signals_back_and_hears_the_secrets(command, trains, tmp_path):
    words, secret = [command, "configs/demo.yaml"], ["slurm.doctor=false", "tracking.uri=https://me:secret@host"]
    environment = os.environ | TASK | {"TMPDIR": str(tmp_path)} | to_environment(secret)
    task = [sys.executable, "-c", HEARD, *words]
    done = subprocess.run(task, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    heard, blocked = json.loads(done.stdout.splitlines()[-1])
    assert heard == words + secret * trains
    asks_to_save = ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
    assert sorted(signal.Signals(number).name for number in blocked) == asks_to_save * trains


def test_caches_are_private(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    caches = cache_environment({})
    folder = tmp_path / f"fitv2-{os.getuid()}"
    assert caches["TRITON_CACHE_DIR"] == str(folder / "triton") and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "TRITON_CACHE_DIR" not in cache_environment({"TRITON_CACHE_DIR": "/elsewhere"})


@pytest.mark.parametrize("gpus", ["gres", "typed", "gpus-per-node", "none"])
@pytest.mark.parametrize("nccl", list(NCCL_PROFILES))
def test_scripts_are_bash_and_say_what_was_asked(gpus, nccl, tmp_path):
    site = SlurmConfig(
        partition="gpu",
        account="me",
        constraint="a&b",
        walltime="1-00:00:00",
        gpus=gpus,
        gpu_type="h100",
        cpus_per_task=12,
        memory="0",
        exclusive=True,
        nccl=nccl,
        extra=["--mail-type=END"],
        setup=["module load 'a b'"],
        wrap="apptainer exec --nv x.sif",
        python="python3",
    )
    script = train_script(site, "fitv2-x", 4, "/runs/x", tmp_path / "with space", 3, 300)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    asked = {"gres": "--gres=gpu:8", "typed": "--gres=gpu:h100:8", "gpus-per-node": "--gpus-per-node=8"}
    assert [d for d in directives if "gpu" in d and "partition" not in d] == ([asked[gpus]] if gpus in asked else [])
    for option in ("--nodes=4", "--ntasks-per-node=8", "--cpus-per-task=12", "--partition=gpu", "--account=me"):
        assert option in directives
    for option in ("--mem=0", "--time=1-00:00:00", "--exclusive", "--mail-type=END", '--constraint="a&b"'):
        assert option in directives
    for option in ("--dependency=singleton", "--requeue", "--open-mode=append", "--signal=B:USR1@300"):
        assert option in directives
    assert f"python={shlex.quote(sys.executable)}\n" in script  # the batch script is not in the container
    assert "@" not in script.replace("USR1@300", "").replace("$@", "")
    assert '"$home/config.yaml" 2>' in script
    forked = train_script(site, "fitv2-x", 4, "/runs/x", tmp_path, 3, 300, fork_from="/runs/a b@7")
    assert """"$home/config.yaml" --fork-from '/runs/a b@7' 2>""" in forked
    assert re.search(r"module load 'a b'\n", script) and "apptainer exec --nv x.sif python3 -u -m" in script
    assert all(f"export {key}=" in script for key in NCCL_PROFILES[nccl])


def test_the_readme_shows_the_script_as_it_is():
    site = SlurmConfig(partition="gpu", cpus_per_task=12, setup=["module load cuda/12.8"], nccl="infiniband")
    home = Path("/runs/first/jobs/1a2b3c4d")
    script = train_script(site, "fitv2-first-new", 4, "/runs/first", home, 0, 300)
    shown = script.replace(shlex.quote(sys.executable), "/home/me/fitv2/.venv/bin/python")
    assert f"```bash\n{shown}```" in (ROOT / "launchers" / "README.md").read_text()


def test_a_template_of_ones_own(tmp_path):
    template = tmp_path / "mine.sh"
    template.write_text("#!/bin/bash\n@DIRECTIVES@\necho @HOME@ user@host.org\n")
    assert train_script(SlurmConfig(template=str(template)), "n", 1, "r", tmp_path, 0, 300).endswith(
        f"{tmp_path} user@host.org\n"
    )
    template.write_text("@NONE@")
    with pytest.raises(UserError, match="has @NONE@, which is not one of"):
        train_script(SlurmConfig(template=str(template)), "n", 1, "r", tmp_path, 0, 300)


@pytest.mark.parametrize(
    "site",
    [
        {"setup": ["export API_TOKEN=hunter2"]},
        {"extra": ["--export=WANDB_API_KEY=hunter2"]},
        {"wrap": "env PASSWORD=hunter2"},
        {"on_event": "curl https://me:hunter2@chat.example"},
    ],
)
def test_secrets_in_a_script_are_refused(site, tmp_path):
    with pytest.raises(UserError, match=f"slurm.{next(iter(site))} contains what looks like a secret"):
        train_script(SlurmConfig(**site), "n", 1, "r", tmp_path, 0, 300)


@pytest.fixture
def config_file(tiny, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny().model_dump(mode="json")))
    return str(path)


def test_a_sweep_is_one_run_for_each_combination(config_file, tmp_path):
    (tmp_path / "small.yaml").write_text(
        yaml.safe_dump(
            yaml.safe_load(Path(config_file).read_text()) | {"model": {"depth": 1, "hidden": 16, "heads": 2}}
        )
    )
    made = list(sweep(config_file, ["run=/runs/s", "model.classes=5"], ["model=config,small", "optimizer.lr=0.1,0.2"]))
    configs = [load_config(config_file, overrides) for overrides in made]
    assert [(c.run, c.model.hidden, c.model.classes, c.optimizer.lr) for c in configs] == [
        ("/runs/s/model-config_lr-0.1", 32, 5, 0.1),
        ("/runs/s/model-config_lr-0.2", 32, 5, 0.2),
        ("/runs/s/model-small_lr-0.1", 16, 5, 0.1),
        ("/runs/s/model-small_lr-0.2", 16, 5, 0.2),
    ]
    (both,) = sweep(config_file, ["run=/r", "model={depth: 3}"], ["model=small", "model.classes=4", "seed=1"])
    config = load_config(config_file, both)
    assert (config.model.hidden, config.model.depth, config.model.classes, config.seed) == (16, 3, 4, 1)
    with pytest.raises(UserError, match="seed is given twice, by 'seed=3' and by 'seed=1'"):
        list(sweep(config_file, ["run=/runs/s", "seed=3"], ["seed=1,2"]))
    with pytest.raises(UserError, match="run is given twice"):
        list(sweep(config_file, ["run=/runs/s", "run=/runs/t"], ["seed=1,2"]))
    with pytest.raises(UserError, match="give it as key=a,b,c"):
        list(sweep(config_file, ["run=/runs/s"], ["seed"]))
    with pytest.raises(UserError, match="needs run=FOLDER"):
        list(sweep(config_file, [], ["seed=1,2"]))


def test_what_a_job_takes_with_it_runs_and_holds_no_secret(tiny, tmp_path):
    config = tiny(tracking__uri="https://me:hunter2@mlflow.example/x")
    private = write_home(tmp_path / "home", config, config.run)
    assert private == ['tracking.uri="https://me:hunter2@mlflow.example/x"']
    for file in (tmp_path / "home").rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file
    assert load_config(str(tmp_path / "home/config.yaml"), private) == config
    there = "import fitv2_scale, launchers.chain; print(fitv2_scale.__file__); "
    there += "from fitv2_scale.evaluate.suites import load_suite; print(load_suite('ood').name)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", there],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "home/code")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "home/code/fitv2_scale/__init__.py"), "ood"]
    assert (tmp_path / "home/code/launchers/train.sh.in").is_file()


@pytest.fixture
def without_slurm(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_without_slurm(without_slurm, config_file, tmp_path, capfd):
    assert main(["submit", config_file, "--nodes", "2"]) == 2
    assert "sbatch is not on this machine" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["submit", config_file, "--nodes", "2", "slurm.tasks_per_node=2", "--dry-run"]) == 0
    shown, advice = capfd.readouterr()
    assert "#SBATCH --nodes=2" in shown and "#SBATCH --ntasks-per-node=2" in shown
    assert main(["plan", config_file, "--nodes", "2", "--gpus-per-node", "2", "--json"]) == 0
    chosen = json.loads(capfd.readouterr().out)["nodes"]["why"]
    assert advice.startswith(f"fitv2: fitv2-run-new: {chosen} (from published figures") and advice.count("\n") == 1
    assert not (tmp_path / "run").exists()
    command = ["submit", "--nodes", "2", "--dry-run", "slurm.gpus=none", "--"]
    assert main([*command, "shard", "write", "a b", "c", "--max-tokens", "64"]) == 0
    assert "-m fitv2_scale.cli.slurm_task shard write 'a b' c --max-tokens 64\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    "words,said",
    [
        (["optimizer.lrr=1"], "unknown key optimizer.lrr, did you mean optimizer.lr?"),
        (["slurm.partion=x"], "unknown key slurm.partion, did you mean slurm.partition?"),
        (["data.url=/no/such/set"], "there is no dataset at /no/such/set"),
        (["run=''"], "give the run's folder as run=FOLDER"),
        (["layout.replicate=3"], "layout.replicate is 3, which does not divide the 2 processes"),
        (
            ["slurm.walltime=5"],
            "slurm.walltime=5 leaves no time to train: Slurm asks for a save 300 s before the limit",
        ),
        (["slurm.gpus=typed"], "slurm.gpus=typed needs slurm.gpu_type"),
        (["--nodes", "none"], "--nodes none: give a number"),
        (["slurm.setup=[export PASSWORD=x]"], "slurm.setup contains what looks like a secret"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_anything_is_queued(words, said, config_file, tmp_path, capfd):
    assert main(["submit", config_file, "--nodes", "2", "--dry-run", "slurm.tasks_per_node=1", *words]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fitv2: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "run").exists()


def test_every_key_of_the_section_is_explained(config_file, capsys):
    assert main(["config", "show", config_file, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    for key in SlurmConfig.model_fields:
        assert shown[f"slurm.{key}"]["meaning"]


def test_a_job_without_its_secret_trains_nothing(tiny, tmp_path):
    config = tiny(tracking__uri="https://me:hunter2@mlflow.example/x")
    write_home(tmp_path / "home", config, config.run)
    task = [sys.executable, "-m", "fitv2_scale.cli.slurm_task", "train", str(tmp_path / "home/config.yaml")]
    env = os.environ | TASK | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        task, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )  # else it waits for ranks
    assert done.returncode == 2 and "tracking.uri is [redacted] in this job" in done.stderr, done.stderr
    assert not Path(config.run).exists()
