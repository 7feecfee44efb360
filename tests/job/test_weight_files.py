"""What a file of weights may hold, and what is run of it: nothing."""

import collections
import io
import os
import pickle
import shutil
import tarfile
from contextlib import suppress

import numpy as np
import pytest
import ready_process
import torch
from needs import needs_torch

from command_line import add_trust, tool_parser
from gng_d2.errors import InputError
from gng_d2.job.build import build
from gng_d2.job.checkpoint import Checkpointer, load_model
from gng_d2.job.config import load_config
from gng_d2.job.engine import setup_job
from gng_d2.job.weight_files import files_are_trusted, read_weight_file, save_weight_file


class Runs:
    """Makes the folder ``path`` when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "half": np.ones(3, np.float16),
    "integers": np.array([1, 2], np.int64),
    "big endian": np.arange(3, dtype=">f4"),
    "empty": np.zeros((0, 3), np.float32),
    "array of texts": np.array(["a", "bc"]),
    "objects": np.array([1, "a", None], dtype=object),
    "scalar": np.float32(3),
    "boolean": np.bool_(True),
}
DATA = {
    "numbers": [1, 2.5, True, None, 1 + 2j, 10**30],
    "texts": ["a", "ü", b"raw", bytearray(b"x"), b""],
    "containers": [(1,), {1, 2}, frozenset({3}), collections.OrderedDict(a=1), collections.defaultdict(list, b=[2])],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_arrays_numbers_texts_and_containers_is_read(protocol, tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps({**ARRAYS, **DATA}, protocol))
    read = read_weight_file(str(path))
    plain = pickle.loads(path.read_bytes())
    for name, array in ((name, plain[name]) for name in ARRAYS):
        assert type(read[name]) is type(array) and read[name].dtype == array.dtype, name
        assert np.array_equal(read[name], array), name
    assert {name: read[name] for name in DATA} == DATA


def test_a_pickle_of_python_2_is_read(tmp_path):
    """Caffe2's files: bytes for texts, and NumPy's and Python's old names of modules."""
    path = tmp_path / "R-50.pkl"
    path.write_bytes(
        b"\x80\x02}q\x00(U\x07conv1_wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85q"
        b"\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x02\x85q\x08cnumpy\ndtype\nq\tU\x02f4q\nK\x00K\x01\x87q\x0bRq\x0c(K\x03U"
        b"\x01<q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0q\x0ftq\x10bU"
        b"\x01sq\x11c__builtin__\nset\nq\x12]q\x13K\x01a\x85q\x14Rq\x15u."
    )
    read = read_weight_file(str(path))
    assert np.array_equal(read["conv1_w"], np.array([1, -2], np.float32)) and read["s"] == {1}


def evil(kind, path):
    if kind == "reduce":
        return pickle.dumps({"model": {"w": Runs(path)}, "__author__": "us"})
    if kind == "array of objects":
        return pickle.dumps({"w": np.array([Runs(path)], dtype=object)})
    if kind == "getattr":  # reaches anything by what looks like data
        return b"cbuiltins\ngetattr\n(cnumpy\nndarray\nVtofile\ntR."
    if kind == "dotted":
        return b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.sum\x93."
    if kind == "numpy":
        return b"cnumpy\nsave\n."
    return b"c_codecs\nencode\n(Va\nVzip\ntR."


@pytest.mark.parametrize("kind", ["reduce", "array of objects", "getattr", "dotted", "numpy", "codec"])
def test_a_pickle_that_wants_more_is_refused_by_name_and_not_run(kind, tmp_path):
    (tmp_path / "evil.pkl").write_bytes(evil(kind, tmp_path / "ran"))
    with pytest.raises(InputError, match="evil.pkl") as error:
        Checkpointer(torch.nn.Linear(2, 2)).load(str(tmp_path / "evil.pkl"))
    assert not (tmp_path / "ran").exists()
    if kind != "codec":
        assert "--trust-files" in str(error.value) and "Nothing of it was run" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", ["pth", "pyth", "pt"])
def test_what_torch_saved_is_refused_by_name_and_not_run(suffix, tmp_path):
    path = tmp_path / f"evil.{suffix}"
    torch.save({"model": {"w": Runs(tmp_path / "ran")}}, path)
    with pytest.raises(InputError, match=r"holds more than data: it asks for (os|posix).mkdir.*--trust-files") as error:
        Checkpointer(torch.nn.Linear(2, 2)).load(str(path))
    assert "weights_only" not in str(error.value) and not (tmp_path / "ran").exists()


def test_a_pickle_changes_no_function_of_numpy(tmp_path):
    """It sets the function's __defaults__, by the op that restores an object's state."""
    function = np.zeros(1).__reduce_ex__(5)[0]
    name = f"c{function.__module__}\n{function.__name__}\n".encode()
    path = tmp_path / "sets.pkl"
    path.write_bytes(b"\x80\x04" + name + b"(N}\x8c\x0c__defaults__(K\x01tstb.")
    before = function.__defaults__
    try:
        with suppress(InputError):
            read_weight_file(str(path))
        assert function.__defaults__ == before
    finally:
        function.__defaults__ = before


def test_the_format_of_before_2017_is_not_read(tmp_path):
    """PyTorch up to 2.5 unpickles it whatever weights_only says."""
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        content = pickle.dumps(Runs(tmp_path / "ran"))
        entry = tarfile.TarInfo("storages")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(InputError, match="old.pth is a tar archive"):
        read_weight_file(str(tmp_path / "old.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
def test_a_trusted_file_is_opened(name, tmp_path, monkeypatch):
    content = {"model": {"w": Runs(tmp_path / "ran")}, "__author__": "us"}
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    monkeypatch.setenv("GNG_D2_TRUST_FILES", "")  # restored after the test
    parser = tool_parser("")
    add_trust(parser)
    parser.parse_args([])
    assert not files_are_trusted()
    parser.parse_args(["--trust-files"])
    assert files_are_trusted()
    read_weight_file(str(tmp_path / name))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.slow
def test_nothing_runs_while_a_job_is_checked(tmp_path):
    """In MODEL.WEIGHTS and in last_checkpoint, which may name any file."""
    (tmp_path / "evil.pkl").write_bytes(evil("reduce", tmp_path / "ran"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last_checkpoint").write_text("../evil.pkl")
    config = ["--config-file", "configs/quick/pfpn_pgn.yaml"]
    for more in (["MODEL.WEIGHTS", str(tmp_path / "evil.pkl")], ["--resume", "OUTPUT_DIR", str(tmp_path / "out")]):
        done = ready_process.run("tools/train_net.py", [*config, *more])
        assert done.returncode == 1 and "evil.pkl holds more than data" in done.stderr
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "options",
    [{"weights_only": True}, {"weights_only": False}]
    + [pytest.param({"mmap": True}, marks=needs_torch(2, 1, "torch.load(mmap=True)"))],
)
def test_what_is_saved_is_torchs_own_and_read_by_any_program(tmp_path, options):
    content = {"model": torch.nn.Conv2d(3, 8, 3).state_dict(), "iteration": 7}
    save_weight_file(str(tmp_path / "a.pth"), content)
    read = torch.load(tmp_path / "a.pth", **options)
    assert read["iteration"] == 7 and torch.equal(read["model"]["weight"], content["model"]["weight"])
    assert read_weight_file(str(tmp_path / "a.pth"))["iteration"] == 7
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_no_flipped_bit_of_a_file_changes_what_is_read(tmp_path):
    """Some stand where nobody reads, in padding say. All others are errors, each bit of a weight among them."""
    path, weight, refused = tmp_path / "a.pth", torch.arange(1.0, 4), set()
    save_weight_file(str(path), {"w": weight})
    content = path.read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            read = read_weight_file(str(path))
            assert [*read] == ["w"] and torch.equal(read["w"], weight), at
        except InputError as error:
            assert "a.pth" in str(error)
            refused.add(at)
    first = content.index(weight.numpy().tobytes())
    assert refused >= {*range(first, first + 12)}


def flip_a_byte_of_a_weight(path):
    content = bytearray(path.read_bytes())
    name = "sem_seg_head.p2.0.weight"
    at = content.index(torch.load(path)["model"][name].numpy().tobytes())
    content[at + 100] ^= 1
    path.write_bytes(content)
    torch.load(path)  # sees nothing


@pytest.mark.parametrize("way", ["--resume", "MODEL.WEIGHTS", "--eval-only", "predict and export"])
def test_a_flipped_byte_of_a_weight_is_an_error_in_every_tool(way, whole, shapes, tmp_path):
    config, path = "configs/quick/pfpn_pgn.yaml", tmp_path / "model_final.pth"
    shutil.copy(whole, path)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    weights = ["MODEL.WEIGHTS", str(path)]
    use = {
        "--resume": lambda: setup_job(config, ["OUTPUT_DIR", str(tmp_path)], resume=True),
        "MODEL.WEIGHTS": lambda: setup_job(config, ["OUTPUT_DIR", str(tmp_path / "out"), *weights]),
        "--eval-only": lambda: setup_job(config, ["OUTPUT_DIR", str(tmp_path / "out"), *weights], eval_only=True),
        "predict and export": lambda: load_model(build(load_config(config)), str(path)),
    }[way]
    use()
    flip_a_byte_of_a_weight(path)
    with pytest.raises(InputError, match="model_final.pth is damaged"):
        use()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    Checkpointer(build(load_config("configs/quick/pfpn_pgn.yaml")), str(folder)).save("model_final", iteration=1)
    return folder / "model_final.pth"


def test_pytorchs_older_format_is_read(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weight_file(str(tmp_path / "a.pth"))["w"], torch.ones(2))


def test_a_disk_that_fills_up_while_writing_is_one_line_and_leaves_the_old_file(tmp_path, limited_file_size):
    """PyTorch has an error of its own then, of positions in the file."""
    path = tmp_path / "a.pth"
    save_weight_file(str(path), {"a": torch.zeros(9)})
    before = path.read_bytes()
    with limited_file_size(10**5), pytest.raises(InputError, match=f"^cannot write {path}: File too large$"):
        save_weight_file(str(path), {str(i): torch.zeros(10**4) for i in range(9)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pth"]
