import pytest
import torch
from torch import nn

from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.config import load_config
from study.detector_norms import detector_norms


@pytest.mark.parametrize("size", [(1, 800, 1216), (2, 64, 96)])
def test_they_are_those_of_the_real_models(size):
    """The norms of Detectron2's models, which run on the meta device, in the order in which they run."""
    images, height, width = size
    seen = {}
    for name in ("faster_rcnn_pgn_ws", "pfpn_pgn"):
        cfg = load_config(f"configs/{name}.yaml")
        model = build_on_meta(cfg)
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_hook(lambda norm, args, y: seen.setdefault((tuple(y.shape), norm.num_groups)))
        with torch.no_grad():
            features = model.backbone(torch.empty(images, 3, height, width, device="meta"))
            if hasattr(model, "sem_seg_head"):
                model.sem_seg_head.layers(features)
            proposals = images * cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
            pooled = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
            model.roi_heads.box_head(torch.empty(proposals, features["p2"].shape[1], pooled, pooled, device="meta"))
    assert detector_norms(*size) == list(seen)


def test_a_size_to_which_detectron2_would_pad_is_refused():
    with pytest.raises(InputError, match="1 images of 800 x 1200: .* multiples of 32"):
        detector_norms(1, 800, 1200)
