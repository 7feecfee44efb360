import os

import pytest
import torch

from gng_d2.errors import InputError
from gng_d2.records import check_outputs, machine, read_rows, write_rows


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"shape": [1, 2], "milliseconds": 0.5, "implementation": "native"}, {"shape": [], "milliseconds": None}]
    write_rows(path, rows)
    assert read_rows(path) == rows
    with pytest.raises(TypeError):
        write_rows(path, [{"not JSON": object()}])
    assert read_rows(path) == rows
    assert os.listdir(tmp_path) == ["rows.json"]


def test_outputs_are_refused_before_the_work(tmp_path):
    check_outputs(None, str(tmp_path / "new" / "rows.json"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/rows.json"):
        check_outputs(str(tmp_path / "file" / "rows.json"))
    with pytest.raises(InputError, match="it is a folder"):
        check_outputs(str(tmp_path))


def test_machine_names_threads_and_pytorch():
    assert f"{torch.get_num_threads()} thread" in machine()
    assert torch.__version__.partition("+")[0] in machine()
