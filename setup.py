from setuptools import Extension, find_packages, setup

setup(
    name="gng_d2",
    version="0.1.0",
    description="Group normalization for Detectron2 whose number of groups follows from each layer's shape",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["gng_d2", "gng_d2.*"]),
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
    # Detectron2 and what it brings (fvcore, pycocotools, Pillow, matplotlib, tqdm, tabulate, yacs) are
    # not listed: an environment that has a Detectron2 keeps it as it is.
    install_requires=["torch>=2.0", "numpy"],
    extras_require={"panoptic": ["panopticapi-lite"], "study": ["scipy"], "test": ["pytest", "expecttest", "scipy"]},
)
