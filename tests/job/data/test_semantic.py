"""Semantic maps from panoptic PNGs against maps by hand, Detectron2's registration, damage and interruption."""

import json
import os
import sys

import numpy as np
import pytest
import ready_process
from PIL import Image

import prepare_coco_panoptic
from gng_d2.errors import InputError
from gng_d2.job.data.semantic import make_semantic_maps, semantic_map, semantic_values

# ids neither in order nor without gaps; stuff in the order of its ids: 5, 30, 92
CATEGORIES = [{"id": i, "isthing": isthing} for i, isthing in ((92, 0), (3, 1), (30, 0), (17, 1), (5, 0))]
IDS = np.array([[7, 7, 0], [70000, 256, 256], [7, 1, 1]])
SEGMENTS = {7: 92, 70000: 3, 256: 5, 1: 30}
MAP = np.array([[3, 3, 255], [0, 1, 1], [3, 2, 2]])


def write(folder, names=("a.png", "b.png"), categories=CATEGORIES, segments=SEGMENTS):
    """A panoptic dataset in ``folder``; the image ``b`` has its rows in reverse."""
    (folder / "panoptic").mkdir()
    for flip, name in zip((1, -1), names):
        rgb = np.stack([IDS % 256, IDS // 256 % 256, IDS // 65536], axis=-1)[::flip].astype(np.uint8)
        Image.fromarray(rgb).save(folder / "panoptic" / name)
    info = [{"id": id, "category_id": category} for id, category in segments.items()]
    annotations = [{"image_id": i, "file_name": name, "segments_info": info} for i, name in enumerate(names)]
    (folder / "panoptic.json").write_text(json.dumps({"categories": categories, "annotations": annotations}))
    return [str(folder / name) for name in ("panoptic.json", "panoptic", "semantic")]


def maps(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "semantic").iterdir())}


def test_maps_by_hand(tmp_path):
    assert make_semantic_maps(*write(tmp_path)) == 2
    made = maps(tmp_path)
    assert list(made) == ["a.png", "b.png"]
    assert all(image.dtype == np.uint8 for image in made.values())
    np.testing.assert_array_equal(made["a.png"], MAP)
    np.testing.assert_array_equal(made["b.png"], MAP[::-1])


def test_coco_has_53_stuff_classes_from_1_on():
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES, _get_builtin_metadata

    values = semantic_values(COCO_CATEGORIES)
    assert sorted(values.values()) == [0] * 80 + list(range(1, 54))
    expected = _get_builtin_metadata("coco_panoptic_separated")["stuff_dataset_id_to_contiguous_id"]
    assert {id: value for id, value in values.items() if value} == {id: v for id, v in expected.items() if id}


def test_work_goes_on_where_it_was(tmp_path):
    dataset = write(tmp_path)
    make_semantic_maps(*dataset)
    (tmp_path / "semantic" / "a.png").unlink()
    os.utime(tmp_path / "semantic" / "b.png", (0, 0))
    assert make_semantic_maps(*dataset) == 1
    np.testing.assert_array_equal(maps(tmp_path)["a.png"], MAP)
    assert make_semantic_maps(*dataset) == 0
    assert os.path.getmtime(tmp_path / "semantic" / "b.png") == 0  # kept


def test_a_map_appears_when_it_is_whole(tmp_path, monkeypatch):
    dataset = write(tmp_path, names=["a.png"])

    def stop_halfway(self, file, format):
        file.write(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", stop_halfway)
    with pytest.raises(InputError, match="a.png: No space left"):
        make_semantic_maps(*dataset)
    assert not (tmp_path / "semantic" / "a.png").exists()
    monkeypatch.undo()
    make_semantic_maps(*dataset)
    assert list(maps(tmp_path)) == ["a.png"]


def damage(folder, what):
    source = folder / "panoptic" / "b.png"
    if what == "missing":
        source.unlink()
    elif what == "truncated":
        source.write_bytes(source.read_bytes()[:60])
    elif what == "no image":
        source.write_text("404: not found")
    else:
        (folder / "panoptic.json").write_text(what)


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", "1 of 2 panoptic PNGs are not there, for instance .*b.png"),
        ("truncated", "b.png cannot be read"),
        ("no image", "b.png cannot be read"),
        ('{"images": []}', "panoptic.json is no panoptic JSON"),
        ("[", "panoptic.json is no panoptic JSON"),
    ],
)
def test_what_is_damaged_is_named(what, message, tmp_path):
    dataset = write(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(InputError, match=message):
        make_semantic_maps(*dataset)


def test_what_is_unknown_is_named(tmp_path):
    with pytest.raises(InputError, match=r"category ids \[4\] of a.png"):
        make_semantic_maps(*write(tmp_path, segments={**SEGMENTS, 7: 4}))
    with pytest.raises(InputError, match="segment ids 1, 70000 are not"):
        semantic_map(IDS, {7: 3, 256: 1})
    with pytest.raises(InputError, match="254"):
        semantic_values([{"id": i, "isthing": 0} for i in range(255)])


def changed(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_a_png_of_another_size_than_its_image_is_named(tmp_path):
    dataset = write(tmp_path)
    changed(tmp_path / "panoptic.json", images=[{"id": i, "height": 3, "width": 3} for i in range(2)])
    assert make_semantic_maps(*dataset) == 2
    changed(tmp_path / "panoptic.json", images=[{"id": i, "height": 3, "width": 4} for i in range(2)])
    with pytest.raises(InputError, match=r"a.png is 3 x 3, its image 4 x 3"):
        make_semantic_maps(*dataset[:2], str(tmp_path / "again"))


@pytest.mark.parametrize("name", ["../a.png", "/tmp/a.png"])
def test_no_map_is_written_outside_of_its_folder(name, tmp_path):
    dataset = write(tmp_path, names=["a.png"])
    changed(tmp_path / "panoptic.json", annotations=[{"image_id": 0, "file_name": name, "segments_info": []}])
    with pytest.raises(InputError, match="has a folder in it"):
        make_semantic_maps(*dataset)


def test_maps_and_panoptic_pngs_are_not_in_one_folder(tmp_path):
    dataset = write(tmp_path)
    with pytest.raises(InputError, match="has the panoptic PNGs"):
        make_semantic_maps(dataset[0], dataset[1], dataset[1] + "/")


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"a\xff.png")
    make_semantic_maps(*write(tmp_path, names=[name]))
    np.testing.assert_array_equal(maps(tmp_path)[name], MAP)


def test_an_empty_name_of_a_json_is_not_coco(monkeypatch):
    words = ["--json", "", "--panoptic-root", "a", "--output", "b"]
    monkeypatch.setattr(sys, "argv", ["prepare_coco_panoptic.py", *words])
    with pytest.raises(InputError, match="^panoptic JSON  cannot be read"):
        prepare_coco_panoptic.main()


@pytest.mark.slow
def test_the_tool_makes_those_of_coco(tmp_path):
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        folder = tmp_path / split
        folder.mkdir()
        write(folder)
        (folder / "panoptic").rename(coco / f"panoptic_{split}")
        (folder / "panoptic.json").rename(coco / "annotations" / f"panoptic_{split}.json")
    tool = "tools/prepare_coco_panoptic.py"
    done = ready_process.run(tool, [], DETECTRON2_DATASETS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for split in ("train2017", "val2017"):
        np.testing.assert_array_equal(np.asarray(Image.open(coco / f"panoptic_stuff_{split}" / "a.png")), MAP)
    (coco / "annotations" / "panoptic_val2017.json").unlink()
    done = ready_process.run(tool, [], DETECTRON2_DATASETS=str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
