#!/usr/bin/env python3
"""Make a virtual environment with Detectron2, everything it needs, and this project.

Used by the Makefile and tests/versions.py. Needs nothing but Python's standard library. To use gng_d2 in an
environment that has Detectron2 already, `pip install -e .` is all.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile

from command_line import run_tool, tool_parser

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONSTRAINTS = os.path.join(ROOT, "constraints.txt")
OLDEST, NEWEST = (3, 10), (3, 13)

# PyPI has no `detectron2`. This wheel is upstream's main of March 2024 with later fixes. It is
# tagged for CPython 3.10 because of one compiled file, which nothing here needs: without that file
# it is plain Python and installs everywhere.
DETECTRON2 = "sal-detectron2==0.7.2"
DETECTRON2_WHEEL = "sal_detectron2-0.7.2-{}-none-any.whl"
PANOPTICAPI = "panopticapi-lite==0.2.0"
DETECTRON2_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"


def fail(step, reason):
    sys.exit(f"\nset-up failed while {step}:\n{reason}")


def run(step, *command):
    print("-- " + step, flush=True)
    code = subprocess.call(command, cwd=ROOT)
    if code:
        fail(
            step,
            "  `{}`\n  ended with exit status {}; its own message is above. Is PyPI reachable from "
            "here (network, proxy, disk space)?".format(" ".join(command), code),
        )


def strip_compiled(source, target):
    """Copy the wheel `source` to `target` without its compiled files, their RECORD lines included."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            if item.filename.endswith(".so"):
                continue
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(x for x in lines if not x.split(",")[0].endswith(".so")).encode()
            new.writestr(item, content)


def requirements(others):
    """The lines of constraints.txt, with each of ``others`` (name==version) in the place of the line of its name."""
    with open(CONSTRAINTS, encoding="utf-8") as file:
        text = file.read()
    for other in others:
        name, _, version = other.partition("==")
        text, found = re.subn(f"^{re.escape(name)}==.*$", other, text, flags=re.MULTILINE)
        if not (found and version):
            fail("reading --with", f"  {other}: give name==version of a name in constraints.txt")
    return text


def install_detectron2(pip):
    with tempfile.TemporaryDirectory() as folder:
        kind = ["--only-binary=:all:", "--python-version=3.10", "--implementation=cp"]
        run("downloading Detectron2", *pip, "download", "-q", "--no-deps", "--dest", folder, *kind, DETECTRON2)
        wheel = os.path.join(folder, DETECTRON2_WHEEL.format("cp310"))
        with open(wheel, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        if digest != DETECTRON2_SHA256:
            fail(
                "checking Detectron2",
                f"  the sha256 of {os.path.basename(wheel)} is\n  {digest}, not\n  {DETECTRON2_SHA256}: this is "
                "another file than the one this project was tried with",
            )
        portable = os.path.join(folder, DETECTRON2_WHEEL.format("py3"))
        strip_compiled(wheel, portable)
        # without their dependencies: both ask for numpy<2, which Python 3.13 has no wheel of
        run("installing Detectron2 and panopticapi", *pip, "install", "-q", "--no-deps", portable, PANOPTICAPI)


def main():
    parser = tool_parser(__doc__)
    parser.add_argument("folder", nargs="?", default=os.path.join(ROOT, ".venv"), help="default: .venv")
    parser.add_argument(
        "--with",
        dest="others",
        nargs="+",
        default=[],
        metavar="NAME==VERSION",
        help="install these instead of the versions in constraints.txt, for instance torch==2.4.1 torchvision==0.19.1",
    )
    args = parser.parse_args()
    folder = os.path.abspath(args.folder)
    wanted = requirements(args.others)

    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        fail(
            "checking Python",
            "  this is Python {}.{} ({}); torch and Detectron2 here need {}.{} to {}.{}.\n"
            "  Name another one: make PYTHON=python3.12 ...".format(
                *sys.version_info[:2], sys.executable, *OLDEST, *NEWEST
            ),
        )
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(os.path.join(folder, "bin", "pip")):
        if os.path.isdir(folder) and os.listdir(folder) and not os.path.exists(os.path.join(folder, "pyvenv.cfg")):
            fail("making " + folder, "  the folder is there and is no virtual environment. Name another one")
        print("-- making " + folder, flush=True)
        try:
            venv.create(folder, clear=os.path.exists(folder), with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            fail(
                "making " + folder,
                f"  {error}\n  Debian and Ubuntu keep venv in a package of its own: apt install python3-venv",
            )
    pip = [python, "-m", "pip"]
    # PyPI's torchvision needs the CUDA build of torch, on a CPU too: 5 GB on disk.
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(wanted)
        file.flush()
        # not -q: its progress is shown
        run("installing PyTorch and the libraries (minutes on the first run)", *pip, "install", "-r", file.name)
    install_detectron2(pip)
    run("installing gng_d2", *pip, "install", "-q", "--no-deps", "--no-build-isolation", "-e", ".")
    run("importing it", python, "-c", "import detectron2, gng_d2")


if __name__ == "__main__":
    run_tool(main, if_stopped="the same command goes on")
