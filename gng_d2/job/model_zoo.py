"""Find our configs, wherever the package is installed."""

import os
from glob import glob

from gng_d2.errors import InputError


def get_config_file(name: str) -> str:
    """The path of one of our configs, as :func:`detectron2.model_zoo.get_config_file` gives those of Detectron2.

    So a program needs no path to a checkout, whether gng_d2 was installed from a wheel or with ``pip install -e``.

    Args:
        name: below ``configs``, for instance "quick/pfpn_pgn.yaml", or the lazy config "pfpn_pgn.py".

    Raises:
        InputError: there is no such config; lists those that there are.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folder = os.path.join(package, "configs")
    if not os.path.isdir(folder):  # of a checkout, where they stand beside the package
        folder = os.path.join(os.path.dirname(package), "configs")
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        # a .py file in a subfolder registers datasets
        configs = glob("*.py", root_dir=folder) + glob("**/*.yaml", root_dir=folder, recursive=True)
        raise InputError(f"gng_d2 has no config {name!r}. It has {', '.join(sorted(configs))}")
    return path
