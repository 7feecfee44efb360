"""What pyproject.toml cannot say: an optional library in C, and configs that are packaged from another folder."""

import glob
import os

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "gng_d2/ops/_cpu_kernels"


class BuildLibrary(build_ext):
    """Names the library without a version of Python: it is loaded through ctypes, by any of them."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"


class WheelForAnyPython3(bdist_wheel):
    """One wheel for every Python 3: of this platform if it holds the library, of any if there was no compiler."""

    def get_tag(self):
        build = self.get_finalized_command("build").build_lib
        return "py3", "none", super().get_tag()[2] if glob.glob(os.path.join(build, LIBRARY + "*")) else "any"


setup(
    # The configs stand at the root of a checkout, where people look for them, and in the package once installed.
    packages=[
        *find_packages(include=["gng_d2", "gng_d2.*"]),
        *("gng_d2.configs" + folder for folder in ("", ".examples", ".quick", ".study")),
    ],
    package_dir={"gng_d2.configs": "configs"},
    package_data={"gng_d2": ["py.typed"], "gng_d2.configs": ["*.yaml", "*/*.yaml"]},
    # No module of Python's, but a library that gng_d2/ops/cpu_kernels.py loads, and can do without.
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": WheelForAnyPython3},
    ext_modules=[
        Extension(
            "gng_d2.ops._cpu_kernels",
            ["gng_d2/ops/cpu_kernels.c"],
            extra_compile_args=["-O3", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            libraries=["m"],
            optional=True,
        )
    ],
)
