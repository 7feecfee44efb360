"""Run a command that does not outlive its parent: ``python die_with_parent.py PARENT COMMAND ...``

What a parent does between fork and exec (``preexec_fn``) may wait for a lock that another of its threads holds for
good. So the child arms its death signal here, and becomes the command.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

parent, *command = sys.argv[1:]
# PyTorch's launcher passes the signal on to the processes that it started
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(parent):  # it ended before the signal was armed
    sys.exit(f"{command[0]} not started: its parent has ended")
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell lets its background jobs ignore
signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm sends submitit's to all processes of a job
os.execv(command[0], command)
