"""What the command lines of tools/ have in common: their outputs, KEY VALUE pairs, and how they end.

Importing it is quick, and the tools import slow packages in their ``main``. So ``--help`` comes at once and without the
warnings of other packages, and Ctrl-C is one line from the start.
"""

import argparse
import os
import sys
import warnings

__all__ = [
    "ANEW",
    "tool_parser",
    "add_config_file",
    "add_outputs",
    "add_import",
    "add_trust",
    "add_overrides",
    "add_norm_options",
    "check_overrides",
    "run_tool",
]

ANEW = "the same command starts anew"

PICTURES = (".png", ".pdf", ".svg", ".jpg")


def tool_parser(doc):
    """A parser whose ``--help`` shows a tool's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_outputs(parser, json, plot=None):
    """Give ``parser`` the flag ``--json``, and ``--plot`` where there is something to draw, with these help texts."""
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
    """Give ``parser`` the flag ``--trust-files``, by which :mod:`gng_d2.job.weight_files` opens files that run code.

    It is kept in the environment, so that the processes of a job have it too.
    """
    parser.add_argument(
        "--trust-files", nargs=0, action=_Trust, help="open weights and configs that run code of their own on reading"
    )


class _Trust(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        os.environ["GNG_D2_TRUST_FILES"] = "1"


def add_norm_options(parser):
    """Give ``parser`` the flags of how norms run and begin: ``--recompute-norms``, ``--fuse-norms`` and
    ``--calibrate-norms``."""
    parser.add_argument(
        "--recompute-norms",
        action="store_true",
        help="compute norms again in the backward pass instead of keeping what they return: the same numbers in less "
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
        type=_number_of_images,
        default=0,
        metavar="N",
        help="MODEL.WEIGHTS were trained with batch norm and the backbone has group norms: fit their affines on the "
        "first N images of the training set, before the first step (64 are enough); FPN and heads, and a run that goes "
        "on from a checkpoint, stay as they are",
    )


def _number_of_images(word):
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} images are too few")
    return number


def add_overrides(parser, lazy=False):
    """Give ``parser`` the ``KEY VALUE`` pairs that override a config, positional and last: ``args.opts``.

    Args:
        lazy: the tool takes lazy configs too, and for them words ``path.key=value``.
    """
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        action=_Overrides,
        metavar="KEY VALUE",
        help="pairs that override the config; they come last" + "; of a lazy config: path.key=value" * lazy,
    )


class _Overrides(argparse.Action):
    # Checked while they are parsed: a flag after them, if it is required, is else reported as missing.
    def __call__(self, parser, namespace, words, option_string=None):
        setattr(namespace, self.dest, check_overrides(words, getattr(namespace, "config_file", None)))


def check_overrides(words, config_file):
    """``words`` if they can be ``KEY VALUE`` pairs, or of a lazy config (.py) each ``path.key=value``; else the tool
    ends with what is wrong with them."""
    flags = [word for word in words if word.startswith("--") or word == "-h"]
    if flags:
        sys.exit(f"error: {flags[0]} after the KEY VALUE pairs: flags come first")
    lazy = (config_file or "").endswith(".py")
    other = [word for word in words if "=" not in word] if lazy else [key for key in words[::2] if "=" in key]
    if other and lazy:
        sys.exit(
            f"error: {other[0]}: {config_file} is a lazy config; it is overridden by path.key=value, not KEY VALUE"
        )
    if other:
        sys.exit(
            f"error: {other[0]}: a YAML config is overridden by KEY VALUE pairs; path.key=value is for lazy configs"
        )
    if len(words) % 2 and not lazy:
        sys.exit(
            f"error: the KEY VALUE pairs are {len(words)} words, an odd number: {' '.join(words)}. Each key has one "
            f"value; quote a value with spaces"
        )
    return words


def run_tool(main, if_stopped=ANEW):
    """Run a tool so that it ends as all of them do: what the user can mend is one line, and the exit status 1.

    Args:
        main: the tool, without arguments.
        if_stopped: what becomes of its work when it is interrupted.
    """
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    warnings.filterwarnings("ignore", r"`torch\.jit\.script", FutureWarning)  # of other packages, when imported
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"stopped; {if_stopped}")
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
