import runpy
import sys

import pytest


@pytest.fixture
def reproduce(monkeypatch, capsys):
    """Runs ``tools/reproduce.py`` with these words, here, where importing takes no time; returns what it printed."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tools/reproduce.py", *map(str, words)])
        capsys.readouterr()
        runpy.run_path("tools/reproduce.py", run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def line_of():
    """The cells of the line of a Markdown table that begins with a text."""

    def cells(table, first):
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {first} ")]
        return [cell.strip() for cell in line.strip("|").split("|")]

    return cells
