"""The semantic maps that Detectron2 needs for a panoptic dataset in COCO's format.

A map has 0 for all things, 1, 2, ... for the stuff categories in the order of their ids, and 255 where nothing is
annotated.
"""

import json
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image
from tqdm import tqdm

from gng_d2.errors import InputError
from gng_d2.job.files import atomic_open, prepare_outputs

VOID = 255


def semantic_values(categories: Sequence[dict]) -> dict[int, int]:
    """The value of each category id in a semantic map, from the ``categories`` of a panoptic JSON."""
    stuff = sorted(category["id"] for category in categories if not category["isthing"])
    if len(stuff) >= VOID:
        raise InputError(f"{len(stuff)} stuff categories, a semantic map has room for {VOID - 1}")
    return {**{category["id"]: 0 for category in categories}, **{id: value for value, id in enumerate(stuff, 1)}}


def semantic_map(ids: np.ndarray, values: dict[int, int]) -> np.ndarray:
    """(H, W) uint8 from (H, W) segment ids and the value of each; id 0 is not annotated.

    Raises:
        InputError: names the ids that have no value.
    """
    present, indices = np.unique(ids, return_inverse=True)
    unknown = [int(id) for id in present if id and int(id) not in values]
    if unknown:
        raise InputError(f"segment ids {', '.join(map(str, unknown[:10]))} are not in the panoptic JSON")
    lookup = np.array([values[int(id)] if id else VOID for id in present], dtype=np.uint8)
    return lookup[indices].reshape(ids.shape)


def make_semantic_maps(panoptic_json: str, panoptic_root: str, sem_seg_root: str) -> int:
    """Write ``sem_seg_root``/NAME.png for each annotation of ``panoptic_json``, on all cores, and return how many.

    A map appears under its name when it is whole, and one that is there is kept. So if the work is interrupted, the
    next call goes on with it.

    Raises:
        InputError: something is missing, unknown or not readable; names the file.
    """
    if os.path.realpath(panoptic_root) == os.path.realpath(sem_seg_root):
        raise InputError(
            f"{sem_seg_root} has the panoptic PNGs. The semantic maps have the same names: name another folder"
        )
    tasks = _tasks(panoptic_json, panoptic_root, sem_seg_root)
    prepare_outputs(os.path.join(sem_seg_root, "map.png"))
    tasks = [task for task in tasks if not os.path.exists(task[-1])]
    if not tasks:
        return 0
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=_ignore_interrupts) as pool:
        try:
            maps = pool.map(_write_map, tasks, chunksize=8)
            for _ in tqdm(maps, desc=os.path.basename(sem_seg_root), total=len(tasks), unit="map"):
                pass
        except BrokenProcessPool as error:
            raise InputError("a worker process was killed (out of memory?). The same command goes on") from error
        finally:
            pool.shutdown(cancel_futures=True)
    return len(tasks)


def _tasks(panoptic_json, panoptic_root, sem_seg_root) -> list[tuple]:
    """For each annotation: panoptic PNG, (height, width) of its image or None, values by segment id, semantic PNG."""
    try:
        with open(panoptic_json) as file:
            content = json.load(file)
        values = semantic_values(content["categories"])
        sizes = {image["id"]: (image["height"], image["width"]) for image in content.get("images", ())}
        annotations = [(a["file_name"], sizes.get(a["image_id"])) for a in content["annotations"]]
        segments = [{s["id"]: s["category_id"] for s in a["segments_info"]} for a in content["annotations"]]
    except OSError as error:
        raise InputError(f"panoptic JSON {panoptic_json} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{panoptic_json} is no panoptic JSON in COCO's format ({type(error).__name__}: {error})"
        ) from error
    tasks = []
    for (name, size), of_segment in zip(annotations, segments):
        if os.path.basename(name) != name:
            raise InputError(
                f"{panoptic_json}: the file_name {name} has a folder in it, and Detectron2 looks for all maps in one"
            )
        unknown = set(of_segment.values()) - values.keys()
        if unknown:
            raise InputError(f"{panoptic_json}: category ids {sorted(unknown)} of {name} are not among its categories")
        source = os.path.join(panoptic_root, name)
        target = os.path.join(sem_seg_root, name)
        tasks.append((source, size, {segment: values[category] for segment, category in of_segment.items()}, target))
    missing = [source for source, *_ in tasks if not os.path.isfile(source)]
    if missing:
        raise InputError(f"{len(missing)} of {len(tasks)} panoptic PNGs are not there, for instance {missing[0]}")
    return tasks


def _write_map(task):
    source, size, values, target = task
    try:
        with Image.open(source) as image:
            rgb = np.asarray(image.convert("RGB"), dtype=np.int64)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"panoptic PNG {source} cannot be read: {error}") from error
    if size not in (None, rgb.shape[:2]):
        raise InputError(f"panoptic PNG {source} is {rgb.shape[1]} x {rgb.shape[0]}, its image {size[1]} x {size[0]}")
    try:
        semantic = semantic_map(rgb @ [1, 256, 256**2], values)
    except InputError as error:
        raise InputError(f"panoptic PNG {source}: {error}") from None
    with atomic_open(target, "wb") as file:
        Image.fromarray(semantic).save(file, format="PNG")


def _ignore_interrupts():
    """In a worker: Ctrl-C reaches all processes, and the parent alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
