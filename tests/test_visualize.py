"""The tools that end in pictures, on a model that has hardly trained."""

import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

TINY = (
    "MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 32 SOLVER.MAX_ITER 21"
).split()


def run(*command, check=True):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def demo(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = run("tools/demo.py", "OUTPUT_DIR", str(folder), *TINY)
    return folder, done.stdout


def test_demo_ends_with_its_results_and_pictures(demo):
    folder, out = demo
    results = json.loads((folder / "results.json").read_text())
    for when in ("before", "after"):
        assert f"{when} training" in out and f"{results[when]['PQ']:.2f}" in out
        assert 0 <= results[when]["PQ"] < 50
    for name in ("predictions", "losses", "groups"):
        picture = matplotlib.image.imread(folder / f"{name}.png")
        assert str(folder / f"{name}.png") in out
        assert picture.shape[0] > 300 and np.std(picture[..., :3]) > 0.02  # not empty


def predict(demo, output, *images, check=True):
    weights = str(demo[0] / "model_final.pth")
    given = ["--config-file", "configs/quick/pfpn_pgn.yaml", "--weights", weights, "--output", str(output)]
    return run("tools/predict.py", "--input", *map(str, images), *given, *TINY, check=check)


def test_predict_draws_each_image(demo, shapes, tmp_path):
    images = sorted((shapes / "gng_shapes" / "val").iterdir())[:2]
    predict(demo, tmp_path, *images)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{image.stem}.png" for image in images]
    for image in images:
        assert Image.open(tmp_path / f"{image.stem}.png").size == (512, 512)


def test_predict_never_overwrites_its_input(demo, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64)).save(photo)
    before = photo.read_bytes()
    done = predict(demo, tmp_path, photo, check=False)
    assert done.returncode == 1 and "would overwrite" in done.stderr and photo.read_bytes() == before


@pytest.mark.parametrize(
    "image, message",
    [("nothing.jpg", "--input: nothing.jpg not found"), ("README.md", "--input: README.md cannot be read as an image")],
)
def test_predict_names_the_bad_image(image, message, demo, tmp_path):
    done = predict(demo, tmp_path, image, check=False)
    assert done.returncode == 1 and f"error: {message}" in done.stderr and "Traceback" not in done.stderr
