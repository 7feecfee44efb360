import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image

from gng_d2.errors import InputError
from gng_d2.job.data import embedded
from gng_d2.job.data.shapes import STUFF, THINGS, draw_scene


def test_scene_is_deterministic_and_consistent():
    scenes = [draw_scene(np.random.default_rng([1, n])) for n in range(40)]
    again = draw_scene(np.random.default_rng([1, 7]))
    assert np.array_equal(scenes[7].image, again.image) and np.array_equal(scenes[7].segments, again.segments)
    assert not np.array_equal(scenes[7].image, scenes[8].image)
    seen = set()
    for scene in scenes:
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        assert set(np.unique(scene.segments)) == set(range(len(scene.classes)))
        stuff = [c for c in scene.classes if c in STUFF]
        assert len(stuff) == len(set(stuff)) and len(stuff) >= 1
        seen.update(scene.classes)
    assert seen == {*THINGS, *STUFF} and len(THINGS) >= 4 and len(STUFF) >= 3


def test_things_hide_each_other():
    """Somewhere a thing cuts another: a disc whose visible part is not convex enough to be whole."""
    cut = 0
    for n in range(40):
        scene = draw_scene(np.random.default_rng([1, n]))
        for index, name in enumerate(scene.classes):
            if name == "square":
                rows, columns = np.nonzero(scene.segments == index)
                touches_border = rows.min() == 0 or columns.min() == 0 or rows.max() == 127 or columns.max() == 127
                # a whole square, turned or not, fills at least half its box
                cut += not touches_border and len(rows) < 0.45 * np.ptp(rows) * np.ptp(columns)
    assert cut > 0


def test_loads_the_way_coco_does(shapes):
    records = DatasetCatalog.get("gng_shapes_val_separated")
    assert len(records) == 6
    for record in records:
        semantic = np.asarray(Image.open(record["sem_seg_file_name"]))
        things = semantic == 0
        assert set(np.unique(semantic)) <= set(range(len(STUFF) + 1))
        covered = np.zeros_like(things)
        for annotation in record["annotations"]:
            mask = mask_of(annotation)
            assert not (covered & mask).any()
            covered |= mask
            x, y, w, h = annotation["bbox"]
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1) == (x, y, w, h)
        assert np.array_equal(covered, things)
    assert DatasetCatalog.get("gng_shapes_val") and DatasetCatalog.get("gng_shapes_val_stuffonly")


def mask_of(annotation):
    return pycocotools.mask.decode(annotation["segmentation"]).astype(bool)


def test_ground_truth_scores_pq_100(shapes, tmp_path):
    name = "gng_shapes_val_separated"
    metadata = MetadataCatalog.get(name)
    annotations = {a["image_id"]: a for a in json.load(open(metadata.panoptic_json))["annotations"]}
    evaluator = COCOPanopticEvaluator(name, str(tmp_path))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        annotation = annotations[record["image_id"]]
        rgb = np.asarray(Image.open(os.path.join(metadata.panoptic_root, annotation["file_name"]))).astype(np.int64)
        segments = torch.as_tensor(rgb @ [1, 256, 256**2])
        info = []
        for segment in annotation["segments_info"]:
            things = metadata.thing_dataset_id_to_contiguous_id
            isthing = segment["category_id"] in things
            ids = things if isthing else metadata.stuff_dataset_id_to_contiguous_id
            info.append({"id": segment["id"], "isthing": isthing, "category_id": ids[segment["category_id"]]})
        evaluator.process([record], [{"panoptic_seg": (segments, info)}])
    result = evaluator.evaluate()["panoptic_seg"]
    assert result["PQ"] == result["PQ_th"] == result["PQ_st"] == 100


def test_ground_truth_scores_ap_100(shapes, tmp_path):
    name = "gng_shapes_val_separated"
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        instances = Instances((record["height"], record["width"]))
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]], dtype=torch.int64)
        instances.scores = torch.ones(len(boxes))
        masks = np.stack([mask_of(a) for a in record["annotations"]])
        instances.pred_masks = BitMasks(torch.as_tensor(masks)).tensor
        evaluator.process([record], [{"instances": instances}])
    result = evaluator.evaluate()
    assert result["bbox"]["AP"] == pytest.approx(100) and result["segm"]["AP"] == pytest.approx(100)


def test_same_seed_same_files(tmp_path):
    for run in ("a", "b"):
        embedded.draw(tmp_path / run, {"val": 3})
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 3 * 3 + 2
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.slow
def test_an_interrupted_preparation_is_not_trusted(tmp_path):
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", "from gng_d2.job.data import embedded; embedded.draw_if_missing()"],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while not list(tmp_path.glob(".*/*/train/*.jpg")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / embedded.NAME).exists()
    embedded.draw(tmp_path, {"val": 2})
    assert len(list((tmp_path / embedded.NAME / "val").iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*DETECTRON2_DATASETS"):
        embedded.draw(tmp_path / "file", {"val": 1})


def test_a_finished_dataset_is_not_drawn_again(shapes):
    before = {p: p.stat().st_mtime_ns for p in (shapes / embedded.NAME).rglob("*")}
    embedded.draw_if_missing()
    embedded.draw(shapes, {"val": 1})  # two processes at once: the first one to finish wins
    assert {p: p.stat().st_mtime_ns for p in (shapes / embedded.NAME).rglob("*")} == before
