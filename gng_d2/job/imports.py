"""``--import MODULE_OR_FILE.py ...`` runs a user's own code before a config is read.

A config names datasets, backbones and heads, and these have to be registered first. With ``--import`` they work in our
tools without a program of one's own.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from gng_d2.errors import InputError


def import_modules(names: Sequence[str]) -> None:
    """Import each of ``names``, a module or the path of a .py file. What is imported already is not run again.

    A module is looked for in the working folder too. A file is imported under its own name without the .py, and finds
    its neighbours as a script does. An error in the user's code is raised as it is.

    Raises:
        InputError: there is no such file or module, or a file's name is that of another module.
    """
    for name in names:
        _import_file(name) if name.endswith(".py") else _import_module(name)


def _import_module(name):
    if os.getcwd() not in sys.path:  # as python -m and a program in this folder have it
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # one that it imports is missing
        raise InputError(
            f"--import: there is no module {name!r} here or among the installed packages. Name a file with its .py. "
            f"--import takes every word up to the next option, so KEY VALUE pairs must not follow it"
        ) from None


def _import_file(path):
    path = os.path.realpath(path)
    if not os.path.isfile(path):
        raise InputError(f"--import: the file {path} does not exist")
    folder, file_name = os.path.split(path)
    name = file_name.removesuffix(".py")
    if "." in name:
        raise InputError(f"--import: Python cannot import {path}, because its name has a dot. Rename the file")
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # the file may be new
    try:
        found = getattr(importlib.import_module(name), "__file__", None) or "built in"
    except ImportError as error:
        if "relative import" not in str(error):
            raise
        raise InputError(
            f"--import: {path} is a part of a package, as it imports relatively ({error}). Run the tool in the folder "
            f"above the package, and name it without .py, as in --import PACKAGE.MODULE"
        ) from error
    if os.path.realpath(found) != path:
        raise InputError(f"--import: {path} has the name of another module, {name!r} ({found}). Rename the file")
