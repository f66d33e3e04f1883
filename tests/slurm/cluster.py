"""A real Slurm cluster on this machine: munged, slurmctld and two slurmd with two fake GPUs each.

    python tests/slurm/cluster.py FOLDER        start it, print the SLURM_CONF to export, run until Ctrl-C

Requires `apt-get install slurm-wlm munge`, but no systemd, cgroups, database or GPU. All files are in one folder and
all ports are on the loopback device. `stop` ends the processes that `start` began.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("gpu01", "gpu02")

# Jobs in partition `urgent` preempt those in `gpu`, which are requeued after a grace time of five seconds.
# config_overrides: the nodes' CPUs and memory need not exist, so that requests made for a real cluster are granted.
# cred_expire: a requeued job is held for this time; 5 s is the minimum, and the default is two minutes.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait=20
CompleteWait=0
ReturnToService=2
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=2-00:00:00 DefaultTime=01:00:00 PriorityTier=1 GraceTime=5
PartitionName=urgent Nodes=ALL MaxTime=1:00:00 PriorityTier=10 PreemptMode=off
"""


def missing() -> str:
    """Why no cluster can be started on this machine; empty if it can."""
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}; apt-get install slurm-wlm munge" if absent else ""


class Cluster:
    """A Slurm cluster.

    Attributes:
        folder: for configuration, state and logs. Its path must be short, because it contains a Unix socket.
        environment: environment variables for Slurm's commands.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the daemons and wait until the nodes accept jobs.

        Raises:
            RuntimeError: a daemon did not start; the message contains its log.
        """
        self.folder.chmod(0o755)  # munged requires that all users can reach its socket
        self._configure()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        places = {name: self.folder / f"munge.{name}" for name in ("socket", "key", "pid", "log", "seed")}
        files = {"--socket": "socket", "--key-file": "key", "--pid-file": "pid", "--log-file": "log"}
        files["--seed-file"] = "seed"
        self._run("munged", "--foreground", *(f"{option}={places[name]}" for option, name in files.items()))
        self._wait_for("munged", "munge", "--no-input", f"--socket={places['socket']}")
        self._run("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        self._wait_for("slurmctld", "sh", "-c", "scontrol ping | grep -q 'is UP'")
        for node in NODES:
            self._run("slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])
        idle = f"test $(sinfo --noheader --Node --partition=gpu --states=idle | wc -l) = {len(NODES)}"
        self._wait_for("slurmd", "sh", "-c", idle)

    def stop(self) -> None:
        """Cancel all jobs and stop the daemons in reverse order."""
        with suppress(subprocess.TimeoutExpired):  # the controller is down
            self.command("scancel", "--user", getpass.getuser(), check=False)
            end = time.monotonic() + 30
            while self.command("squeue", "--noheader", check=False).strip() and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def command(self, *arguments: str | Path, check: bool = True, **options) -> str:
        """Run a command and return its stdout and stderr.

        Raises:
            RuntimeError: it failed, and `check` is set.
        """
        done = subprocess.run(
            arguments,
            env=self.environment | options.pop("env", {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=options.pop("timeout", 60),
            **options,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stdout.strip()}")
        return done.stdout

    def _configure(self) -> None:
        ports = _free_ports(1 + len(NODES))
        for index in range(2):  # slurmd checks that the device file exists but does not open it
            (self.folder / f"gpu{index}").symlink_to("/dev/null")
        host = socket.gethostname().split(".")[0]
        node = (
            "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs=16 RealMemory=192000 Gres=gpu:2 State=UNKNOWN"
        )
        nodes = "\n".join(node.format(name, host, port) for name, port in zip(NODES, ports[1:], strict=True))
        content = CONFIGURATION.format(
            host=host,
            controller=ports[0],
            user=getpass.getuser(),
            folder=self.folder,
            nodes=nodes,
        )
        (self.folder / "slurm.conf").write_text(content)
        gres = [f"NodeName={name} Name=gpu File={self.folder}/gpu[0-1]\n" for name in NODES]
        (self.folder / "gres.conf").write_text("AutoDetect=off\n" + "".join(gres))
        # slurmd loads a cgroup plugin even if it is not used. The default plugin fails in a container; v1 does not.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _run(self, *arguments: str) -> None:
        with ExitStack() as stack:
            log = stack.enter_context((self.folder / f"{arguments[0]}.out").open("a"))
            self._daemons.append(
                subprocess.Popen(
                    arguments, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
            )

    def _wait_for(self, what: str, *probe: str) -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                if subprocess.run(probe, env=self.environment, capture_output=True, timeout=10).returncode == 0:
                    return
            except subprocess.TimeoutExpired:
                pass
            time.sleep(0.1)
        logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self.folder.glob("*.out"))
        logs += "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))
        self.stop()
        raise RuntimeError(f"{what} did not start within 30 s\n{logs}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> None:
    if missing():
        sys.exit(missing())
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    cluster = Cluster(folder)
    cluster.start()
    print(f"export SLURM_CONF={folder / 'slurm.conf'}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, lambda *_: None)
    signal.pause()
    cluster.stop()


if __name__ == "__main__":
    main()
