"""Table 4's experiment: the norms of the real ResNet, and whole runs of a small one on small images drawn here."""

import glob
import itertools
import os
import time

import numpy as np
import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from PIL import Image

import study.classifier
from gng_d2 import practical_num_groups
from gng_d2.errors import InputError
from gng_d2.job.resnet_weights import write_weights
from study.classifier import PET, Classifier, ClassifierRow, ClassifierRun, load_images, train
from study.rows import read_rows


def draw_image(path, color, draw):
    noise = draw.integers(-40, 40, (40, 36, 3))
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of 20, 10 and 15 images. Each folder has a color of its own."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count, color in (("blue", 20, (0, 0, 200)), ("green", 10, (0, 200, 0)), ("red", 15, (200, 0, 0))):
        (root / name).mkdir()
        for i in range(count):
            draw_image(root / name / f"{i}.png", color, draw)
    return str(root)


@pytest.fixture
def small_resnet(monkeypatch):
    """A ResNet with one block in place of 16."""

    def make_default_stages(depth, **kwargs):
        sizes = {"in_channels": 64, "out_channels": 64, "bottleneck_channels": 32}
        return [ResNet.make_stage(BottleneckBlock, 1, **sizes, **kwargs)]

    monkeypatch.setattr(ResNet, "make_default_stages", staticmethod(make_default_stages))
    torch.set_num_threads(1)


def run_of(norm="PGN", seed=0, **changed):
    return ClassifierRun(
        **{
            **{"norm": norm, "seed": seed, "dataset": "colors", "classes": 3, "train_images": 36, "test_images": 9},
            **{"depth": 50, "weights": "", "epochs": 3, "image_size": 32, "batch_size": 8, "lr": 0.025, "amp": False},
            **changed,
        }
    )


def final_weights(folder):
    return torch.load(os.path.join(folder, "model_final.pth"))["model"]


def test_every_norm_of_the_real_resnet_has_its_practical_groups():
    torch.manual_seed(0)
    model = Classifier(50, "PGN", 102)
    convs = [m for m in model.modules() if isinstance(m, Conv2d)]
    assert len(convs) == 53
    assert [c.norm.num_groups for c in convs] == [practical_num_groups(c.in_channels, c.out_channels) for c in convs]
    assert len({c.norm.num_groups for c in convs}) > 3
    torch.manual_seed(0)
    other = Classifier(50, "GN1", 102)
    assert {m.norm.num_groups for m in other.modules() if isinstance(m, Conv2d)} == {1}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_a_seed_means_the_same_images_whatever_the_norm(small_resnet, root, tmp_path, monkeypatch):
    def batches_of(norm, seed):
        class Recording(Classifier):
            def forward(self, batch):
                seen.extend(batch if self.training else [])
                return super().forward(batch)

        seen = []
        monkeypatch.setattr(study.classifier, "Classifier", Recording)
        train(run_of(norm, seed, epochs=1), load_images("colors", root), str(tmp_path / f"{norm}{seed}"))
        return seen

    gn, gn1, other = batches_of("GN", 1), batches_of("GN1", 1), batches_of("GN", 2)
    assert len(gn) == 2 * 4 and all(map(torch.equal, gn, gn1))
    assert not any(map(torch.equal, gn[::2], other[::2]))


@pytest.mark.slow
def test_stopped_and_resumed_is_as_never_stopped(small_resnet, root, tmp_path):
    """It is stopped after step 5 of 13 and resumes from the checkpoint after step 4, with another number of workers."""
    images, whole, cut = load_images("colors", root), str(tmp_path / "whole"), str(tmp_path / "cut")
    error = train(run_of(), images, whole, workers=2)

    def stop(done, calls=itertools.count()):
        if next(calls) == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(run_of(), images, cut, on_step=stop)
    assert not os.path.exists(os.path.join(cut, "model_final.pth"))

    done = []
    assert train(run_of(), images, cut, on_step=done.append) == error
    assert done == [4] + 9 * [1]
    expected, got = final_weights(whole), final_weights(cut)
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    done.clear()
    assert train(run_of(), images, cut, on_step=done.append) == error and done == [13]


def test_when_its_time_is_over_it_writes_a_checkpoint_and_goes_on_from_there(small_resnet, root, tmp_path):
    images, whole, cut = load_images("colors", root), str(tmp_path / "whole"), str(tmp_path / "cut")
    error = train(run_of(), images, whole)
    done = []
    assert [train(run_of(), images, cut, on_step=done.append, until=0.0) for _ in range(3)] == [None] * 3
    assert done == [0, 1, 1, 1, 2, 1]  # a step each time
    assert os.listdir(cut).count("model_0000002.pth") == len(glob.glob(os.path.join(cut, "*.pth"))) == 1
    assert train(run_of(), images, cut, until=time.monotonic() + 1000) == error
    expected, got = final_weights(whole), final_weights(cut)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_split_is_of_each_class_and_the_same_every_time(root):
    images = load_images("colors", root)
    assert images.classes == ["blue", "green", "red"]
    paths = [{images.train.dataset.samples[i] for i in part.indices} for part in (images.train, images.test)]
    assert paths[0].isdisjoint(paths[1]) and len(paths[0] | paths[1]) == 45
    assert np.bincount([label for _, label in paths[0]]).tolist() == [16, 8, 12]
    assert load_images("colors", root).train.indices == images.train.indices

    fewest = load_images("colors", root, 2)
    assert fewest.classes == ["green", "red"]
    assert {(label, np.asarray(image).mean((0, 1)).argmax()) for image, label in fewest.test} == {(0, 1), (1, 0)}


def test_oxford_iiit_pet_has_its_own_split(tmp_path):
    draw, base = np.random.default_rng(0), tmp_path / "oxford-iiit-pet"
    for folder in ("images", "annotations"):
        (base / folder).mkdir(parents=True)
    for name in ("Abyssinian_1", "pug_1", "pug_2"):
        draw_image(base / "images" / f"{name}.jpg", (90, 90, 90), draw)
    (base / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\npug_1 2 2 1\n")
    (base / "annotations" / "test.txt").write_text("pug_2 2 2 1\n")
    images = load_images(PET, str(tmp_path))
    assert images.classes == ["Abyssinian", "Pug"]
    assert [label for _, label in images.train] == [0, 1] and [label for _, label in images.test] == [1]


@pytest.mark.slow
def test_training_starts_from_converted_weights(small_resnet, root, tmp_path):
    torch.manual_seed(5)
    trained = Classifier(50, "GN", 7).resnet.state_dict()
    weights = {k: v.numpy() for k, v in trained.items() if not k.startswith("linear")}
    file, images = str(tmp_path / "R.pkl"), load_images("colors", root)
    write_weights(file, weights, "the test")
    train(run_of(epochs=1, lr=1e-9), images, str(tmp_path / "run"), weights=file)
    got = final_weights(tmp_path / "run")
    for name, value in weights.items():
        np.testing.assert_allclose(got[f"resnet.{name}"], value, atol=1e-6)

    del weights["res2.0.conv2.weight"]
    write_weights(file, weights, "the test")
    with pytest.raises(InputError, match="1 of the .* weights .* for instance res2.0.conv2.weight"):
        train(run_of(), images, str(tmp_path / "other"), weights=file)


@pytest.mark.slow
def test_the_tool_learns_and_does_no_finished_run_again(small_resnet, root, tmp_path, reproduce, line_of):
    output, json_file = tmp_path / "runs", tmp_path / "rows.json"

    def tool(*words):
        small = "--epochs 8 --image-size 32 --batch-size 8 --lr 0.025 --workers 0"
        return reproduce(*("table4", "--data", root, *small.split(), "--output", output, "--json", json_file, *words))

    tool("--norms", "GN", "PGN+WS", "--seeds", 0)
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*/row.json")}
    assert len(finished) == 2
    out = tool("--norms", "GN", "PGN+WS", "--seeds", 0, 1, "--minutes", 0)
    assert "2 of 4 runs are finished; the same command goes on where it was" in out
    out = tool("--norms", "GN", "PGN+WS", "--seeds", 0, 1)
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())

    rows = read_rows(json_file, ClassifierRow)
    assert [(row.norm, row.seed) for row in rows] == [("GN", 0), ("PGN+WS", 0), ("GN", 1), ("PGN+WS", 1)]
    for row in rows:
        assert row.error < 40  # of 67 by chance
        assert (row.dataset, row.classes, row.train_images, row.test_images) == ("caltech-101", 3, 36, 9)
    one, two = (row.error for row in rows if row.norm == "GN")
    assert line_of(out, "GN    ") == ["GN", "24.021", f"{(one + two) / 2:.3f}", f"{abs(one - two) / 2**0.5:.3f}", "2"]

    with pytest.raises(SystemExit, match=r"error: .*GN-seed0 holds a run with lr 0.025 \(now 0.1\)"):
        tool("--norms", "GN", "--lr", 0.1)


def test_what_no_run_can_work_with_is_refused(root, tmp_path, reproduce):
    command = ["table4", "--output", tmp_path, "--data"]
    with pytest.raises(SystemExit, match="error: unknown norm 'PNG'"):
        reproduce(*command, root, "--norms", "PNG")
    with pytest.raises(SystemExit, match="error: --data .*nowhere: no images of caltech-101"):
        reproduce(*command, "nowhere")
