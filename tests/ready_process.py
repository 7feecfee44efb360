"""Command lines of tools/ in processes that have PyTorch and Detectron2 imported already: each saves five seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch

_READY = multiprocessing.get_context("forkserver")
_READY.set_forkserver_preload(["detectron2.engine", "gng_d2.job.engine", "gng_d2.predict.pictures", "scipy.stats"])


def run(tool, words, cwd=".", timeout=500, forks=False, **environ):
    """``python TOOL WORDS`` in the folder ``cwd``, on one thread, as :func:`subprocess.run` returns it."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
        process = _READY.Process(target=_run, args=(str(tool), list(words), cwd, environ, files, forks))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([tool, *words], timeout)
        return subprocess.CompletedProcess([tool, *words], process.exitcode, *(file.read_text() for file in files))


def launch(function, *args, timeout=500):
    """``function(*args)`` in the two processes of a job."""
    process = _READY.Process(target=_launch, args=(function, args))
    process.start()
    process.join(timeout)
    assert process.exitcode == 0, process.exitcode


def _launch(function, args):
    from detectron2.engine import launch

    from gng_d2.job.engine import then_leave_group

    multiprocessing.set_start_method(None, force=True)
    _fork_processes_of_jobs()
    torch.set_num_threads(1)
    launch(then_leave_group, 2, dist_url="auto", args=(function, *args))


def _fork_processes_of_jobs():
    torch.multiprocessing.start_processes = partial(torch.multiprocessing.start_processes, start_method="fork")


def _run(tool, words, cwd, environ, files, forks):
    for number, file in enumerate(files, 1):
        with open(file, "wb") as opened:
            os.dup2(opened.fileno(), number)
    os.chdir(cwd)
    os.environ.update(environ)
    multiprocessing.set_start_method(None, force=True)  # the platform's own, as in a process of a shell
    warnings.simplefilter("ignore")
    if forks:
        _fork_processes_of_jobs()
    torch.set_num_threads(1)
    sys.argv = [tool, *words]
    sys.path.insert(0, os.path.dirname(os.path.abspath(tool)))
    runpy.run_path(os.path.abspath(tool), run_name="__main__")
