import importlib.util
import sys
import zipfile

import pytest

spec = importlib.util.spec_from_file_location("make_venv", "tools/make_venv.py")
make_venv = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_venv)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_venv.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        make_venv.main()
    return str(stopped.value)


def test_wheel_is_stripped_of_what_is_compiled(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("pack/__init__.py", "x = 1")
        wheel.writestr("pack/_C.so", b"\x7fELF")
        wheel.writestr("pack-1.dist-info/RECORD", "pack/__init__.py,sha256=x,5\npack/_C.so,sha256=y,4\n")
    make_venv.strip_compiled(tmp_path / "a.whl", tmp_path / "b.whl")
    with zipfile.ZipFile(tmp_path / "b.whl") as wheel:
        assert wheel.namelist() == ["pack/__init__.py", "pack-1.dist-info/RECORD"]
        assert wheel.read("pack-1.dist-info/RECORD") == b"pack/__init__.py,sha256=x,5\n"


def test_wrong_python_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    message = run(monkeypatch, str(tmp_path / "v"))
    assert "checking Python" in message and "Python 3.9" in message and "PYTHON=" in message
    assert not (tmp_path / "v").exists()


def test_a_folder_of_something_else_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    assert "no virtual environment" in run(monkeypatch, str(tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_another_wheel_than_the_one_tried_is_refused(monkeypatch):
    def download(step, *command):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/{make_venv.DETECTRON2_WHEEL.format('cp310')}", "w") as file:
            file.write("something else")

    monkeypatch.setattr(make_venv, "run", download)
    with pytest.raises(SystemExit, match="checking Detectron2.*\n.*sha256"):
        make_venv.install_detectron2("python")


def test_a_step_that_fails_is_named(capfd):
    with pytest.raises(SystemExit, match="(?s)while trying it:.*exit status 3"):
        make_venv.run("trying it", sys.executable, "-c", "raise SystemExit(3)")
