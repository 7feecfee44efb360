import re

from setuptools import Extension, find_packages, setup

VERSION = re.search(r'^__version__ = "(.+)"', open("gng_d2/__init__.py", encoding="utf-8").read(), re.MULTILINE)[1]

setup(
    name="gng_d2",
    version=VERSION,
    description="Group normalization for Detectron2 whose number of groups follows from each layer's shape",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The configs stand at the root of a checkout, where people look for them, and in the package once installed.
    packages=[*find_packages(include=["gng_d2", "gng_d2.*"]), "gng_d2.configs"],
    package_dir={"gng_d2.configs": "configs"},
    package_data={"gng_d2.configs": ["*.yaml", "*.py", "*/*.yaml", "*/*.py"]},
    # No module of Python's, but a library that gng_d2/ops/cpu_kernels.py loads, and can do without.
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
    # Detectron2 and what it brings (fvcore, pycocotools, Pillow, matplotlib, tqdm, yacs) are
    # not listed: an environment that has a Detectron2 keeps it as it is.
    install_requires=["torch>=2.0", "numpy", "tabulate"],
    extras_require={
        "panoptic": ["panopticapi-lite"],
        "study": ["scipy"],
        "test": ["pytest", "expecttest", "scipy", "timm", "segmentation_models_pytorch==0.6.0"],
    },
)
