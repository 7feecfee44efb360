"""Table 3's experiment on a small MNIST that is made here."""

import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gng_d2.errors import InputError
from study.mlp import MLPRow, MLPRun, load_mnist, mlp, train, train_all
from study.rows import read_rows


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A root with 256 and 64 images of noise around a pattern for each digit. Digit 1 is twice as frequent."""
    root = tmp_path_factory.mktemp("data")
    (root / "MNIST" / "raw").mkdir(parents=True)
    draw = np.random.default_rng(0)
    patterns = draw.integers(0, 200, (10, 28, 28))
    for name, count in (("train", 256), ("t10k", 64)):
        labels = (np.arange(count) % 11).astype(np.uint8)
        labels[labels == 10] = 1
        images = (patterns[labels] + draw.integers(0, 55, (count, 28, 28))).astype(np.uint8)
        raw = root / "MNIST" / "raw"
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 0x803, count, 28, 28) + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + labels.tobytes())
    return str(root)


def sets(root):
    return load_mnist(root, True), load_mnist(root, False)


def test_a_seed_means_the_same_weights_and_order_whatever_the_groups(mnist, monkeypatch):
    """The inputs of the first layer and the initial weights are recorded, which the training does not know."""
    seen = {}
    for groups in (1, 64, 512):

        def recording(num_groups):
            model = mlp(num_groups)
            weights = [p.detach().clone() for p in model.parameters()]
            seen[groups] = (weights, batches := [])
            model[0].register_forward_pre_hook(lambda _, args: batches.append(args[0].detach().clone()))
            assert model[1].num_groups == groups
            return model

        monkeypatch.setattr("study.mlp.mlp", recording)
        train(MLPRun.of(groups, 3, epochs=2), *sets(mnist))
    for weights, batches in (seen[64], seen[512]):
        assert all(map(torch.equal, weights, seen[1][0]))
        assert len(batches) == 5 and all(map(torch.equal, batches, seen[1][1]))
    assert not torch.equal(seen[1][1][0], seen[1][1][2])  # another order in the second epoch


@pytest.mark.slow
def test_groups_of_one_number_give_a_constant_classifier(mnist):
    """In Table 3's last column the hidden output is the bias, so the best prediction is the most frequent class."""
    (images, labels), test_set = sets(mnist)
    model = mlp(512)
    torch.nn.init.normal_(model[1].bias)
    torch.testing.assert_close(model[:2](images), model[1].bias.expand(256, 512), rtol=0, atol=1e-3)
    row = train(MLPRun.of(512, 0, epochs=60), (images, labels), test_set)
    assert row.test_error == pytest.approx(100 * (1 - (test_set[1] == 1).float().mean().item()))
    frequency = torch.bincount(labels) / len(labels)
    entropy = -(frequency * frequency.log()).sum().item()  # the lowest loss of a constant classifier
    assert sum(row.train_loss[-2:]) / 2 == pytest.approx(entropy, abs=0.005)  # an epoch's two batches
    assert train(MLPRun.of(64, 0, epochs=10), (images, labels), test_set).test_error < 20


def test_the_curve_is_the_mean_over_windows_of_iterations(mnist):
    row = train(MLPRun.of(8, 0, epochs=75), *sets(mnist))
    assert row.iteration[-1] == 150 and len(row.iteration) == len(row.train_loss) == 100
    assert row.iteration[:2] == [2, 4]


@pytest.mark.slow
def test_stopped_and_started_again_is_as_never_stopped(mnist, line_of, tmp_path):
    """After a kill the finished runs are not trained again, and the rows are those of a command that was not killed."""
    output, json_file, plot = (tmp_path / name for name in ("runs", "rows.json", "curves.png"))
    words = f"--data {mnist} --groups 1 64 --seeds 0 1 --epochs 60 --output {output} --json {json_file} --plot {plot}"
    command = [sys.executable, "tools/reproduce.py", "table3", *words.split()]
    job = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (output / "groups1-seed0" / "row.json").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.001)
    job.kill()
    job.communicate()
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*/row.json")}
    assert len(finished) < 4

    done = subprocess.run([*command, "--processes", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert plot.stat().st_size > 10_000
    rows = read_rows(json_file, MLPRow)
    torch.set_num_threads(1)
    expected = [train(MLPRun.of(groups, seed, 60), *sets(mnist)) for seed in (0, 1) for groups in (1, 64)]
    assert rows == expected

    one, two = (row.test_error for row in rows if row.num_groups == 64)
    assert line_of(done.stdout, "64 (practical)")[:5] == [
        *("64 (practical)", "1.670", f"{(one + two) / 2:.3f}", f"{abs(one - two) / 2**0.5:.3f}", "2")
    ]


def test_the_tool(mnist, reproduce, line_of, tmp_path):
    files = ["--output", tmp_path / "runs", "--json", tmp_path / "rows.json", "--plot", tmp_path / "plot.png"]
    command = ["table3", "--data", mnist, "--groups", 1, 64, "--seeds", 5, "--epochs", 1, *files]
    out = reproduce(*command)
    rows = read_rows(tmp_path / "rows.json", MLPRow)
    assert [(row.num_groups, row.seed, row.epochs) for row in rows] == [(1, 5, 1), (64, 5, 1)]
    assert line_of(out, "1  ")[2:5] == [f"{rows[0].test_error:.3f}", "-", "1"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert reproduce(*command) == out  # finished runs are read


def test_missing_data_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--data .*file: MNIST cannot be read in"):
        train_all([MLPRun.of(1, 0, 1)], str(tmp_path / "file"), str(tmp_path / "output"))
