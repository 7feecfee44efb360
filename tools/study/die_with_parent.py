"""Run a command that does not outlive its parent: ``python die_with_parent.py PARENT COMMAND ...``

The signal that kills the child with its parent is set here, in the child, which then becomes the command. It is not set
in a ``preexec_fn`` of the parent, because code that runs there may wait for ever for a lock of another thread.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

parent, *command = sys.argv[1:]
# PyTorch's launcher passes the signal on to the processes that it started
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(parent):  # the parent ended before the signal was set
    sys.exit(f"{command[0]} not started: its parent has ended")
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell makes its background jobs ignore it
signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # it is meant for submitit, but Slurm sends it to all processes of a job
os.execv(command[0], command)
