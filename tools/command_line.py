"""What the command lines of tools/ have in common: flags, KEY VALUE pairs, and how they end.

This module imports nothing slow, and the tools import slow packages in their ``main``. So ``--help`` comes at once and
without the warnings of other packages, and Ctrl-C prints one line from the start.
"""

import argparse
import importlib.util
import os
import signal
import sys
import warnings

ANEW = "the same command starts anew"

PICTURES = (".png", ".pdf", ".svg", ".jpg")


def tool_parser(doc):
    """A parser whose ``--help`` shows a tool's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_outputs(parser, json, plot=None):
    """Give ``parser`` the flag ``--json`` with this help text, and ``--plot`` if there is one for it."""
    parser.add_argument("--json", metavar="OUT", help=json)
    if plot:
        parser.add_argument("--plot", metavar="OUT.png", type=_picture, help=plot)


def _picture(path):
    if os.path.splitext(path)[1].lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{path} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    return path


def add_config_file(parser):
    """Give ``parser`` the flag ``--config-file`` of a tool that takes lazy configs too."""
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="a path or a name in Detectron2's model zoo; YAML, or a lazy config, FILE.py, which is code and is run",
    )


def add_import(parser):
    """Give ``parser`` the flag ``--import``: ``args.imports``, for :func:`gng_d2.job.imports.import_modules`."""
    parser.add_argument(
        "--import",
        dest="imports",
        nargs="+",
        default=[],
        metavar="MODULE_OR_FILE.py",
        help="run these first: they register datasets, backbones, heads. Give another option after it, not KEY VALUE",
    )


def add_trust(parser):
    """Give ``parser`` the flag ``--trust-files``, with which :mod:`gng_d2.job.weight_files` opens files that run code.

    It is kept in the environment, so that the processes of a job have it too.
    """
    parser.add_argument(
        "--trust-files", nargs=0, action=_Trust, help="open weights and configs that run code of their own on reading"
    )


class _Trust(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        os.environ["GNG_D2_TRUST_FILES"] = "1"


def add_norm_options(parser):
    """Give ``parser`` the flags ``--recompute-norms``, ``--fuse-norms`` and ``--calibrate-norms``."""
    parser.add_argument(
        "--recompute-norms",
        action="store_true",
        help="compute norms again in the backward pass and do not keep what they return: the same numbers in less "
        "memory, a little slower",
    )
    parser.add_argument(
        "--fuse-norms",
        action="store_true",
        help="run each norm in one op with the shortcut and the activation after it: the same numbers but for "
        "rounding, in less time",
    )
    parser.add_argument(
        "--calibrate-norms",
        type=count,
        default=0,
        metavar="N",
        help="before the first step, fit the backbone's group norms to the batch norms in MODEL.WEIGHTS, on the first "
        "N images of the training set; 64 are enough, and need 40 GB on the model's device for R-50 at 800 pixels. A "
        "run that goes on from a checkpoint is not fitted again",
    )


def count(word):
    """The type of flags for a number of things, of which there must be one or more."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word}: at least 1")
    return number


def add_overrides(parser, lazy=False):
    """Give ``parser`` the words that override a config, positional and last: ``args.opts``.

    Args:
        lazy: the tool takes lazy configs too, and for them words ``path.key=value`` in place of ``KEY VALUE`` pairs.
    """
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        action=_Overrides,
        metavar="KEY VALUE",
        help="pairs that override the config; they come last" + "; for a lazy config: path.key=value" * lazy,
    )


class _Overrides(argparse.Action):
    # They are checked here because argparse would report a required flag after them as missing.
    def __call__(self, parser, namespace, words, option_string=None):
        setattr(namespace, self.dest, check_overrides(words))


def check_overrides(words):
    """Return ``words``, which override a config. If a flag is among them, the tool ends and says so."""
    flags = [word for word in words if word.startswith("--") or word == "-h"]
    if flags:
        sys.exit(f"error: {flags[0]} after the KEY VALUE pairs: flags come first")
    return words


def run_tool(main, if_stopped=ANEW):
    """Run a tool. If it ends with an error that the user can mend, print one line, and exit with status 1.

    Args:
        main: the tool, a function without arguments.
        if_stopped: a sentence on what happens to its work when it is interrupted.
    """
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    warnings.filterwarnings("ignore", r"`torch\.jit\.script", FutureWarning)  # of other packages, when imported
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    interrupts = []
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*args):
        interrupts.append(args)
        signal.default_int_handler(*args)

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        _run_tool(main)
    except KeyboardInterrupt:
        sys.exit(f"stopped; {if_stopped}")
    except Exception:
        if interrupts:  # PyTorch, while it imports NumPy, turns an interrupt into another error
            sys.exit(f"stopped; {if_stopped}")
        raise
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _run_tool(main):
    """Turn the errors that the user can mend into one line."""
    try:
        main()
    except ModuleNotFoundError as error:
        if error.name is None or importlib.util.find_spec(error.name.partition(".")[0]):
            raise  # a module that an installed package lacks is a mistake in code
        sys.exit(
            f"error: this needs the Python package {error.name}, which is not installed in {sys.prefix}. If it is a "
            f"file of yours, put its folder into PYTHONPATH"
        )
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        sys.exit(f"error: {where}{error.strerror or error}")
    except FloatingPointError as error:  # Detectron2's, where a loss is not finite
        sys.exit(f"error: {error}")
    except ValueError as error:
        from gng_d2.errors import InputError

        if not isinstance(error, InputError):
            raise
        sys.exit(f"error: {error}")
