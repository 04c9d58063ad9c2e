"""A real Slurm for tests: munged, slurmctld and four slurmd's on loopback, each its own "node" of this machine.

Debian's packages slurmctld, slurmd, slurm-client and munge are needed (tests/run.sh installs them), and root: node
names have to resolve, so /etc/hosts gets a line for each while the cluster runs. Everything else lies in one folder.
The daemons are children that the kernel kills with their parent; what is left of jobs is killed at the end. Starting
takes about 2 s.
"""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.services.ports import free_port

NEEDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv")
_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
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


def missing() -> list[str]:
    """What a cluster would need and this machine lacks."""
    absent = [name for name in NEEDS if shutil.which(name, path=_PATH) is None]
    return absent + (["root"] if os.getuid() != 0 else [])


class Slurm:
    """A context manager. ``environment`` is what sbatch and its friends need to find this cluster."""

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 8):
        folder.chmod(0o755)
        self.folder, self.nodes = folder, [f"node{i + 1}" for i in range(nodes)]
        self._daemons: dict[str, subprocess.Popen] = {}
        self._tag = f"# {folder}"
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        self._conf = folder / "slurm.conf"
        lines = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()} CPUs={cpus} RealMemory=65536"
            for node in self.nodes
        ]
        lines.append(f"PartitionName=test Nodes={','.join(self.nodes)} Default=YES MaxTime=60 DefaultTime=10 State=UP")
        self._conf.write_text(_CONF.format(folder=folder, port=free_port()) + "\n".join(lines) + "\n")

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self._conf)}

    def __enter__(self) -> "Slurm":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc) -> None:
        for name in reversed(list(self._daemons)):
            self.kill(name)
        self._kill_jobs()
        kept = [line for line in _HOSTS.read_text().splitlines() if not line.endswith(self._tag)]
        _HOSTS.write_text("\n".join(kept) + "\n")  # in place: in a container it is a mount

    def run(self, *command: str, timeout: float = 60) -> str:
        """Runs one of Slurm's programs; returns its output."""
        environment = os.environ | self.environment | {"PATH": _PATH}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node, "-f", str(self._conf))

    def kill(self, name: str) -> None:
        """SIGKILL to a daemon, by its node's name for a slurmd. What it started lives on, as Slurm's steps do."""
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    def wait_for_idle(self, seconds: float = 60) -> None:
        """Until every node could take a job, which it takes a moment to do after one."""
        deadline = time.monotonic() + seconds
        while (states := self.run("sinfo", "-h", "-N", "-o", "%t").split()) != ["idle"] * len(self.nodes):
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

    def _daemon(self, name: str, program: str, *arguments: str) -> None:
        command = ("setpriv", "--pdeathsig", "KILL", program, *arguments)
        with open(self.folder / f"{name}.out", "ab") as output:
            environment = os.environ | {"PATH": _PATH}
            self._daemons[name] = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

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
