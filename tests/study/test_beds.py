"""configs/study: the layers under test are those of the paper's tables, and the real datasets are read correctly."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from torchvision.models import mobilenet_v2

from gng_d2.job.build import build, build_on_meta
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.config import load_config
from gng_d2.job.imports import import_modules
from gng_d2.models.norm_table import norm_table

MODULE = "configs/study/bccd_camvid.py"


@pytest.mark.parametrize(
    "bed, table, part",
    [
        ("faster_rcnn_bccd", "faster_rcnn_gn_ws", ""),
        ("faster_rcnn_shapes", "faster_rcnn_gn_ws", ""),
        ("semantic_fpn_camvid", "pfpn_gn", "sem_seg_head."),
        ("pfpn_shapes", "pfpn_gn", "sem_seg_head."),
    ],
)
def test_the_layers_under_test_are_those_of_the_table(bed, table, part):
    """The norms have the names, widths and groups of all norms of Table 6's model, or of Table 5's semantic head."""

    def norms(config):
        rows = norm_table(build_on_meta(load_config(f"configs/{config}.yaml")))
        return [row for row in rows if row.name.startswith(part)]

    assert len(norms(table)) == (7 if part else 65)
    assert norms(f"study/{bed}") == norms(table)


@pytest.fixture(scope="module")
def registered():
    import_modules([MODULE])
    import bccd_camvid

    return bccd_camvid


def test_bccd_is_read_without_its_boxes_that_have_no_width(registered, tmp_path):
    boxes = [("RBC", 11, 21, 60, 80), ("Platelets", 50, 33, 50, 33), ("WBC", 1, 1, 640, 480)]
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{u}</xmax><ymax>{v}</ymax></bndbox></object>"
        for name, x, y, u, v in boxes
    )
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for split, name in (("val", "a"), ("test", "b")):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n{name}\n")
        (tmp_path / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><size><width>640</width><height>480</height></size>{objects}</annotation>"
        )
    records = registered.load_bccd(str(tmp_path), "val", "test")
    assert [record["image_id"] for record in records] == ["a", "a", "b", "b"]
    for record in records:
        assert [(box["category_id"], box["bbox"]) for box in record["annotations"]] == [
            (0, [10, 20, 60, 80]),
            (1, [0, 0, 640, 480]),
        ]


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_camvid_is_read_from_its_repository_and_from_copies_as_jpeg(registered, tmp_path, extension):
    for folder, ending in (("train", extension), ("trainannot", "png")):
        (tmp_path / folder).mkdir()
        for name in ("b", "a"):
            Image.new("L", (4, 3)).save(tmp_path / folder / f"{name}.{ending}")
    records = registered.load_camvid(str(tmp_path / "train"), str(tmp_path / "trainannot"))
    assert [(record["file_name"], record["sem_seg_file_name"]) for record in records] == [
        (str(tmp_path / "train" / f"{name}.{extension}"), str(tmp_path / "trainannot" / f"{name}.png")) for name in "ab"
    ]


def test_the_datasets_are_looked_for_under_the_names_of_their_repositories_first(registered, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    names = ("BCCD_Dataset/BCCD", "bccd")
    assert registered._folder(*names) == str(tmp_path / names[0])
    for name in reversed(names):
        (tmp_path / name).mkdir(parents=True)
        assert registered._folder(*names) == str(tmp_path / name)


@pytest.mark.parametrize("bed", ["faster_rcnn_bccd", "semantic_fpn_camvid"])
def test_a_bed_names_registered_datasets_of_its_classes(registered, bed):
    cfg = load_config(f"configs/study/{bed}.yaml")
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert name in DatasetCatalog
        metadata = MetadataCatalog.get(name)
        if bed == "faster_rcnn_bccd":
            assert len(metadata.thing_classes) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
        else:
            assert len(metadata.stuff_classes) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
            assert metadata.ignore_label == cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE


@pytest.mark.parametrize("bed", ["faster_rcnn_mobilenet_bccd", "semantic_fpn_mobilenet_camvid"])
def test_mobilenet_takes_torchvisions_weights_in_its_backbone_and_varies_there_alone(bed, tmp_path):
    import_modules(["configs/study/mobilenet_v2_fpn.py"])
    theirs = mobilenet_v2()
    torch.save(theirs.state_dict(), tmp_path / "mobilenet.pth")
    model = build(load_config(f"configs/study/{bed}.yaml", ["MODEL.RESNETS.NORM", "FrozenBN"]), "cpu")
    checkpointer = Checkpointer(model)
    checkpointer.resume_or_load(f"{tmp_path}/mobilenet.pth?matching_heuristics=True", resume=False)
    ours = model.backbone.bottom_up.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = ours(images)
        for name, block in (("res2", 3), ("res3", 6), ("res4", 13), ("res5", 17)):
            expected = theirs.eval().features[: block + 1](images)
            torch.testing.assert_close(outputs[name], expected, rtol=1e-4, atol=1e-4)
            shape = ours.output_shape()[name]
            assert expected.shape == (1, shape.channels, 64 // shape.stride, 64 // shape.stride)
    assert len(checkpointer.from_batch_norms) == 51
    tables = [
        norm_table(build_on_meta(load_config(f"configs/study/{bed}.yaml", ["MODEL.RESNETS.NORM", norm])))
        for norm in ("GN1", "PGN")
    ]
    differ = [a.name for a, b in zip(*tables) if a.norm != b.norm]
    assert len(differ) == 51 and all("bottom_up" in name for name in differ)


@pytest.mark.parametrize(
    "bed, config", [("CamVid", "semantic_fpn_mobilenet_camvid"), ("BCCD", "faster_rcnn_mobilenet_bccd")]
)
def test_the_learning_rate_from_weights_is_the_best_that_was_tried_before(bed, config):
    rows = json.loads(Path("docs/results/mobilenet_recipe.json").read_text())
    later = (0.0003, 0.006, 0.018)  # than the comparison
    before = [row for row in rows if row["bed"].startswith(bed) and row["learning_rate"] not in later]
    best = max(before, key=lambda row: row["value"])
    assert best["learning_rate"] == load_config(f"configs/study/{config}.yaml").SOLVER.BASE_LR
