"""What is left of a network whose norms were replaced, before and after fine-tuning, on a small dataset drawn here."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2

from gng_d2.errors import InputError
from study import finetune, retention
from study.pretrained import linear_head, load_mobilenet, right, split

ROW = {"seed": 0, "image_size": 64, "old_head": 50.0, "new_head": 60.0, "last_error": 0.5, "machine": "a"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three classes of 32 images. Each class has a hue, and each image of a class has other last columns."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(3):
        (root / f"class{label}").mkdir()
        for number in range(32):
            pixels = draw.integers(0, 120, (80, 100, 3), dtype=np.uint8)
            pixels[..., label] += 100
            pixels[:] = np.where(np.arange(100)[:, None] > 95, (number * 8) % 256, pixels)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{number:02}.png")
    return str(root)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    model = mobilenet_v2()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1  # one batch makes its statistics
    model(torch.randn(16, 3, 64, 64) + torch.randn(16, 3, 1, 1))
    torch.save(model.state_dict(), path)
    return str(path)


def test_a_split_has_20_and_10_images_of_each_class_and_none_twice(root):
    one, again, other = split(root, 32, 0), split(root, 32, 0), split(root, 32, 1)
    assert one.train.shape == (60, 3, 32, 32) and one.test.shape == (30, 3, 32, 32) and one.train.dtype == torch.uint8
    assert one.train_labels.bincount().tolist() == [20] * 3 and one.test_labels.bincount().tolist() == [10] * 3
    assert torch.equal(one.train, again.train) and not torch.equal(one.train, other.train)
    images = torch.cat([one.train, one.test]).flatten(1)
    assert len(images.unique(dim=0)) == 90
    assert one.train[one.train_labels == 2].float().mean((0, 2, 3)).argmax() == 2


def test_too_few_images_and_other_weights_are_named(tmp_path, root):
    (tmp_path / "class").mkdir()
    for number in range(29):
        Image.new("RGB", (8, 8)).save(tmp_path / "class" / f"{number}.png")
    with pytest.raises(InputError, match="a class has 29 images, and 30 are needed"):
        split(str(tmp_path), 32, 0)
    with pytest.raises(InputError, match="--data"):
        split(str(tmp_path / "nowhere"), 32, 0)
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="--weights"):
        load_mobilenet(str(tmp_path / "other.pth"))


def test_the_head_is_at_the_optimum_of_logistic_regression():
    labels = torch.arange(3).repeat(20)
    inputs = (torch.randn(60, 5) + 2 * F.one_hot(labels, 5)).double() + 3
    head, scale = linear_head(inputs, labels), inputs.std(0).mean()
    weight = nn.Parameter(head.weight.detach() * scale)
    logits = inputs / scale @ weight.T + head.bias.detach()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels) + 5e-4 * (weight**2).sum(), weight)
    assert gradient.abs().max() < 1e-3
    assert right(head, inputs, labels) > 80


def test_the_head_does_not_depend_on_the_scale_and_the_mean_of_the_features():
    """The features of a lost network deviate by a ten thousandth of their mean, but much may be left in them."""
    labels = torch.arange(3).repeat(20)
    inputs = (torch.randn(60, 5) + 2 * F.one_hot(labels, 5)).double()
    shifted = 5e-5 * inputs + 0.5
    expected = linear_head(inputs, labels)(inputs)
    torch.testing.assert_close(linear_head(shifted, labels)(shifted), expected, rtol=1e-3, atol=1e-3)
    assert right(linear_head(shifted.float(), labels), shifted.float(), labels) > 80


def test_tables(line_of):
    rows = [retention.RetentionRow(norm="BN", affine="trained", images=0, **ROW)]
    for seed, left in enumerate((40.0, 44.0)):
        for images in (16, 64):
            rows.append(
                retention.RetentionRow(
                    norm="GN1", affine="calibrated", images=images, **{**ROW, "seed": seed, "old_head": left + images}
                )
            )
    text = retention.table(rows)
    half = 12.7062 * np.std([40, 44], ddof=1) / math.sqrt(2)
    assert line_of(text.split("\n\n")[0], "GN1") == ["GN1", "-", "-", f"106.0 ± {half:.1f}", "-", "-", "60.0 ± 0.0"]
    assert line_of(text.split("\n\n")[2], "GN1")[1:] == [f"58.0 ± {half:.1f}", f"106.0 ± {half:.1f}"]
    assert "With batch norm 50.0" in text

    rest = {"epochs": 2, "batch_size": 8, "image_size": 64, "train_loss": 1.0, "machine": "a"}
    rows = [finetune.FinetuneRow("FrozenBN", "trained", 100, 0.01, accuracy=70.0, **rest)]
    for seed, shift in enumerate((0.0, 2.0)):
        rows.append(finetune.FinetuneRow("FrozenBN", "trained", seed, 0.01, accuracy=80 + shift, **rest))
        rows.append(finetune.FinetuneRow("GN1", "calibrated", seed, 0.01, accuracy=79 + shift, **rest))
        rows += [finetune.FinetuneRow("GN1", "fresh", seed, lr, accuracy=900 * lr, **rest) for lr in (0.01, 0.03)]
    text = finetune.table(rows)
    _, frozen, calibrated, fresh = cells_of(text)
    assert frozen[2:] == ["0.01", "2", f"81.0 ± {half / 2:.1f}", ""]
    assert calibrated[1:] == ["calibrated", "0.01", "2", f"80.0 ± {half / 2:.1f}", "-1.0 ± 0.0"]
    assert fresh[1:5] == ["fresh", "0.03", "2", "27.0 ± 0.0"]
    assert "0.01: 70.0" in text and "dash" not in text
    text = finetune.table([row for row in rows if (row.norm, row.seed) != ("FrozenBN", 1) and row.seed != 100])
    assert [cells[3] for cells in cells_of(text)] == ["seeds", "1", "2", "2"]
    assert len(cells_of(finetune.table(rows[:1]))) == 1  # the rate was searched for, and nothing else trained yet


def cells_of(text):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines]


def test_a_cell_of_fewer_seeds_says_so(line_of):
    rows = [
        retention.RetentionRow(norm=norm, affine="kept", images=0, **{**ROW, "seed": seed})
        for norm, seeds in (("GN1", (0, 1, 2)), ("PGN", (0, 2)))
        for seed in seeds
    ]
    text = retention.table(rows)
    assert line_of(text, "GN1")[2] == "50.0 ± 0.0" and line_of(text, "PGN")[2] == "50.0 ± 0.0 (2 of 3 seeds)"
    assert "over 3 seeds" in text and "A dash is not measured." in text


@pytest.mark.slow
def test_retention_goes_on_with_the_rows_that_are_missing(root, weights, tmp_path, reproduce, monkeypatch):
    out = tmp_path / "rows.json"
    words = ["retention", "--data", root, "--weights", weights, "--image-size", "64", "--seeds", "0", "--json", out]
    said = reproduce(*words, "--norms", "GN1", "--plot", tmp_path / "plot.png")
    rows = json.loads(out.read_text())
    assert [(row["norm"], row["affine"], row["images"]) for row in rows] == [
        ("BN", "trained", 0),
        ("GN1", "calibrated", 64),
        ("GN1", "kept", 0),
        ("GN1", "fresh", 0),
    ]
    assert rows[0]["old_head"] > 50 and rows[1]["last_error"] > 0 and rows[2]["last_error"] is None
    assert "| GN1 " in said and (tmp_path / "plot.png").stat().st_size > 0
    measured = []
    monkeypatch.setattr(retention, "replaced", lambda model, norm, *_: measured.append(norm) or model)
    reproduce(*words, "--norms", "GN1", "PGN", "--resume")
    assert measured == ["PGN"] * 3
    assert json.loads(out.read_text())[:4] == rows


@pytest.mark.slow
def test_fine_tuning_fixes_its_rate_first_and_trains_each_run_once(root, weights, tmp_path, reproduce, monkeypatch):
    trained = []

    def train(run, reference, data):
        trained.append(run)
        return finetune._row(run, 100 - 1000 * abs(run.lr - 0.001), 1.0)

    words = ["finetune", "--data", root, "--weights", weights, "--image-size", "64", "--seeds", "0", "--norms", "GN1"]
    words += ["--epochs", "1", "--json", tmp_path / "rows.json"]
    with monkeypatch.context() as context:
        context.setattr(finetune, "train", train)
        reproduce(*words)
        assert [(run.seed, run.lr) for run in trained[:4]] == [(100, rate) for rate in finetune.RATES]
        assert [(run.norm, run.affine, round(run.lr, 6)) for run in trained[4:]] == [
            ("FrozenBN", "trained", 0.001),
            *(("GN1", affine, lr) for affine in ("calibrated", "fresh") for lr in (0.001, 0.003, 0.01)),
            ("BN", "trained", 0.001),
        ]
        rows = json.loads((tmp_path / "rows.json").read_text())
        (tmp_path / "rows.json").write_text(json.dumps(rows[:7]))  # as if stopped in the first seed
        said = reproduce(*words, "--seeds", "1", "--resume")
        assert [(run.seed, run.norm) for run in trained[12:]] == [
            (1, "FrozenBN"),
            *[(1, "GN1")] * 6,
            (1, "BN"),
        ]
        assert json.loads((tmp_path / "rows.json").read_text())[:7] == rows[:7]
        counts = {tuple(cells[:3]): cells[3] for cells in cells_of(said)}
        assert counts["FrozenBN", "trained", "0.001"] == counts["GN1", "calibrated", "0.001"] == "2"
        assert counts["GN1", "fresh", "0.001"] == counts["BN", "trained", "0.001"] == "1"
        with pytest.raises(SystemExit, match="holds rows with image size 64; here the image size is 32"):
            reproduce(*words, "--image-size", "32", "--resume")
    assert len(trained) == 20


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN1"])
def test_a_run_changes_the_norms_that_it_should(norm, root, weights):
    reference, data = load_mobilenet(weights), split(root, 64, 0)
    run = finetune.FinetuneRun(norm, "calibrated" if norm == "GN1" else "trained", 0, 0.001, 1, 8, 64)
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    made, make = [], finetune._model
    finetune._model = lambda *args: made.append(make(*args)) or made[-1]
    try:
        row = finetune.train(run, reference, data)
    finally:
        finetune._model = make
    assert 0 < row.accuracy <= 100 and row.train_loss < 2 * math.log(3)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    state = made[0].state_dict()
    name = "features.1.conv.2"
    assert torch.equal(state[f"{name}.weight"], before[f"{name}.weight"]) == (norm == "FrozenBN")
    if norm != "GN1":
        assert torch.equal(state[f"{name}.running_mean"], before[f"{name}.running_mean"]) == (norm == "FrozenBN")
    assert not torch.equal(state["features.0.0.weight"], before["features.0.0.weight"])
