"""docs/versions.md is what tests/versions.py found, and a test is skipped only where PyTorch lacks something."""

import json
import re
from pathlib import Path

import pytest
import versions

ROWS = json.loads(Path("docs/versions.json").read_text())
TRIED = [pytest.param(row, id=row["name"]) for row in ROWS if row["state"] == "tried"]


def numbers(version):
    return tuple(map(int, version.split(".")[:2]))


def test_the_table_is_what_was_found():
    assert versions.table(ROWS) in Path("docs/versions.md").read_text()
    assert [row["name"] for row in ROWS] == [environment.name for environment in versions.ENVIRONMENTS]


OF_THE_MACHINE = r"there is no GPU|no .* here: apt install slurm-wlm munge"


@pytest.mark.parametrize("row", TRIED)
def test_a_skip_names_a_version_that_is_newer_or_what_the_machine_lacks(row):
    assert row["passed"] > 1000 and row["failed"] == 0
    for reason in row["skipped"]:
        needed = re.match(r"needs PyTorch (\d+\.\d+): ", reason)
        assert re.match(OF_THE_MACHINE, reason) or numbers(row["torch"]) < numbers(needed[1]), reason


def test_how_many_need_a_gpu():
    (number,) = {row.values[0]["skipped"]["there is no GPU"] for row in TRIED}
    assert f"In each, {number} tests are skipped for lack of a GPU" in Path("docs/versions.md").read_text()


def test_the_oldest_and_what_make_installs_are_among_them():
    tried = {row.values[0]["torch"]: row.values[0] for row in TRIED}
    pinned = dict(line.split("==") for line in Path("constraints.txt").read_text().split() if "==" in line)
    assert tried[pinned["torch"]]["numpy"] == pinned["numpy"]
    oldest = re.search(r"torch>=([\d.]+)", Path("pyproject.toml").read_text())[1]
    assert numbers(min(tried, key=numbers)) == numbers(oldest)


def test_only_the_first_table_of_the_page_is_written(monkeypatch, tmp_path):
    for name in ("RESULTS", "PAGE"):
        monkeypatch.setattr(versions, name, tmp_path / name)
    (tmp_path / "PAGE").write_text("before\n\n| old |\n| --- |\n\nbetween\n\n| other |\n| --- |\n")
    versions.publish(ROWS)
    assert (tmp_path / "PAGE").read_text() == f"before\n\n{versions.table(ROWS)}\n\nbetween\n\n| other |\n| --- |\n"
    assert json.loads((tmp_path / "RESULTS").read_text()) == ROWS


def test_what_is_found_is_counted_by_reason(monkeypatch, tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.skipif(True, reason='needs PyTorch 9.9: wings')\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_new(n): pass\n"
    )
    found = versions.run_tests(versions.sys.executable, tmp_path / "an.environment", [tmp_path / "test_it.py"])
    assert found == {"state": "tried", "passed": 1, "failed": 1, "skipped": {"needs PyTorch 9.9: wings": 2}}
    found = versions.run_tests(versions.sys.executable, tmp_path / "an.environment", [tmp_path / "none.py"])
    assert found["state"] == "pytest ended with exit status 4" or found["passed"] == 0


def test_a_python_that_is_not_there_is_not_tried(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(versions, "version_of", lambda python: None)
    monkeypatch.setattr(versions, "publish", lambda rows: None)
    monkeypatch.setattr("sys.argv", ["versions.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        versions.main()
    assert not ended.value.code and capsys.readouterr().out.count("not tried") == len(versions.ENVIRONMENTS)
    monkeypatch.setattr("sys.argv", ["versions.py", str(tmp_path), "--only", versions.ENVIRONMENTS[0].name])
    with pytest.raises(SystemExit, match="error: "):  # what was asked for by name
        versions.main()
