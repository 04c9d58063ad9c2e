"""A real Slurm for tests: munged, slurmctld and four slurmd's on loopback, each its own "node" of this machine.

Debian's packages slurmctld, slurmd, slurm-client and munge are needed (tests/run.sh installs them), and root: node
names have to resolve, so /etc/hosts gets a line for each while the cluster runs. What is left of jobs is killed at the
end. Starting takes about 2 s.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.services.daemons import Daemons
from tests.services.ports import free_port
from tests.support.waiting import PATIENCE

_HOSTS = Path("/etc/hosts")

_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
# a short cred_expire, because a requeued job waits that long before it may start again
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
TCPTimeout=2
MessageTimeout=20
BatchStartTimeout=30
KillWait=20
CompleteWait=0
OverTimeLimit=0
"""


class Slurm(Daemons):
    """``environment`` is what sbatch and its friends need to find this cluster."""

    NAME = "Slurm"
    NEEDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 8):
        super().__init__(folder)
        folder.chmod(0o755)
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self._tag = f"# {folder}"
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        self._conf = folder / "slurm.conf"
        lines = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()} CPUs={cpus} RealMemory=65536"
            for node in self.nodes
        ]
        lines.append(f"PartitionName=test Nodes={','.join(self.nodes)} Default=YES MaxTime=60 DefaultTime=10 State=UP")
        lines.append(f"PartitionName=short Nodes={','.join(self.nodes[:2])} MaxTime=2 DefaultTime=1 State=UP")
        lines.append(f"PartitionName=hidden Nodes={self.nodes[-1]} MaxTime=600 State=UP Hidden=YES")
        self._conf.write_text(_CONF.format(folder=folder, port=free_port()) + "\n".join(lines) + "\n")

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self._conf)}

    @classmethod
    def missing(cls) -> list[str]:
        return super().missing() + (["root"] if os.getuid() != 0 else [])

    def __exit__(self, *exc) -> None:
        super().__exit__(*exc)
        self._kill_jobs()
        kept = [line for line in _HOSTS.read_text().splitlines() if not line.endswith(self._tag)]
        _HOSTS.write_text("\n".join(kept) + "\n")  # in place: in a container it is a mount

    def start_node(self, node: str) -> None:
        """What jobs have started there lives on when its daemon is killed, as Slurm's steps do."""
        self._daemon(node, "slurmd", "-D", "-N", node, "-f", str(self._conf))

    def wait_for_idle(self, seconds: float = 60) -> None:
        """Until every node could take a job, which it takes a moment to do after one."""
        deadline = time.monotonic() + seconds
        while (states := self.run("sinfo", "-h", "-p", "test", "-N", "-o", "%t").split()) != ["idle"] * len(self.nodes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes are {states}; see {self.folder}")
            time.sleep(0.1)

    def _start(self) -> None:
        with _HOSTS.open("a") as hosts:
            hosts.writelines(f"127.0.0.1 {node} {self._tag}\n" for node in self.nodes)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        paths = [f"--{option}={self.folder / file}" for option, file in files.items()]
        log = f"--log-file={self.folder / 'munge.log'}"
        self._daemon("munge", "munged", "--foreground", "--force", *paths, log)
        while not (self.folder / "munge.socket").exists():
            assert self._daemons["munge"].poll() is None, (self.folder / "munge.out").read_text()
            time.sleep(0.05)
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self._conf))
        for node in self.nodes:
            self.start_node(node)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(RuntimeError, TimeoutError):  # slurmctld is not there yet
                return self.wait_for_idle(10)
            time.sleep(0.1)
        raise TimeoutError(f"Slurm does not come up; see {self.folder}")

    def _kill_jobs(self) -> None:
        """SIGKILL to every slurmstepd that logs to this cluster, and to every process of a job of it."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._is_step(process) or self._is_in_a_job(process):
                    os.kill(int(process.name), signal.SIGKILL)

    def _is_step(self, process: Path) -> bool:
        if not (process / "cmdline").read_bytes().startswith(b"slurmstepd"):
            return False
        return any(os.readlink(fd).startswith(str(self.folder)) for fd in (process / "fd").iterdir())

    def _is_in_a_job(self, process: Path) -> bool:
        environment = (process / "environ").read_bytes()
        return b"SLURM_JOB_ID=" in environment and f"SLURM_CONF={self._conf}".encode() in environment


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with Slurm.or_skip(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster, monkeypatch):
    """The cluster, all its nodes idle, and this process a login node of it."""
    cluster.wait_for_idle(PATIENCE)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.run("scancel", "--user=root", "--state=PENDING")
    cluster.run("scancel", "--user=root", "--signal=KILL", "--full")
