"""The tool that predicts: the files that it is given, its pictures, and its results in COCO's formats."""

import json
import os
import sys

import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import rgb2id
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import predict as tool
from command_line import run_tool
from gng_d2.job.build import build_on_meta
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.config import load_config
from gng_d2.job.data.coco_format import split_files
from gng_d2.predict.coco_results import CocoResults, image_ids
from gng_d2.predict.predictions import find_images, output_names, predict, set_threshold
from gng_d2.predict.settings import prediction_settings

CONFIG = "configs/quick/pfpn_pgn.yaml"
TINY = (
    "MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 32 INPUT.MIN_SIZE_TEST 64 "
    "INPUT.MAX_SIZE_TEST 96 MODEL.RPN.POST_NMS_TOPK_TEST 20 TEST.DETECTIONS_PER_IMAGE 10 MODEL.DEVICE cpu "
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH 0.1 MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT 4"
).split()
SEMANTIC = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "DATASETS.TEST", "('gng_shapes_val_stuffonly',)"]


@pytest.fixture(scope="module")
def weights(shapes, tmp_path_factory):
    """Drawn weights of the tiny config. The semantic model takes its part of them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    Checkpointer(build_model(load_config(CONFIG, TINY)), str(folder)).save("model")
    return str(folder / "model.pth")


@pytest.fixture
def run(weights, tmp_path, monkeypatch, capsys):
    """Runs the tool with --output and --json in ``tmp_path``, and returns its exit status, its stderr, and the JSON."""

    def run(*inputs, flags=(), opts=(), json_name="r.json"):
        words = ["--config-file", CONFIG, "--weights", weights, "--input", *map(str, inputs)]
        words += ["--output", str(tmp_path / "out"), "--json", str(tmp_path / json_name), *flags, *TINY, *opts]
        monkeypatch.setattr(sys, "argv", ["predict.py", *words])
        try:
            run_tool(tool.main)
            status = None
        except SystemExit as error:
            status = str(error)
        path = tmp_path / json_name
        return status, capsys.readouterr().err, json.loads(path.read_text()) if path.exists() else None

    return run


def validation(shapes):
    return sorted((shapes / "gng_shapes" / "val").iterdir())


def predictor(weights, opts=()):
    """Detectron2's own predictor with the same checkpoint."""
    return DefaultPredictor(load_config(CONFIG, ["MODEL.WEIGHTS", weights, *TINY, *opts]))


def bgr(path):
    return np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1]


def test_instances_are_those_of_detectron2_under_the_datasets_ids(run, weights, shapes, tmp_path):
    images = validation(shapes)
    status, _, results = run(images[4], images[1])
    assert status is None
    truth = COCO(split_files(shapes / "gng_shapes", "val")["instances_json"])
    listing = COCO(tmp_path / "r_images.json")
    assert {i: listing.imgs[i]["file_name"] for i in listing.imgs} == {5: images[4].name, 2: images[1].name}
    names = {c["id"]: c["name"] for c in listing.dataset["categories"]}
    assert all(names[c] == truth.cats[c]["name"] for c in truth.cats)

    model = predictor(weights)
    for number, path in ((5, images[4]), (2, images[1])):
        expected = model(bgr(path))["instances"]
        ours = [r for r in results if r["image_id"] == number]
        assert len(ours) == len(expected) == 10
        boxes = expected.pred_boxes.tensor
        boxes[:, 2:] -= boxes[:, :2]
        torch.testing.assert_close(torch.tensor([r["bbox"] for r in ours]), boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(torch.tensor([r["score"] for r in ours]), expected.scores)
        things = MetadataCatalog.get("gng_shapes_val_separated").thing_classes
        assert [names[r["category_id"]] for r in ours] == [things[i] for i in expected.pred_classes]
        masks = np.stack([pycocotools.mask.decode(r["segmentation"]) for r in ours])
        assert (masks != expected.pred_masks.numpy()).mean() < 1e-3

    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "r.json")), "segm")
    evaluation.params.imgIds = [2, 5]
    evaluation.evaluate()
    evaluation.accumulate()
    assert len(listing.loadRes(str(tmp_path / "r.json")).anns) == len(results)


def test_panoptic_maps_are_those_of_detectron2_and_panopticapi_reads_them(run, weights, shapes, tmp_path):
    path = validation(shapes)[2]
    run(path)
    prediction = json.loads((tmp_path / "r_panoptic.json").read_text())
    (annotation,) = prediction["annotations"]
    ids = rgb2id(np.asarray(Image.open(tmp_path / "r_panoptic" / annotation["file_name"])))
    segments, info = predictor(weights)(bgr(path))["panoptic_seg"]
    assert (ids != segments.numpy()).mean() < 1e-3
    metadata = MetadataCatalog.get("gng_shapes_val_separated")
    names = {c["id"]: c["name"] for c in prediction["categories"]}
    expected = [(metadata.thing_classes if s["isthing"] else metadata.stuff_classes)[s["category_id"]] for s in info]
    assert [names[s["category_id"]] for s in annotation["segments_info"]] == expected
    assert any(s["isthing"] for s in info) and not all(s["isthing"] for s in info)
    assert [s["area"] for s in annotation["segments_info"]] == [int((ids == s["id"]).sum()) for s in info]

    files = split_files(shapes / "gng_shapes", "val")
    truth = json.loads(files["panoptic_json"].read_text())
    pairs = [(next(a for a in truth["annotations"] if a["image_id"] == annotation["image_id"]), annotation)]
    categories = {c["id"]: c for c in truth["categories"]}
    pq_compute_single_core(0, pairs, str(files["panoptic_root"]), str(tmp_path / "r_panoptic"), categories)


def test_a_panoptic_map_without_a_list_of_segments_is_read_as_panoptic_deeplabs(tmp_path):
    """Such a segment is called class * label_divisor + number, and -1 is void."""
    metadata = Metadata(
        name="two",
        thing_dataset_id_to_contiguous_id={7: 0},
        stuff_dataset_id_to_contiguous_id={9: 1},
        label_divisor=1000,
    )
    results = CocoResults(str(tmp_path / "r.json"), metadata)
    segments = torch.tensor([[1, -1], [1000, 1000]])
    sem_seg = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    results.add(1, "a.jpg", "a.png", {"panoptic_seg": (segments, None), "sem_seg": sem_seg})
    results.write()
    (annotation,) = json.loads((tmp_path / "r_panoptic.json").read_text())["annotations"]
    found = [(s["id"], s["category_id"], s["area"]) for s in annotation["segments_info"]]
    assert found == [(2, 7, 1), (1001, 9, 2)]
    assert rgb2id(np.asarray(Image.open(tmp_path / "r_panoptic" / "a.png"))).tolist() == [[2, 0], [1001, 1001]]


def test_pictures_have_the_images_own_size(run, tmp_path):
    for name, size in (("wide.png", (640, 480)), ("small.jpg", (33, 70))):
        Image.fromarray(np.random.randint(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / name)
    status, _, _ = run(tmp_path / "wide.png", tmp_path / "small.jpg")
    assert status is None
    assert Image.open(tmp_path / "out" / "wide.png").size == (640, 480)
    assert Image.open(tmp_path / "out" / "small.png").size == (33, 70)
    assert (
        np.asarray(Image.open(tmp_path / "out" / "wide.png")) != np.asarray(Image.open(tmp_path / "wide.png"))
    ).any()


def test_bad_files_are_named_and_skipped(run, shapes, tmp_path):
    folder, image = tmp_path / "in", validation(shapes)[0]
    folder.mkdir()
    (folder / "a.jpg").write_bytes(image.read_bytes())
    (folder / "cut.jpg").write_bytes(image.read_bytes()[:2000])
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("no image")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / ".hidden").write_text("not asked for")
    Image.open(image).save(folder / "z.png")
    png = bytearray((folder / "z.png").read_bytes())
    png[20:60] = bytes(40)
    (folder / "broken.png").write_bytes(png)
    status, err, results = run(folder, "missing.jpg", flags=["--batch-size", "2"])
    bad = ["cut.jpg", "empty.png", "notes.txt", "gone.jpg", "broken.png", "missing.jpg"]
    assert "6 of --input were skipped" in status and "Traceback" not in err
    assert all(f"{name}: " in err for name in bad) and ".hidden" not in err
    listed = json.loads((tmp_path / "r_images.json").read_text())["images"]
    assert [i["file_name"] for i in listed] == ["a.jpg", "z.png"]
    assert {r["image_id"] for r in results} == {i["id"] for i in listed}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "z.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device", "x.png")])
def test_what_was_predicted_before_the_end_is_written(error, run, shapes, tmp_path, monkeypatch):
    import gng_d2.predict.predictions

    save, count = gng_d2.predict.predictions.save_png, iter(range(100))

    def fails_third(picture, path):
        if "out" in path.split(os.sep) and next(count) == 2:
            raise error
        save(picture, path)

    monkeypatch.setattr(gng_d2.predict.predictions, "save_png", fails_third)
    status, _, results = run(*validation(shapes)[:5])
    assert status.startswith("stopped" if error is KeyboardInterrupt else "error: x.png")
    assert {r["image_id"] for r in results} == {1, 2, 3}


def test_images_are_turned_as_their_exif_says(run, shapes, tmp_path):
    upright = Image.open(validation(shapes)[0]).crop((0, 0, 128, 80))
    exif = upright.getexif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png", exif=Image.Exif())
    _, _, results = run(tmp_path / "turned.png", tmp_path / "upright.png")
    turned, right = ([r for r in results if r["image_id"] == i] for i in (1, 2))
    assert turned and [{**r, "image_id": 2} for r in turned] == right
    assert Image.open(tmp_path / "out" / "turned.png").size == (128, 80)


@pytest.mark.slow
def test_a_batch_changes_no_result(run, shapes, tmp_path):
    paths = []
    for index, path in enumerate(validation(shapes)[:5]):
        paths.append(tmp_path / f"{index}.png")
        Image.open(path).crop((0, 0, 128, 128 if index % 2 else 90)).save(paths[-1])
    _, _, alone = run(*paths, json_name="alone.json")
    status, _, together = run(*paths, flags=["--batch-size", "2"], json_name="together.json")

    def by_image(results):
        return sorted(results, key=lambda r: (r["image_id"], -r["score"]))

    assert status is None and len(alone) == len(together) == 50
    for a, b in zip(by_image(alone), by_image(together)):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["bbox"] == pytest.approx(b["bbox"], abs=0.01)


def test_threshold_leaves_out_what_is_below_it(run, shapes, tmp_path):
    image = validation(shapes)[0]
    _, _, everything = run(image, json_name="everything.json")
    median = float(np.median([r["score"] for r in everything]))
    _, _, above = run(image, flags=["--threshold", str(median)])
    assert above == [r for r in everything if r["score"] >= median] and 0 < len(above) < len(everything)
    assert run(image, flags=["--threshold", "50"])[0].startswith("error: --threshold 50.0: a score is from 0 to 1")


@pytest.mark.parametrize(
    "config, keys",
    [
        (CONFIG, ["ROI_HEADS.SCORE_THRESH_TEST", "PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH"]),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", ["RETINANET.SCORE_THRESH_TEST"]),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", ["ROI_HEADS.SCORE_THRESH_TEST"]),
    ],
)
def test_the_threshold_is_the_models_too(config, keys):
    """It sets what the config's keys set, so that a lower threshold than theirs lets more instances through."""

    def numbers(model):
        own = ((name, key, value) for name, module in model.named_modules() for key, value in vars(module).items())
        return {(name, key): value for name, key, value in own if isinstance(value, float)}

    words = [word for key in keys for word in (f"MODEL.{key}", "0.011")]
    expected = numbers(build_on_meta(load_config(config, words)))
    model = build_on_meta(load_config(config))
    assert numbers(model) != expected and 0.011 in expected.values()
    set_threshold(model, 0.011)
    assert numbers(model) == expected


def test_a_semantic_model_gives_a_mask_for_each_class(run, weights, shapes, tmp_path):
    path = validation(shapes)[3]
    status, _, _ = run(path, opts=SEMANTIC)
    assert status is None and not (tmp_path / "r_panoptic.json").exists()
    classes = predictor(weights, SEMANTIC)(bgr(path))["sem_seg"].argmax(dim=0).numpy()
    contiguous = MetadataCatalog.get("gng_shapes_val_stuffonly").stuff_dataset_id_to_contiguous_id
    found = np.full(classes.shape, -1)
    for result in COCO(tmp_path / "r_images.json").loadRes(str(tmp_path / "r.json")).anns.values():
        assert result["image_id"] == 1  # Detectron2's semantic datasets have no ids
        found[pycocotools.mask.decode(result["segmentation"]) == 1] = contiguous[result["category_id"]]
    assert (found != classes).mean() < 1e-3
    assert Image.open(tmp_path / "out" / f"{path.stem}.png").size == (128, 128)


def test_without_a_dataset_classes_are_called_by_number(run, shapes, tmp_path):
    image = validation(shapes)[0]
    status, _, _ = run(image, opts=["DATASETS.TEST", "()"])
    categories = json.loads((tmp_path / "r_images.json").read_text())["categories"]
    assert status is None and [(c["id"], c["name"]) for c in categories[:5]] == [(i, str(i)) for i in range(5)]
    assert len({c["id"] for c in categories}) == len(categories) == 5 + 4
    status, _, _ = run(image, opts=["DATASETS.TEST", "('mine_val',)"])
    assert "'mine_val' is registered" in status and "--import" in status


def test_an_output_that_cannot_be_written_is_named(run, shapes, tmp_path, limited_file_size):
    with limited_file_size(1000):
        status, _, _ = run(validation(shapes)[0])
    assert status == f"error: cannot write --output {tmp_path / 'out'}: File too large"


def test_inputs_that_cannot_be_used_at_all(run, shapes, tmp_path):
    assert run("nothing.jpg")[0] == "error: --input nothing.jpg: not found"
    assert "MODEL.DEVICE was taken as an --input" in run("a.jpg", "MODEL.DEVICE", "cpu")[0]
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    assert "a folder without files" in run(tmp_path / "empty")[0]
    (tmp_path / "out").mkdir()
    photo = tmp_path / "out" / "photo.png"
    Image.new("RGB", (64, 64)).save(photo)
    before = photo.read_bytes()
    assert "would overwrite" in run(photo)[0] and photo.read_bytes() == before


def test_find_images_takes_files_folders_and_patterns_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/1.png", "b/.x", "b/deep/3.png", "[odd].png"):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        open(name, "w").close()
    assert find_images(["b", "b/1.png"]) == (["b/1.png", "b/2.png"], {})
    assert find_images(["b/**/*"])[0] == ["b/1.png", "b/2.png", "b/deep/3.png"]
    assert find_images(["[odd].png", "x*"]) == (["[odd].png"], {"x*": "not found"})


def test_output_names_are_each_images_own():
    def names(*paths):
        return list(output_names(paths).values())

    assert names("x/a.jpg", "y/b.jpg") == [("a.jpg", "a.png"), ("b.jpg", "b.png")]
    assert names("in/x/a.jpg", "in/y/a.jpg") == [("x/a.jpg", "x/a.png"), ("y/a.jpg", "y/a.png")]
    assert names("a.jpg", "a.tif") == [("a.jpg", "a.jpg.png"), ("a.tif", "a.tif.png")]
    assert names("a.jpg", "a.tif", "a.jpg.jpg")[2] == ("a.jpg.jpg", "a.jpg.jpg.png")


def test_image_ids_are_the_datasets_only_where_the_image_is_known_to_be_the_same():
    records = [
        {"file_name": f"/data/{name}", "image_id": i} for name, i in (("a.jpg", 7), ("x/b.jpg", 9), ("y/b.jpg", 3))
    ]
    assert image_ids(["/elsewhere/a.jpg", "/data/x/b.jpg"], records) == [7, 9]
    assert image_ids(["b.jpg", "/data/a.jpg", "new.jpg"], records) == [10, 7, 11]  # two are called b.jpg
    assert image_ids(["p/a.jpg", "q/a.jpg"], records) == [1, 2]  # which of them?
    assert image_ids(["/data/a.jpg", "q/a.jpg"], records) == [7, 10]
    assert image_ids(["p.jpg", "q.jpg"], records) == [1, 2]
    assert image_ids(["a.jpg", "c.jpg"], [{"file_name": "a.jpg", "image_id": "a"}]) == ["a", 1]


def test_an_image_that_the_model_cannot_take_costs_only_itself(tmp_path):
    cfg = load_config(CONFIG, TINY)
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    for i, path in enumerate(paths):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(path)

    def model(inputs):
        if any(x["image"].max() == 120 for x in inputs):  # the third
            raise torch.cuda.OutOfMemoryError("CUDA out of memory\nand more")
        return [{"sem_seg": x["image"]} for x in inputs]

    done = list(predict(prediction_settings(cfg), model, paths, batch_size=4))
    assert [(p.path, p.error) for p in done if p.error] == [(paths[2], "the model cannot take it: CUDA out of memory")]
    for i in (0, 1, 3):
        assert next(p for p in done if p.path == paths[i]).output["sem_seg"].max() == 60 * i


def test_an_output_that_is_no_picture_is_refused(run, shapes, tmp_path):
    status, _, results = run(validation(shapes)[0], opts=["MODEL.META_ARCHITECTURE", "ProposalNetwork"])
    assert status == "error: the model's output is neither instances nor a segmentation: proposals" and results == []
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "content", ["{", '{"images": [], "annotations": [{"id": 1, "image_id": 1}], "categories": []}']
)
def test_a_broken_json_of_the_dataset_is_named(content, run, shapes, tmp_path):
    (tmp_path / "own.json").write_text(content)
    register_coco_instances("own", {}, str(tmp_path / "own.json"), str(tmp_path))
    try:
        status, _, results = run(validation(shapes)[0], opts=["DATASETS.TEST", "('own',)"])
    finally:
        DatasetCatalog.remove("own")
        MetadataCatalog.remove("own")
    assert status.startswith("error: the names of the classes cannot be read: DATASETS.TEST own: ")
    assert "own.json. DATASETS.TEST () calls the classes by their numbers" in status and results is None


def test_other_classes_than_the_datasets_are_refused(run, shapes):
    status, _, results = run(validation(shapes)[0], opts=["MODEL.ROI_HEADS.NUM_CLASSES", "4"])
    assert "MODEL.ROI_HEADS.NUM_CLASSES" in status and "4" in status and "5" in status and results is None
