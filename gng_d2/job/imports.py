"""``--import MODULE_OR_FILE.py ...``: a user's own code runs before a config is read.

A config names datasets, backbones and heads that have to be registered first; so any of them works in our
tools without a program of one's own.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

from gng_d2.errors import InputError

__all__ = ["import_modules"]


def import_modules(names: Sequence[str]) -> None:
    """Import each of ``names``, a module or the path of a .py file; what is imported already is not run again.

    A file is imported under its own name without the .py, and finds its neighbours as a script does. What it
    raises is raised here.

    Raises:
        InputError: there is no such file or module, or a file's name is that of another module.
    """
    for name in names:
        _import_file(name) if name.endswith(".py") else _import_module(name)


def _import_module(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # one that it imports is missing
        raise InputError(
            f"--import: there is no module {name!r}. A file is given with its .py; and --import takes every word up "
            f"to the next option, so KEY VALUE pairs must not follow it"
        ) from None


def _import_file(path):
    path = os.path.realpath(path)
    if not os.path.isfile(path):
        raise InputError(f"--import: the file {path} does not exist")
    folder, file_name = os.path.split(path)
    name = file_name.removesuffix(".py")
    if name in sys.modules:
        other = getattr(sys.modules[name], "__file__", None) or "built in"
        if os.path.realpath(other) != path:
            raise InputError(f"--import: {path} has the name of a module in use, {name!r} ({other}). Rename the file")
        return
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
