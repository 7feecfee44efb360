import errno
import os

import numpy as np
import pytest

from gng_d2.errors import InputError
from gng_d2.job.files import (
    atomic_open,
    prepare_folder,
    prepare_outputs,
    save_figure,
    write_json,
)


@pytest.mark.parametrize("mode, content", [("w", "2 ± 1"), ("wb", b"\xff\x00")])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_is_there_whole_or_as_it_was(mode, content, old, tmp_path):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(ZeroDivisionError), atomic_open(path, mode) as file:
        file.write(content)
        file.flush()
        1 / 0
    assert os.listdir(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old
    with atomic_open(str(path), mode) as file:
        file.write(content)
        assert not path.exists() if old is None else path.read_bytes() == old
    assert path.read_bytes() == (content if mode == "wb" else content.encode())
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot write .*rows.json: No space left on device"):
        write_json(path, [1])
    assert os.listdir(tmp_path) == ["rows.json"] and path.read_text() == "old"


def test_a_full_device_is_named():
    with pytest.raises(InputError, match="cannot write /dev/full: No space left on device"):
        write_json("/dev/full", [1])
    write_json("/dev/null", [1])
    assert not os.path.isfile("/dev/null")


def test_a_full_disk_is_noticed_before_the_work(tmp_path, limited_file_size):
    with limited_file_size(1000), pytest.raises(InputError, match=f"cannot write {tmp_path}/a.json: File too large"):
        prepare_outputs(str(tmp_path / "a.json"))


def test_what_stands_in_the_way_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder", "file/rows.json", "nowhere/rows.json"):
        with pytest.raises(InputError, match=f"cannot write .*{name}: "):
            write_json(tmp_path / name, [])
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_errors_of_other_files_stay_theirs(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_open(tmp_path / "file"):
        open(tmp_path / "other")
    assert os.listdir(tmp_path) == []


def test_links_and_permissions_stay(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_json(link, {"a": np.float32(0.5)})
    assert link.is_symlink() and target.read_text() == '{\n "a": 0.5\n}'
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_figure_is_written_as_its_name_says(tmp_path):
    from matplotlib.figure import Figure

    save_figure(Figure(), tmp_path / "a.png", dpi=10)
    save_figure(Figure(), str(tmp_path / "a.PDF"), dpi=10)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "a.PDF").read_bytes()[:4] == b"%PDF"


def test_outputs_are_refused_before_the_work(tmp_path):
    prepare_outputs(None, str(tmp_path / "new" / "rows.json"), "/dev/null")
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file/rows.json: "):
        prepare_outputs(str(tmp_path / "file" / "rows.json"))
    with pytest.raises(InputError, match="it is a folder"):
        prepare_outputs(str(tmp_path))
    with pytest.raises(InputError, match="cannot write to "):
        prepare_folder(str(tmp_path / "file"))
