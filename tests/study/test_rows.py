from dataclasses import dataclass

import pytest
import torch

from gng_d2.errors import InputError
from study.rows import (
    commit,
    differences,
    finish_run,
    machine,
    markdown,
    mean_and_std,
    norm_in_path,
    open_run,
    read_rows,
    write_rows,
)


@dataclass(frozen=True)
class Run:
    norm: str
    epochs: int


@dataclass(frozen=True)
class Row(Run):
    errors: list[float]
    paper: float | None
    machine: str = ""


ROWS = [Row("GN", 20, [0.5, 1e-9], None), Row("PGN", 20, [], 2.0, "here")]


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "rows.json"
    write_rows(path, ROWS)
    assert read_rows(path, Row) == ROWS
    assert path.read_text().splitlines()[1:3] == [
        '{"norm": "GN", "epochs": 20, "errors": [0.5, 1e-09], "paper": null, "machine": ""},',
        '{"norm": "PGN", "epochs": 20, "errors": [], "paper": 2.0, "machine": "here"}',
    ]


def test_outside_of_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("study.rows.ROOT", str(tmp_path))
    assert commit() is None


@pytest.mark.parametrize("text", ["", "[", "[1]", '[{"norm": "GN"}]', '[{"other": 1}]', "{}x", "\xff"])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="rows.json holds no rows of "):
        read_rows(path, Row)


def test_a_run_is_new_then_finished(tmp_path):
    folder, run = str(tmp_path / "run"), Run("GN", 20)
    assert open_run(folder, run, Row) is None
    assert open_run(folder, run, Row) is None
    finish_run(folder, ROWS[0])
    assert open_run(folder, run, Row) == ROWS[0]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    folder = str(tmp_path / "run")
    open_run(folder, Run("GN", 20), Row)
    with pytest.raises(InputError, match=r"run holds a run with epochs 20 \(now 5\)\. Choose another --output"):
        open_run(folder, Run("GN", 5), Row)


def test_differences_are_found_by_dotted_key():
    there = {"a": 1, "b": {"c": [1], "d": {"e": 2}}, "gone": None}
    here = {"a": 1, "b": {"c": [1, 2], "d": {"e": 3}}, "new": 0}
    assert differences(there, here) == {"b.c": ([1], [1, 2]), "b.d.e": (2, 3), "new": (None, 0)}
    assert differences(there, there) == {}


def test_mean_and_std():
    assert mean_and_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert mean_and_std([4.0]) == (4.0, None)
    assert mean_and_std([]) == mean_and_std([1.0, None]) == (None, None)


def test_a_table_writes_numbers_as_asked_and_texts_as_they_are():
    text = markdown([["a", "1.50", 2, 0.12345], ["b", "x", 10, None]], ["name", "text", "count", "value"], ".2f")
    assert text.splitlines() == [
        "| name   | text   |   count |   value |",
        "|--------|--------|---------|---------|",
        "| a      | 1.50   |       2 |    0.12 |",
        "| b      | x      |      10 |       - |",
    ]


def test_machine_names_threads_and_pytorch():
    assert f"{torch.get_num_threads()} thread" in machine()
    assert torch.__version__.partition("+")[0] in machine()


def test_a_name_is_one_part_of_a_path():
    names = ["GN", "GN16", "GN/16", "GN/16+WS", "PGN+WS", "GN1", "GN/1", ""]
    parts = [norm_in_path(name) for name in names]
    assert len(set(parts)) == len(names) and all(part and "/" not in part for part in parts)
