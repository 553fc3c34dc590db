"""A SLURM of several nodes on this host: munged, slurmctld and a slurmd for each node, on loopback.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge. Own folder, key, socket and ports: a SLURM or
munge of the system is not touched. No systemd and no cgroups.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")

CONF = """
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire: how long a requeued job waits
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
KillWait=3
InactiveLimit=0
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""
NODE = "NodeName=node{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN\n"


def why_not() -> str:
    """Why no toy cluster can run here; "" when it can."""
    missing = [name for name in (*DAEMONS, "sbatch") if _path(name) is None]
    if missing:
        return f"no {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "needs root"


class ToySlurm:
    """Up between __enter__ and __exit__. `environ` makes the client commands talk to it."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder, self.num_nodes = folder, num_nodes
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> ToySlurm:
        self._configure()
        key, conf = self.folder / "munge/key", self.folder / "slurm.conf"
        munge = ["--key-file", key, "--socket", key.parent / "socket", "--pid-file", key.parent / "pid"]
        munge += ["--log-file", key.parent / "log", "--seed-file", key.parent / "seed"]
        self._start("munged", "--foreground", "--force", *munge)
        self._wait_for((key.parent / "socket").exists, "munged")
        self._start("slurmctld", "-D", "-c", "-f", conf)
        for n in range(self.num_nodes):
            self._start("slurmd", "-D", "-N", f"node{n}", "-f", conf)
        idle = ["idle"] * self.num_nodes
        self._wait_for(lambda: self.call("sinfo", "-hNo", "%T").split() == idle, "the nodes")
        return self

    def __exit__(self, *error: object) -> None:
        self.call("scancel", "--full", "--user=root", check=False)
        deadline = time.monotonic() + 10
        while self.call("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def call(self, *command: str, check: bool = True) -> str:
        """Output of a client command (sbatch, scontrol, ...)."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=30)
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    def state(self, job: str) -> str:
        """E.g. PENDING, RUNNING, COMPLETED, FAILED."""
        return self.call("squeue", "--states=all", "-ho", "%T", "--job", job).strip()

    def wait(self, job: str, timeout_s: float) -> str:
        """The state in which the job ended."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is still {state} after {timeout_s} s")
            time.sleep(0.2)
        return state

    def _configure(self) -> None:
        for name in ("munge", "state", *(f"spool_node{n}" for n in range(self.num_nodes))):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        (self.folder / "munge/key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge/key").chmod(0o400)
        host, ports = socket.gethostname().partition(".")[0], _free_ports(self.num_nodes + 1)
        text = "".join(NODE.format(n=n, host=host, port=ports[n + 1]) for n in range(self.num_nodes))
        text += CONF.format(host=host, ports=ports, folder=self.folder)
        (self.folder / "slurm.conf").write_text(text)

    def _start(self, name: str, *arguments: object) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            command = [str(_path(name)), *map(str, arguments)]
            self.processes.append(subprocess.Popen(command, env=self.environ, stdout=out, stderr=out))

    def _wait_for(self, ready, what: str) -> None:
        for _ in range(150):
            try:
                if ready():
                    return
            except RuntimeError:  # slurmctld does not answer yet
                pass
            time.sleep(0.1)
        logs = "".join(f"== {p.name}\n{p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.log")))
        self.__exit__()
        raise RuntimeError(f"{what} did not come up\n{logs}")


def _path(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
