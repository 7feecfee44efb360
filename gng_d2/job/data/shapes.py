"""Random scenes of textured shapes on textured ground, with their panoptic segmentation.

The class of a thing shows in its outline and that of stuff in its texture. Colour tells things from the ground, as they
are more vivid, but says nothing about the class.
"""

from typing import NamedTuple

import numpy as np

THINGS = ("disc", "ring", "square", "triangle", "star")
STUFF = ("stripes", "checks", "clouds")

MIN_VISIBLE = 0.4  # a thing is not drawn if less of its area than this is visible,
MIN_AREA = 40  # or fewer pixels than these


class Scene(NamedTuple):
    """An image and its segmentation, in which a stuff class has at most one segment and each thing has its own."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    segments: np.ndarray  # (H, W) uint8: the number of each pixel's segment
    classes: list[str]  # the name of each segment's class


def draw_scene(rng: np.random.Generator, size: int = 128) -> Scene:
    """Draw one scene of ``size`` x ``size`` pixels: 3 stuff regions and 2 to 6 things that hide each other."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    stuff = np.argmax([_waves(rng, x, y, 2 * size) for _ in STUFF], axis=0)
    image = np.zeros((size, size, 3))
    segments = np.zeros((size, size), np.uint8)
    classes = []
    for index, name in enumerate(STUFF):
        region = stuff == index
        paint = _paint(_ground_colours(rng), _texture(rng, name, x, y))
        if region.any():
            image[region] = paint[region]
            segments[region] = len(classes)
            classes.append(name)

    covered = np.zeros((size, size), bool)
    for _ in range(rng.integers(2, 7)):  # front to back
        name = THINGS[rng.integers(len(THINGS))]
        outline = _outline(rng, name, x, y)
        paint = _paint(_thing_colours(rng), _texture(rng, STUFF[rng.integers(len(STUFF))], x, y))
        visible = outline & ~covered
        if visible.sum() >= max(MIN_AREA, MIN_VISIBLE * outline.sum()):
            image[visible] = paint[visible]
            segments[visible] = len(classes)
            classes.append(name)
            covered |= outline

    light = 1 + 0.3 * _waves(rng, x, y, 2 * size)[..., None]
    image = 255 * image * light + rng.normal(0, 10, image.shape)
    present, segments = np.unique(segments, return_inverse=True)  # without segments that others cover whole
    segments = segments.reshape(size, size).astype(np.uint8)
    return Scene(image.clip(0, 255).astype(np.uint8), segments, [classes[i] for i in present])


def _paint(colours, texture):
    """(H, W, 3) of two colours, mixed in the proportion that a texture of values in [0, 1] gives."""
    return colours[0] + (colours[1] - colours[0]) * texture[..., None]


def _ground_colours(rng):
    """Two dull colours that differ in brightness."""
    brightness = np.array([rng.uniform(0.2, 0.4), rng.uniform(0.5, 0.7)])
    return rng.permutation(brightness)[:, None] + rng.uniform(-0.12, 0.12, (2, 3))


def _thing_colours(rng):
    """A vivid colour and one that is more or less near it, so that some things have a clear texture and some none."""
    vivid = rng.permutation([rng.uniform(0, 0.2), rng.uniform(0, 1), rng.uniform(0.8, 1)])
    return np.stack([vivid, vivid + rng.uniform(0, 0.35) * rng.uniform(-1, 1, 3)])


def _texture(rng, name, x, y):
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(6, 14), rng.uniform(0, 2 * np.pi, 2)
    u = 2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase[0]
    v = 2 * np.pi * (y * np.cos(angle) - x * np.sin(angle)) / period + phase[1]
    if name == "stripes":
        return 0.5 + 0.5 * np.sin(u)
    if name == "checks":
        return (np.sin(u) * np.sin(v) > 0).astype(np.float64)
    return 0.5 + 0.5 * _waves(rng, x, y, 40)  # clouds


def _waves(rng, x, y, longest):
    """A smooth random field in [-1, 1], whose wavelengths are from ``longest`` / 2 to ``longest`` pixels."""
    field = np.zeros(x.shape)
    for _ in range(6):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        length = rng.uniform(longest / 2, longest)
        field += np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + phase)
    return field / np.abs(field).max()


def _outline(rng, name, x, y):
    size = x.shape[0]
    radius = rng.uniform(0.1, 0.24) * size
    center = rng.uniform(0.05, 0.95, 2) * size
    turn, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1)
    dx, dy = x - center[0], y - center[1]
    dx, dy = dx * np.cos(turn) + dy * np.sin(turn), (dy * np.cos(turn) - dx * np.sin(turn)) / squeeze
    distance, angle = np.hypot(dx, dy) / radius, np.arctan2(dy, dx)
    if name == "disc":
        return distance < 0.9
    if name == "ring":
        return (distance < 1) & (distance > 0.55)
    if name == "star":
        return distance < 0.75 + 0.35 * np.cos(5 * angle)
    corners = {"square": 4, "triangle": 3}[name]
    sector = 2 * np.pi / corners
    return distance * np.cos((angle % sector) - sector / 2) < np.cos(sector / 2) * {3: 1.3, 4: 1.15}[corners]
