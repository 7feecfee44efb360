"""What the tools have in common: --help, KEY VALUE pairs, and one line where the user can mend it."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import add_outputs, add_overrides, run_tool, tool_parser
from gng_d2.errors import InputError

TOOLS = sorted(path.name for path in Path("tools").glob("*.py") if path.name != "command_line.py")


def ended(main, **options):
    with pytest.raises(SystemExit) as stopped:
        run_tool(main, **options)
    return stopped.value.code


def test_what_the_user_can_mend_is_one_line(tmp_path):
    def no_space():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def bad_input():
        raise InputError("MODEL.FPN.NORM: unknown norm 'PNG'")

    def interrupt():
        raise KeyboardInterrupt

    def lacks_a_package():
        import no_such_package  # noqa: F401

    def diverge():
        raise FloatingPointError("Loss became infinite or NaN at iteration=3!")

    assert ended(bad_input) == "error: MODEL.FPN.NORM: unknown norm 'PNG'"
    assert ended(lambda: open(tmp_path)) == f"error: {tmp_path}: Is a directory"
    assert ended(no_space) == "error: No space left on device"
    assert ended(lacks_a_package).startswith(
        "error: this needs the Python package no_such_package, which is not installed"
    )
    assert ended(diverge) == "error: Loss became infinite or NaN at iteration=3!"
    assert ended(interrupt) == "stopped; the same command starts anew"
    assert ended(interrupt, if_stopped="it goes on") == "stopped; it goes on"


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, ZeroDivisionError])
def test_our_own_mistakes_keep_their_traceback(error):
    def wrong():
        raise error("a bug")

    with pytest.raises(error):
        run_tool(wrong)
    run_tool(lambda: None)


def test_a_module_that_a_package_lacks_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError):
        run_tool(lambda: __import__("gng_d2.no_such_module"))


def parsed(*words):
    parser = tool_parser("A tool.")
    parser.add_argument("--config-file", required=True)
    add_outputs(parser, json="rows", plot="a picture")
    add_overrides(parser)
    return parser.parse_args(words)


def test_overrides_come_last():
    args = parsed("--config-file", "a.yaml", "--json", "out.json", "SEED", "-1", "DATASETS.TEST", "()")
    assert args.opts == ["SEED", "-1", "DATASETS.TEST", "()"] and args.json == "out.json"
    assert parsed("--config-file", "a.yaml").opts == []
    assert parsed("--config-file", "a.yaml", "MODEL.WEIGHTS", "x?a=b").opts == ["MODEL.WEIGHTS", "x?a=b"]
    assert parsed("--config-file", "a.py", "train.max_iter=3", "a.b=[1,2]", "c='d e'").opts[1:] == [
        "a.b=[1,2]",
        "c='d e'",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--config-file a.yaml SEED 1 --json out.json", "error: --json after the KEY VALUE pairs: flags come first"),
        ("SEED 1 --config-file a.yaml", "error: --config-file after the KEY VALUE pairs: flags come first"),
        ("--config-file a.yaml SEED --plot=a.png", "error: --plot=a.png after the KEY VALUE pairs: flags come first"),
        ("--config-file a.yaml SEED 1 -h", "error: -h after the KEY VALUE pairs: flags come first"),
    ],
)
def test_flags_among_the_overrides_are_named(words, message):
    with pytest.raises(SystemExit) as stopped:
        parsed(*words.split())
    assert stopped.value.code.startswith(message)


def test_a_picture_of_an_unknown_kind_is_refused_before_the_work(capsys):
    with pytest.raises(SystemExit):
        parsed("--config-file", "a.yaml", "--plot", "a.xyz")
    assert "argument --plot: a.xyz must end in .png, .pdf, .svg or .jpg" in capsys.readouterr().err


SLOW_HELP = {"train_net.py"}  # its parser is Detectron2's


@pytest.mark.parametrize("tool", [pytest.param(t, marks=[pytest.mark.slow] * (t in SLOW_HELP)) for t in TOOLS])
def test_help_comes_first_and_alone(tool):
    loaded = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    run = f"{loaded}import runpy; sys.argv = ['{tool}', '--help']; sys.path.insert(0, 'tools'); "
    run += f"runpy.run_path('tools/{tool}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage:")
    assert done.stdout.endswith("False\n") or tool in SLOW_HELP


WITH_CONFIG = {
    "analyze_groups.py": "",
    "compare.py": "--norms GN --seeds 0 --output out",
    "predict.py": "--weights w --input i.jpg --output out",
    "train_net.py": "",
    "demo.py": "",
    "reproduce.py": "gradients",
}


SLOW = {"train_net.py", "reproduce.py"}


@pytest.mark.parametrize("tool", [pytest.param(t, marks=[pytest.mark.slow] if t in SLOW else []) for t in WITH_CONFIG])
def test_every_tool_with_a_config_takes_overrides_last(tool):
    words = [*WITH_CONFIG[tool].split(), "--config-file", "a.yaml", "SEED", "1", "--verbose"]
    done = subprocess.run([sys.executable, f"tools/{tool}", *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: --verbose after the KEY VALUE pairs: flags come first\n"


def test_ctrl_c_that_became_another_error_is_one_line_too():
    """PyTorch imports NumPy so."""
    script = """
import os, signal, sys
sys.path.insert(0, "tools")
from command_line import run_tool

def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        raise RuntimeError("already initialized") from None

run_tool(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "stopped; the same command starts anew\n"


@pytest.mark.slow
def test_ctrl_c_is_one_line_from_the_start():
    """While PyTorch and Detectron2 are imported, and while it works."""
    for seconds in (0.5, 8):
        command = [sys.executable, "tools/reproduce.py", "table1", "--experiments", "1000000"]
        job = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(seconds)
        job.send_signal(signal.SIGINT)
        _, err = job.communicate()
        assert job.returncode == 1 and err.splitlines()[-1] == "stopped; the same command starts anew", err
        assert "Traceback" not in err
