"""What sbatch hears besides the config: SBATCH_ variables of the shell, and slurm.extra."""

import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.slurm import SlurmConfig
from launchers.batch_script import train_script
from launchers.sbatch_options import (
    partition_of,
    refuse_conflicts,
    refuse_lost_secrets,
    script_options,
    walltime_of,
    with_shell_options,
)
from launchers.submit import submit, submit_command


def directives(site: SlurmConfig, home: str = "/h") -> list[str]:
    script = train_script(site, "n", 1, "r", home, 0, 300)
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_the_shell_fills_in_what_the_config_leaves_open():
    shell = {"SBATCH_ACCOUNT": "mine", "SBATCH_PARTITION": "long", "SBATCH_RESERVATION": "r1", "PATH": "/bin"}
    site, said = with_shell_options(SlurmConfig(gpus="none"), shell | {"SBATCH_TIMELIMIT": "30"})
    lines = directives(site)
    assert {"--account=mine", "--partition=long", "--reservation=r1", "--time=30"} <= set(lines)
    assert len(said) == 4 and all(text.endswith("of this shell is used") for text in said)


def test_the_config_wins_over_the_shell_and_both_are_told():
    shell = {"SBATCH_ACCOUNT": "mine", "SBATCH_TIMELIMIT": "30", "SBATCH_RESERVATION": "r1", "SBATCH_WAIT": "1"}
    mine = SlurmConfig(gpus="none", account="ours", walltime="60", extra=["--reservation=r2"])
    site, said = with_shell_options(mine, shell)
    lines = directives(site)
    assert "--account=ours" in lines and "--time=60" in lines and "--reservation=r2" in lines
    assert not {"--account=mine", "--time=30", "--reservation=r1"} & set(lines)
    assert [text.split(" of this shell is not used: ")[0] for text in said] == [
        f"{k}={v}" for k, v in sorted(shell.items())
    ]


def test_options_are_found_in_each_way_of_writing_them():
    for extra in (["--partition=a,b"], ["--partition a,b"], ["-pa,b"], ["-p", "a,b"], ["--mail-type=END -p a,b"]):
        assert partition_of(SlurmConfig(partition="x", extra=extra)) == "a,b", extra
    assert partition_of(SlurmConfig(partition="x", extra=["--exclusive"])) == "x"
    for extra in (["-t 5"], ["--time=5 stray"], ["--time 5 stray"]):
        assert walltime_of(SlurmConfig(walltime="60", extra=extra)) == "5", extra
    assert walltime_of(SlurmConfig(walltime="7")) == "7"


@pytest.mark.parametrize("option", ["--array=1-3%1", "--array 1-3", "-a1-3", "--dependency=afterok:7", "-J mine"])
def test_what_breaks_a_chain_is_refused(option):
    name = {"-a1": "--array", "-J ": "--job-name"}.get(option[:3], option.split("=")[0].split()[0])
    with pytest.raises(UserError, match=f"slurm.extra has {name}: "):
        refuse_conflicts([option], chain=True)
    refuse_conflicts(["--mail-type=END", "--reservation=r1", "--comment='-a'"], chain=True)
    refuse_conflicts(["--dependency=afterok:7"], chain=False)  # one job may wait for another


@pytest.mark.parametrize(
    "extra, carried",
    [
        ([], True),
        (["--export=ALL"], True),
        (["--export=ALL,X=1"], True),
        (["--export=FITV2_PRIVATE"], True),
        (["--export=NONE"], False),
        (["--export", "NONE"], False),
        (["--export=PATH,HOME"], False),
    ],
)
def test_a_secret_that_would_not_reach_the_job_is_refused(extra, carried):
    refuse_lost_secrets(extra, [])
    if carried:
        return refuse_lost_secrets(extra, ['tracking.uri="http://me:s3cret@host"'])
    with pytest.raises(UserError, match="but tracking.uri contains a secret") as refused:
        refuse_lost_secrets(extra, ['tracking.uri="http://me:s3cret@host"'])
    assert "s3cret" not in str(refused.value)


def test_a_percent_sign_in_a_path_is_not_filled_in_by_slurm():
    script = train_script(SlurmConfig(), "n", 1, "r", "/runs/50%j a", 0, 300)
    assert '#SBATCH --output="/runs/50%%j a/job-%j.out"' in script
    assert "--output='/runs/50%%j a/rank-%t.log'" in script and "home='/runs/50%j a'" in script
    with pytest.raises(UserError, match="choose another folder"):
        train_script(SlurmConfig(), "n", 1, "r", 'a"b', 0, 300)


def test_ranks_get_the_script_s_variables_whatever_the_job_was_given():
    """With --export=NONE, srun would drop PYTHONPATH: ranks would run other code than the copy."""
    script = train_script(SlurmConfig(extra=["--export=NONE"]), "n", 1, "r", "/h", 0, 300)
    command = script[script.index("  srun ") : script.index("slurm_task train")]
    assert "--export=ALL" in command


SITE = {"gpus": "none", "tasks_per_node": 1, "walltime": "60"}


def test_a_submission_asks_the_shell_who_pays_and_where_it_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("SBATCH_PARTITION", "long,test")
    site = SITE | {"folder": str(tmp_path)}
    chain = submit(tiny(slurm=site), "1", dry_run=True)
    one = submit_command(SlurmConfig(**site), "1", ["plan", "x"], dry_run=True)
    for done in (chain, one):
        assert {"#SBATCH --account=mine", "#SBATCH --partition=long,test"} <= set(done.script.splitlines())
        assert done.shell == [
            "SBATCH_ACCOUNT=mine of this shell is used",
            "SBATCH_PARTITION=long,test of this shell is used",
        ]


def test_a_submission_that_would_break_is_refused(tiny, tmp_path, monkeypatch):
    site = SITE | {"folder": str(tmp_path)}
    array = site | {"extra": ["--array=1-3%1"]}
    with pytest.raises(UserError, match="slurm.extra has --array: a chain queues one job after the other"):
        submit(tiny(slurm=array), "1", dry_run=True)
    with pytest.raises(UserError, match="slurm.extra has --array: its tasks would all do the same work"):
        submit_command(SlurmConfig(**array), "1", ["plan", "x"], dry_run=True)
    bare = tiny(slurm=site | {"extra": ["--export=NONE"]}, tracking__uri="http://me:s3cret@host")
    with pytest.raises(UserError, match="but tracking.uri contains a secret"):
        submit(bare, "1", dry_run=True)


@pytest.mark.parametrize(
    "short,option,value",
    [
        ("--arr=1-2", "--array", "1-2"),
        ("--depend afterok:7", "--dependency", "afterok:7"),
        ("--sig=B:USR1@9", "--signal", "B:USR1@9"),
        ("--job=mine", "--job-name", "mine"),
        ("--nodes=4", "--nodes", "4"),
        ("--time=5", "--time", "5"),
        ("--time-=5", "--time-min", "5"),
        ("--exclud=n1", "--exclude", "n1"),
        ("--exc=n1", "--exc", "n1"),  # several begin so, and sbatch refuses it
        ("--clus=x", "--clus", "x"),
        ("--nosuch=x", "--nosuch", "x"),
    ],
)
def test_an_option_may_be_abbreviated_as_sbatch_takes_it(short, option, value):
    assert script_options(f"#!/bin/sh\n#SBATCH {short}\n") == {option: value}
    if option in ("--array", "--dependency", "--signal", "--job-name", "--nodes"):
        with pytest.raises(UserError, match=f"slurm.extra has {option}: "):
            refuse_conflicts([short], chain=True)
    else:
        refuse_conflicts([short], chain=True)


@pytest.mark.parametrize("extra", ["--comment='my run", '--comment="my run', "--comment=x\\"])
def test_an_unclosed_quote_is_a_sentence(tiny, tmp_path, extra):
    site = SITE | {"folder": str(tmp_path), "extra": [extra]}
    with pytest.raises(UserError, match="slurm.extra has --comment=.*: close the quote"):
        submit(tiny(slurm=site), "1", dry_run=True)


@pytest.mark.parametrize(
    "name,value,extra,line",
    [
        ("SBATCH_MEM_PER_NODE", "99G", "--mem=5G", "--mem=99G"),
        ("SBATCH_MEM_PER_NODE", "99G", "--mem-per-cpu=5G", "--mem=99G"),
        ("SBATCH_TIMELIMIT", "30", "-t 60", "--time=30"),
        ("SBATCH_CONSTRAINT", "fast", "-C slow", '--constraint="fast"'),
        ("SBATCH_WCKEY", "a b", "--wckey=c", "--wckey='a b'"),
    ],
)
def test_the_shell_says_nothing_that_slurm_extra_says(name, value, extra, line):
    site, (said,) = with_shell_options(SlurmConfig(gpus="none", extra=[extra]), {name: value})
    assert said == f"{name}={value} of this shell is not used: the config sets it"
    assert line not in directives(site) and extra in directives(site)
    site, (said,) = with_shell_options(SlurmConfig(gpus="none"), {name: value})
    assert said == f"{name}={value} of this shell is used" and line in directives(site)
