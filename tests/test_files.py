import os

import pytest
import torch

from gng_d2.errors import InputError
from gng_d2.files import check_outputs, machine, read_metrics, read_rows, write_rows


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


def test_records_of_a_run_that_was_killed_and_resumed(tmp_path):
    lines = [
        '{"iteration": 19, "total_loss": 1.0}',
        '{"iteration": 39, "total_loss": 2.0}',
        '{"iteration": 29, "bbox/AP": 5.0}',  # written with the next losses
        '{"iteration": 59, "total_loss": 3.0}',
        '{"iteration": 49, "bbox/AP": 6.0}',
        '{"iteration": 79, "total_lo',  # killed; resumed from iteration 40
        '{"iteration": 59, "total_loss": 4.0}',
        '{"iteration": 60, "bbox/AP": 7.0}',
    ]
    path = tmp_path / "metrics.json"
    path.write_text("\n".join(lines))
    records = [(r["iteration"], r.get("total_loss", r.get("bbox/AP"))) for r in read_metrics(path)]
    assert records == [(19, 1), (29, 5), (39, 2), (49, 6), (59, 4), (60, 7)]
