import pytest

from study.metrics import last_record, read_metrics


def test_metrics_of_a_run_that_was_killed_and_resumed(tmp_path):
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
    assert last_record(path)["iteration"] == 60


NO_RECORDS = [
    *(b"", b"\xff\xfe", b"[]", b"3", b"null", b"{}", b"{", b"[" * 5000),
    *(b'{"iteration": "x"}', b'{"iteration": true}', b'{"iteration": %s}' % (b"9" * 400)),
    *(b'{"iteration": 7, "total_loss": "1"}', b'{"iteration": 7, "bbox/AP": [1]}'),
]


@pytest.mark.parametrize("line", NO_RECORDS, ids=lambda line: line[:40])
def test_lines_that_are_no_records_are_left_out(line, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_bytes(line + b'\n{"iteration": 5, "total_loss": 1.0}\n' + line)
    assert read_metrics(path) == [{"iteration": 5, "total_loss": 1.0}] and last_record(path)["iteration"] == 5
    path.write_bytes(line)
    assert read_metrics(path) == [] and last_record(path)["iteration"] == -1


def test_records_of_a_run_that_diverged_are_records(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1, "total_loss": 1e40}\n{"iteration": 2, "total_loss": NaN}\n')
    assert [record["iteration"] for record in read_metrics(path)] == [1, 2]


def test_the_last_iteration_of_a_long_file_is_in_its_end(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("".join('{"iteration": %d, "total_loss": 1.0}\n' % i for i in range(5000)))
    assert path.stat().st_size > 2**17 and last_record(path)["iteration"] == 4999
    assert last_record(tmp_path / "missing")["iteration"] == -1
