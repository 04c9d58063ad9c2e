"""What a user tells sbatch in other ways than by the config: SBATCH_ variables of the shell, and ``slurm.extra``.

sbatch reads its options from a job's script and from the submitting shell. A chain submits from inside its own jobs,
whose shell is another one, so what the user's shell says is written into the script once, by `fitv2 submit`.
"""

import itertools
import shlex
from collections.abc import Mapping
from pathlib import Path

from data_sharding.errors import UserError
from fitv2_scale.config.slurm import SlurmConfig
from launchers.hostlist import expand
from launchers.secret_overrides import VARIABLE

# SBATCH_ variables that stand for a key of the section slurm; the key wins.
_KEYS = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_MEM_PER_NODE": "memory",
    "SBATCH_TIMELIMIT": "walltime",
}
# Options that say the same as a key, if that is not the key's name.
_SAME = {"memory": ("--mem", "--mem-per-cpu", "--mem-per-gpu"), "walltime": ("--time",)}
# Others, with their option (see man sbatch, INPUT ENVIRONMENT VARIABLES).
_OPTIONS = {
    "SBATCH_ACCTG_FREQ": "--acctg-freq",
    "SBATCH_CORE_SPEC": "--core-spec",
    "SBATCH_DELAY_BOOT": "--delay-boot",
    "SBATCH_DISTRIBUTION": "--distribution",
    "SBATCH_EXPORT": "--export",
    "SBATCH_GRES_FLAGS": "--gres-flags",
    "SBATCH_HINT": "--hint",
    "SBATCH_NETWORK": "--network",
    "SBATCH_PROFILE": "--profile",
    "SBATCH_RESERVATION": "--reservation",
    "SBATCH_SEGMENT_SIZE": "--segment",
    "SBATCH_THREADS_PER_CORE": "--threads-per-core",
    "SBATCH_WCKEY": "--wckey",
}
_SHORT = {
    "-a": "--array",
    "-d": "--dependency",
    "-J": "--job-name",
    "-M": "--clusters",
    "-N": "--nodes",
    "-A": "--account",
    "-C": "--constraint",
    "-D": "--chdir",
    "-w": "--nodelist",
    "-x": "--exclude",
}
_SHORT |= {"-n": "--ntasks", "-p": "--partition", "-q": "--qos", "-t": "--time", "-W": "--wait"}

# The long options of sbatch 22 to 25, of which it takes any beginning that only one has.
_LONG = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment consolidate-segments constraint
container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot
dependency distribution error exclude exclusive export export-file extra extra-node-info get-user-env gid gpu-bind
gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags help hint hold ignore-pbs input job-name
kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice
no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket
oom-kill-step open-mode output overcommit oversubscribe parsable partition power prefer priority profile propagate qos
quiet reboot requeue reservation resv-ports segment signal sockets-per-node spread-job spread-segments stepmgr switches
test-only thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid umask usage use-min-nodes verbose
version wait wait-all-nodes wckey wrap
"""

# What an option in slurm.extra would break, and what to use instead.
_ALWAYS_REFUSED = {
    "--array": "its tasks would all do the same work; give --nodes instead",
    "--clusters": "only sbatch would see it; export SLURM_CLUSTERS instead",
    "--nodes": "give --nodes to `fitv2 submit`",
    "--ntasks": "set slurm.tasks_per_node",
    "--ntasks-per-node": "set slurm.tasks_per_node",
    "--parsable": "`fitv2 submit` sets it",
    "--test-only": "use `fitv2 submit --dry-run`",
    "--wait": "`fitv2 status --watch` waits",
    "--wrap": "use `fitv2 submit -- COMMAND`",
}
_REFUSED_IN_CHAINS = {
    "--array": "a chain queues one job after the other by itself, until the run is done; remove it",
    "--dependency": "each job of a chain waits for the one before by a dependency of its own; remove it",
    "--job-name": "a chain finds its jobs by their name; remove it",
    "--no-requeue": "each job does that itself, once its successor is queued; remove it",
    "--open-mode": "a requeued job appends to its output; remove it",
    "--signal": "set slurm.signal_seconds",
}


def with_shell_options(site: SlurmConfig, environment: Mapping[str, str]) -> tuple[SlurmConfig, list[str]]:
    """``site`` with what the SBATCH_ variables of ``environment`` say and the config leaves open, and a sentence for
    each variable: that it is used, or that it is not."""
    changes, extra, said = {}, list(site.extra), []
    present = _parse(site.extra)
    for name, value in sorted(environment.items()):
        if not name.startswith("SBATCH_"):
            continue
        key, option = _KEYS.get(name), _OPTIONS.get(name)
        if key and _is_open(site, key) and present.keys().isdisjoint(_SAME.get(key, (f"--{key}",))):
            changes[key] = value
        elif option and option not in present:
            extra.append(f"{option}={shlex.quote(value)}")
        else:
            said.append(f"{name}={value} of this shell is not used: {_instead(name, key)}")
            continue
        said.append(f"{name}={value} of this shell is used")
    return site.model_copy(update=changes | {"extra": extra}), said


def _is_open(site: SlurmConfig, key: str) -> bool:
    return "walltime" not in site.model_fields_set if key == "walltime" else not getattr(site, key)


def _instead(name: str, key: str | None) -> str:
    if key or name in _OPTIONS:
        return "the config sets it"
    return "give it as a key of the section slurm, or in slurm.extra"


def refuse_conflicts(extra: list[str], chain: bool) -> None:
    """Raises UserError if an option in ``slurm.extra`` breaks what `fitv2 submit` does, a ``chain`` or one job."""
    for option in _parse(extra):
        if why := (_REFUSED_IN_CHAINS if chain else {}).get(option) or _ALWAYS_REFUSED.get(option):
            raise UserError(f"slurm.extra has {option}: {why}.")


def refuse_lost_secrets(extra: list[str], secret: list[str]) -> None:
    """Raises UserError if the job would not get the overrides in ``secret``, which travel in its environment."""
    exported = _parse(extra).get("--export")
    if secret and exported is not None and not {"ALL", VARIABLE} & set(exported.split(",")):
        keys = ", ".join(override.partition("=")[0] for override in secret)
        raise UserError(
            f"slurm.extra has --export={exported}, but {keys} contains a secret, which travels in the job's "
            f"environment: add {VARIABLE} to the list, as in --export={VARIABLE}, or remove the option."
        )


def partition_of(site: SlurmConfig) -> str:
    """The partition or partitions that are asked for, as in "gpu" or "a,b"; "" means the cluster's default."""
    return _parse(site.extra).get("--partition", site.partition)


def walltime_of(site: SlurmConfig) -> str:
    """The time limit that is asked for."""
    return _parse(site.extra).get("--time", site.walltime)


def changes_folder(extra: list[str]) -> bool:
    """Whether jobs begin in another folder than the one that they are submitted from."""
    return "--chdir" in _parse(extra)


def least_time_of(site: SlurmConfig) -> tuple[str, str]:
    """The shortest time limit that would do, after the key or option that asks for it; "" means the partition's own."""
    least = _parse(site.extra).get("--time-min")
    return ("--time-min", least) if least else ("slurm.walltime", walltime_of(site))


def may_exceed_limits(site: SlurmConfig) -> bool:
    """Whether a quality of service is named: it may lift a partition's limits."""
    return bool(_parse(site.extra).get("--qos", site.qos))


def script_options(script: str) -> dict[str, str]:
    """The options in the #SBATCH lines of a script, by their long names. sbatch reads them up to the first command."""
    lines = itertools.takewhile(lambda line: not line or line.startswith("#"), script.splitlines())
    return _parse([line.removeprefix("#SBATCH") for line in lines if line.startswith("#SBATCH")])


def excluded_nodes(options: Mapping[str, str]) -> list[str]:
    """The nodes that ``options`` exclude, as in --exclude=n[1-2],n7. Raises UserError if that names a file that cannot
    be read: sbatch takes a name with a slash for one."""
    names = options.get("--exclude", "")
    if "/" in names:
        try:
            names = ",".join(Path(names).read_text().split())
        except OSError as error:
            raise UserError(f"slurm.extra has --exclude={names}, which cannot be read: {error.strerror}.") from error
    return expand(names)


def _parse(extra: list[str]) -> dict[str, str]:
    """The options in ``slurm.extra`` by their long names. Of one that is given twice, sbatch takes the last."""
    options: dict[str, str] = {}
    last = None
    for word in (word for line in extra for word in _words(line)):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            last = _long(name)
            options[last] = value
            last = None if equals else last
        elif word.startswith("-") and len(word) > 1:
            last, value = _SHORT.get(word[:2], word[:2]), word[2:].removeprefix("=")
            options[last] = value
            last = None if value else last
        elif last:
            options[last], last = word, None
    return options


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise UserError(f"slurm.extra has {line.strip()}, which cannot be read ({error}): close the quote.") from error


def _long(name: str) -> str:
    """The option that ``name`` is or abbreviates, as --arr does --array; ``name`` itself if that is not clear."""
    known = _LONG.split()
    meant = [option for option in known if option.startswith(name[2:])]
    return f"--{meant[0]}" if len(meant) == 1 and name[2:] not in known else name
