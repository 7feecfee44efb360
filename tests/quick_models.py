"""Overrides that make the quick models train in seconds."""

MODEL = "MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 32".split()
TRAINING = [*MODEL, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.002"]
