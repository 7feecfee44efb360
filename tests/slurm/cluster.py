#!/usr/bin/env python3
"""Run a command on a Slurm cluster of this machine alone, made in a temporary folder and taken down after it.

    python tests/slurm/cluster.py sinfo

The cluster has two nodes, both this machine. It needs what Debian's packages slurm-wlm and munge have, and nothing of
systemd, cgroups or /etc; any user can run it.
"""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])

HOST = socket.gethostname().partition(".")[0]
# Names that lead to this machine, as those of a cluster's nodes lead to them
NODES = ("127.0.0.2", "127.0.0.3")

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a job that is requeued waits until its old credential has expired, 2 minutes by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# a node has as many CPUs as is said here
SlurmdParameters=config_overrides
# impatient, as nobody else waits here
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=2
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """The programs that a cluster needs and this machine lacks."""
    return [name for name in NEEDED if shutil.which(name, path=PATH) is None]


@contextmanager
def cluster(cpus=4):
    """A running cluster: the environment of its users, with SLURM_CONF.

    Args:
        cpus: of each node, said to Slurm.

    Raises:
        RuntimeError: it does not come up; has the ends of its logs.
    """
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="gng_d2-slurm-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        (folder / "state").mkdir()
        conf, key = folder / "slurm.conf", folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        conf.write_text(_configuration(folder, cpus))
        environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(conf)}

        def daemon(*command):
            stack.enter_context(_daemon(command, environment, folder / f"{command[0]}.out"))

        files = {"socket": "munge.socket", "key-file": key.name, "log-file": "munge.log", "pid-file": "munge.pid"}
        files["seed-file"] = "munge.seed"
        daemon("munged", "--foreground", "--force", *(f"--{flag}={folder / name}" for flag, name in files.items()))
        _wait(lambda: (folder / "munge.socket").exists(), folder, "munged does not start")
        daemon("slurmctld", "-D")
        for node in NODES:
            daemon("slurmd", "-D", "-N", node)

        def says(*command):
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.split()

        _wait(lambda: says("sinfo", "-h", "-N", "-o", "%T") == ["idle"] * len(NODES), folder, "no idle nodes")
        yield environment
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environment, timeout=60)
        _wait(lambda: not says("squeue", "-h"), folder, "jobs are left")


def _configuration(folder, cpus):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(1 + len(NODES))]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        port, *ports = [one.getsockname()[1] for one in sockets]
    nodes = "".join(
        f"NodeName={node} NodeAddr={node} Port={at} CPUs={cpus} State=UNKNOWN\n" for node, at in zip(NODES, ports)
    )
    return CONF.format(folder=folder, host=HOST, user=getpass.getuser(), port=port) + nodes


@contextmanager
def _daemon(command, environment, log):
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(condition, folder, complaint, seconds=15):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = sorted([*folder.glob("*.log"), *folder.glob("*.out")])
            ends = "".join(f"\n{path.name}: {path.read_text(errors='replace')[-800:]}" for path in logs)
            raise RuntimeError(f"{complaint} after {seconds} s{ends}")
        time.sleep(0.2)


def main():
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
    elif missing():
        sys.exit(f"error: this machine lacks {', '.join(missing())}. On Debian and Ubuntu: apt install slurm-wlm munge")
    else:
        with cluster() as environment:
            sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)


if __name__ == "__main__":
    main()
