"""What `fitv2 submit` asks the cluster before it queues anything. Slurm's own rules decide; here are the sentences."""

from data_sharding.errors import UserError
from fitv2_scale.config.slurm import SlurmConfig, seconds_of
from launchers import slurm
from launchers.sbatch_options import least_time_of, may_exceed_limits, partition_of

# What sbatch writes, and the key that asked for it.
_KEYS = {
    "generic resource": "slurm.gpus says how GPUs are requested; none: not at all",
    "account": "slurm.account names the account",
    "qos": "slurm.qos names the quality of service",
    "feature": "slurm.constraint names features of nodes",
    "time limit": "slurm.walltime is the time limit",
    "node count": "--nodes is the number of nodes",
}


def check_cluster(site: SlurmConfig) -> None:
    """Raises UserError if there is no Slurm here, or if the job would wait for ever: Slurm queues a job whose time
    limit, or --time-min if that is given, is above that of its partition (unless EnforcePartLimits is set), and never
    starts it."""
    if not slurm.available():
        raise UserError(
            "sbatch is not on this machine: use a login node of the cluster, or print the script with --dry-run."
        )
    partition, (key, time) = partition_of(site), least_time_of(site)
    limit = slurm.time_limit(partition)
    if time and seconds_of(time) > limit and not may_exceed_limits(site):
        raise UserError(
            f"{key}={time} is above the limit of {_named(partition)}, {limit / 60:.0f} minutes: the job "
            "would never start. Lower it, choose another slurm.partition, or name the slurm.qos that lifts the limit."
        )


def check_script(script: str) -> None:
    """Asks Slurm whether it would accept the script. Raises SlurmError with its answer and the key that it is about."""
    try:
        slurm.check(script)
    except slurm.SlurmError as error:
        text = str(error).rstrip(".")
        about = next((hint for word, hint in _KEYS.items() if word in text.lower()), "")
        if "partition" in text.lower():
            about = f"slurm.partition names the partition; this cluster has {', '.join(slurm.partitions())}"
        raise slurm.SlurmError(f"{text} ({about})" if about else text) from error


def _named(partition: str) -> str:
    return f"partition {partition}" if partition else "the default partition"
