#!/usr/bin/env python3
"""Run the quick tests under several versions of Python, PyTorch and NumPy, each in an environment of its own.

    python tests/versions.py FOLDER                        # all of them: 6 GB of disk and ten minutes each
    python tests/versions.py FOLDER --only python3.13      # those whose name has this in it

In FOLDER each has a virtual environment, made by tools/make_venv.py, and its log. The same command again takes the
environments that are there and runs their tests again. What was found goes into docs/versions.json, and from there into
the table of docs/versions.md. A Python that is not in PATH is "not tried".
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "versions.json", ROOT / "docs" / "versions.md"


@dataclass(frozen=True)
class Environment:
    python: str
    torch: str
    torchvision: str
    numpy: str
    why: str  # it is tried

    @property
    def name(self):
        return f"python{self.python}-torch{self.torch}-numpy{self.numpy}"


ENVIRONMENTS = [
    Environment("3.10", "2.0.1", "0.15.2", "1.26.4", "the oldest supported"),
    Environment("3.11", "2.4.1", "0.19.1", "1.26.4", "the first with our kernels"),
    Environment("3.12", "2.5.1", "0.20.1", "1.26.4", "the first with all but two export formats"),
    Environment("3.11", "2.14.1", "0.29.1", "2.2.6", "what `make` installs"),
    Environment("3.13", "2.15.0", "0.29.2", "2.4.6", "the newest on PyPI"),
]


def version_of(python):
    """That of an interpreter, such as "3.11"; None if none runs: pyenv has commands that only complain."""
    print_it = "import sys; print('{}.{}'.format(*sys.version_info))"
    done = shutil.which(python) and subprocess.run([python, "-c", print_it], capture_output=True, text=True)
    return done.stdout.strip() if done and done.returncode == 0 else None


def make(environment, python, folder):
    """The environment's Python, made unless it is there; None if it cannot be made."""
    installed = folder / ".installed"
    if not installed.exists():
        versions = [f"{name}=={getattr(environment, name)}" for name in ("torch", "torchvision", "numpy")]
        command = [python, ROOT / "tools" / "make_venv.py", folder, "--with", *versions]
        if run(command, f"{folder}.make.log"):
            return None
        installed.touch()
    return folder / "bin" / "python"


def run(command, log, **environ):
    """The exit status of ``command``, whose output goes to ``log``; its end is shown where the status is not 0."""
    with open(log, "w") as file:
        status = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **environ}).returncode
    if status:
        print("    " + "\n    ".join(Path(log).read_text().splitlines()[-20:]), flush=True)
    return status


def run_tests(python, folder, tests):
    """What pytest counted."""
    counts = Path(f"{folder}.xml")
    counts.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={counts}"]
    command += ["-p", "no:cacheprovider", "--disable-warnings", "-rfE"]
    command += ["--ignore=tests/test_versions.py", *tests]  # which judges what was found before
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    status = run(command, f"{folder}.log", OMP_NUM_THREADS="1", PYTHONPATH=path)
    if not counts.exists():
        return {"state": f"pytest ended with exit status {status}"}
    suite = xml.etree.ElementTree.parse(counts).getroot().find("testsuite")
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    skipped = Counter(reason.get("message") for reason in suite.iter("skipped"))
    passed = int(suite.get("tests")) - failed - skipped.total()
    return {"state": "tried", "passed": passed, "failed": failed, "skipped": dict(sorted(skipped.items()))}


def table(rows):
    lines = []
    for row in rows:
        found = [row["state"], "-", "-"]
        if row["state"] == "tried":
            found = [row["passed"], row["failed"], sum(row["skipped"].values())]
        lines.append([row["python"], row["torch"], row["numpy"], row["why"], *found])
    headers = ["Python", "PyTorch", "NumPy", "is", "passed", "failed", "skipped"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def publish(rows):
    """Write the rows, and the first table of the page."""
    RESULTS.write_text(json.dumps(rows, indent=1))
    page = re.sub(r"(?:^\|.*\n)+", lambda _: table(rows) + "\n", PAGE.read_text(), count=1, flags=re.MULTILINE)
    PAGE.write_text(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="NAME", help="a part of the name, such as torch2.0.1")
    parser.add_argument("--python", help="the Python to make all of them with; default: that of their name")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="only these; docs/ stays as it is")
    args = parser.parse_args()
    chosen = [environment for environment in ENVIRONMENTS if args.only in environment.name]
    if not chosen:
        parser.error(f"--only {args.only}: there are {', '.join(environment.name for environment in ENVIRONMENTS)}")
    if args.python:
        version = version_of(args.python) or parser.error(f"--python {args.python}: there is no such interpreter")
        chosen = [replace(environment, python=version) for environment in chosen]

    args.folder.mkdir(parents=True, exist_ok=True)
    results = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    good = True
    for number, environment in enumerate(chosen, 1):
        folder, start = args.folder.resolve() / environment.name, time.time()
        print(f"[{number}/{len(chosen)}] {environment.name}: {folder}.log", flush=True)
        found = try_environment(environment, folder, args)
        print(f"    {', '.join(f'{key}: {value}' for key, value in found.items())}, {time.time() - start:.0f} s")
        good &= found.get("failed") == 0 or (found["state"] == "not tried" and not args.only)
        results[environment.name] = {"name": environment.name, **vars(environment), **found}
        if not args.tests:
            publish([results[e.name] for e in ENVIRONMENTS if e.name in results])
    sys.exit(0 if good else f"error: not all is well; the logs are in {args.folder}")


def try_environment(environment, folder, args):
    python = args.python or f"python{environment.python}"
    if not version_of(python):
        return {"state": "not tried"}
    made = make(environment, python, folder)
    return run_tests(made, folder, args.tests) if made else {"state": "cannot be made"}


if __name__ == "__main__":
    main()
