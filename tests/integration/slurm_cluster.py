"""A real SLURM of two nodes on this machine, in a directory of its own: munged, slurmctld and two slurmd.

The machine's own munge and SLURM, if there are any, are neither used nor touched: key, socket, configuration,
ports, spool and pid files are all in the directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from siren_megatron.rollout.server import choose_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIGURATION = """
ClusterName=siren{number}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
ReturnToService=2
KillWait=2
SlurmctldTimeout=60
SlurmdTimeout=60
InactiveLimit=0
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs={cpus} RealMemory={memory}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs={cpus} RealMemory={memory}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_reason() -> str | None:
    """Why no cluster can be started here; None when one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"SLURM is not installed here (no {', '.join(absent)}): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "a SLURM cluster of one's own needs root"
    return None


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # Debian's daemons are there


class Cluster:
    """Two nodes, n1 and n2; make one with `running`.

    Attributes:
        directory: logs, spool and pid files.
        environment: what SLURM's commands need to speak to it.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "PATH": _path(),
            "SLURM_CONF": str(directory / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command that speaks to this cluster."""
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done

    def job(self, number: int) -> dict[str, str]:
        """`scontrol show job` as a dictionary."""
        text = self.run("scontrol", "show", "job", "-o", str(number)).stdout
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def logs(self) -> str:
        """The last lines of every daemon."""
        parts = []
        for path in sorted(self.directory.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-15:]
            parts.append(f"\n--- {path.name}\n" + "\n".join(lines))
        return "".join(parts)

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        for name in ("state", "spool-n1", "spool-n2"):
            (self.directory / name).mkdir()
        key = self.directory / "munge.key"
        key.touch(mode=0o400)
        key.chmod(0o600)
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = [choose_port("127.0.0.1") for _ in range(3)]
        (self.directory / "slurm.conf").write_text(
            CONFIGURATION.format(
                number=os.getpid(),
                host=socket.gethostname().split(".")[0],
                directory=self.directory,
                ctld_port=ports[0],
                port1=ports[1],
                port2=ports[2],
                cpus=os.cpu_count(),
                memory=int(psutil.virtual_memory().total / 2**20 * 0.9),
            )
        )
        at = self.directory
        self._daemon(
            "munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}",
            f"--socket={at}/munge.socket", f"--pid-file={at}/munged.pid", f"--log-file={at}/munged.log",
            f"--seed-file={at}/munged.seed",
        )  # fmt: skip
        self._wait(lambda: (at / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-f", str(at / "slurm.conf"))
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node, "-f", str(at / "slurm.conf"))
        self._wait(self.is_idle, "SLURM's nodes")

    def _daemon(self, *command: str) -> None:
        log = open(self.directory / f"daemon-{len(self._daemons)}-{command[0]}.log", "wb")  # noqa: SIM115
        with log:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def is_idle(self) -> bool:
        """Whether both nodes are up and run nothing."""
        done = self.run("sinfo", "-h", "-N", "-o", "%N %t", check=False)
        return done.stdout.split() == ["n1", "idle", "n2", "idle"]

    def _wait(self, condition, what: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not ready within {timeout:.0f} s{self.logs()}"
            ended = [d.args[0] for d in self._daemons if d.poll() is not None]
            assert not ended, f"{ended} ended{self.logs()}"
            time.sleep(0.2)

    def stop(self) -> None:
        """Cancel the jobs, then end every daemon by its own id, with the steps that it has left."""
        if (self.directory / "munge.socket").exists():
            self.run("scancel", "--full", "--state=RUNNING", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
        # slurmd's children (slurmstepd) leave its session: they are found while slurmd still lives.
        steps = [p for d in self._daemons for p in _descendants(d.pid)]
        for daemon in reversed(self._daemons):
            with contextlib.suppress(ProcessLookupError):
                daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for step in steps:
            with contextlib.suppress(psutil.NoSuchProcess):
                step.kill()

    @property
    def processes(self) -> list[psutil.Process]:
        """The daemons that live."""
        return [psutil.Process(d.pid) for d in self._daemons if d.poll() is None]


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Cluster]:
    """A cluster in `directory` (empty, on a short path: munge's socket has to fit into 107 characters)."""
    cluster = Cluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
