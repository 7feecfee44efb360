"""The demo's pictures and results, of a model that was hardly trained."""

import json

import matplotlib.image
import numpy as np
import pytest
import quick_models
import ready_process

pytestmark = pytest.mark.slow

TINY = [*quick_models.MODEL, "SOLVER.MAX_ITER", "21", "SOLVER.IMS_PER_BATCH", "1", "INPUT.MIN_SIZE_TRAIN", "(64,)"]


@pytest.fixture(scope="module")
def demo(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = ready_process.run("tools/demo.py", ["OUTPUT_DIR", str(folder), *TINY])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
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
