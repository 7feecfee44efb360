"""Numbers of the paper that stand beside ours.

Paper: Kim et al., "On the Ideal Number of Groups for Isometric Gradient Propagation".
"""

# (n_in, n_out, num_groups) -> equation -> empirical value, an average over 10^5 experiments
TABLE_1 = {
    (1024, 512, 128): {"A": 511.236, "B": 1.979, "C": 0.500, "D": 0.995},
    (512, 256, 64): {"A": 255.160, "B": 1.959, "C": 0.499, "D": 0.989},
    (256, 128, 32): {"A": 127.189, "B": 2.015, "C": 0.500, "D": 1.032},
    (128, 64, 16): {"A": 63.185, "B": 1.900, "C": 0.500, "D": 0.992},
}

# sigma -> activation -> (F, B), from 10^7 samples
TABLE_2 = {
    0.1: {"relu": (0.500, 0.500), "prelu": (0.531, 0.531), "gelu": (0.255, 0.256), "silu": (0.252, 0.253),
          "elu": (0.928, 0.929), "selu": (1.876, 1.879), "sigmoid": (25.079, 0.062), "tanh": (0.981, 0.981),
          "softplus": (48.438, 0.251), "softsign": (0.751, 0.757), "logsigmoid": (48.495, 0.251)},
    1: {"relu": (0.500, 0.500), "prelu": (0.532, 0.532), "gelu": (0.425, 0.456), "silu": (0.356, 0.379),
        "elu": (0.645, 0.668), "selu": (1.000, 1.071), "sigmoid": (0.293, 0.045), "tanh": (0.394, 0.464),
        "softplus": (0.921, 0.293), "softsign": (0.183, 0.228), "logsigmoid": (0.921, 0.293)},
    10: {"relu": (0.500, 0.500), "prelu": (0.531, 0.531), "gelu": (0.500, 0.506), "silu": (0.499, 0.507),
         "elu": (0.504, 0.520), "selu": (0.565, 0.613), "sigmoid": (0.005, 0.007), "tanh": (0.009, 0.053),
         "softplus": (0.501, 0.461), "softsign": (0.007, 0.026), "logsigmoid": (0.501, 0.461)},
}  # fmt: skip

# test error (%) by number of groups, an average over three runs
TABLE_3 = {1: 1.827, 2: 1.720, 4: 1.773, 8: 1.730, 16: 1.727, 32: 1.720, 64: 1.670, 128: 1.753, 256: 3.240, 512: 88.650}

# test error (%) by dataset and depth, an average over three runs. We could not read Pet's at G = 1.
TABLE_4 = {
    ("oxford-iiit-pet", 50): {"GN": 22.894, "PGN": 21.119},
    ("oxford-iiit-pet", 101): {"GN": 24.067, "PGN": 22.924},
    ("caltech-101", 50): {"GN": 24.021, "GN1": 24.167, "PGN": 22.368},
    ("caltech-101", 101): {"GN": 22.781, "GN1": 26.647, "PGN": 22.247},
}

# by the config that trains a row
TABLE_5 = {
    "pfpn_gn.yaml": {"PQ": 41.750, "PQ_th": 49.357, "PQ_st": 30.268},
    "pfpn_gn1.yaml": {"PQ": 41.461, "PQ_th": 49.688, "PQ_st": 29.043},
    "pfpn_pgn.yaml": {"PQ": 42.147, "PQ_th": 49.816, "PQ_st": 30.572},
}
TABLE_6 = {
    "faster_rcnn_gn_ws.yaml": {"AP": 40.5, "AP50": 61.0, "AP75": 44.2},
    "faster_rcnn_gn1_ws.yaml": {"AP": 40.4, "AP50": 60.9, "AP75": 44.3},
    "faster_rcnn_pgn_ws.yaml": {"AP": 40.7, "AP50": 61.2, "AP75": 44.6},
}
