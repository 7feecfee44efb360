# faster_rcnn_pgn_ws.yaml as a lazy config, for Detectron2's tools/lazyconfig_train_net.py (a test compares them).
# What the paper leaves open is said in Base-FasterRCNN-R50-WS-2x.yaml.
from detectron2.model_zoo import get_config

import gng_d2  # noqa: F401  its names for norms

constants = get_config("common/data/constants.py").constants

model = get_config("common/models/mask_rcnn_fpn.py").model
model.pixel_mean = constants.imagenet_rgb256_mean
model.pixel_std = constants.imagenet_rgb256_std
model.input_format = "RGB"
model.backbone.norm = "PGN+WS"
model.backbone.bottom_up.freeze_at = 2
model.backbone.bottom_up.stem.norm = "PGN+WS"
model.backbone.bottom_up.stages.norm = "PGN+WS"
model.backbone.bottom_up.stages.stride_in_1x1 = False
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.conv_norm = "PGN+WS"
model.roi_heads.box_head.fc_dims = [1024]
for part in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[part]

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations[0].short_edge_length = [800]

optimizer = get_config("common/optim.py").SGD
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_2x

train = get_config("common/train.py").train
train.max_iter = 180000
train.eval_period = 0
train.init_checkpoint = "weights/R-50-GN-WS.pkl"
train.output_dir = "output/faster_rcnn_pgn_ws"
