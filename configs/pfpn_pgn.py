# pfpn_pgn.yaml as a lazy config, for Detectron2's tools/lazyconfig_train_net.py (a test compares them).
from detectron2.model_zoo import get_config

import gng_d2  # noqa: F401  its names for norms
from gng_d2.job.data.images import read_labels

model = get_config("common/models/panoptic_fpn.py").model
model.backbone.bottom_up.freeze_at = 2
model.sem_seg_head.norm = "PGN"

dataloader = get_config("common/data/coco_panoptic_separated.py").dataloader
dataloader.evaluator[1].sem_seg_loading_fn = read_labels  # Detectron2's own does not run with numpy 2

optimizer = get_config("common/optim.py").SGD
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_3x

train = get_config("common/train.py").train
train.max_iter = 270000
train.eval_period = 0
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/pfpn_pgn"
