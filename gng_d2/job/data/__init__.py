"""The embedded panoptic dataset, drawn on demand and registered as COCO's panoptic datasets are."""

from .embedded import draw_if_missing, register_embedded

__all__ = ["draw_if_missing", "register_embedded"]
