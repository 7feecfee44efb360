#!/usr/bin/env python3
"""Train a small Panoptic FPN with PGN on the CPU, from nothing to pictures, in minutes.

Draws the embedded dataset, evaluates the untrained model, trains it, evaluates it again, and draws its
predictions beside the ground truth, its loss curve and its groups.
"""

import argparse
import json
import os
import sys
import time

from detectron2.engine import default_setup

import gng_d2  # noqa: F401  makes its norm names known
from gng_d2.analysis import norm_table
from gng_d2.engine import Trainer, setup_job
from gng_d2.errors import InputError
from gng_d2.visualize import draw_validation, plot_groups, plot_losses

CONFIG = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", "quick", "pfpn_pgn.yaml")


def main(args):
    cfg = setup_job(args.config_file, args.opts)
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    before = Trainer.test(cfg, trainer.model)["panoptic_seg"]
    trainer.resume_or_load(resume=False)
    start = time.perf_counter()
    after = trainer.train()["panoptic_seg"]
    results = {"before": before, "after": after, "seconds_of_training_and_evaluation": time.perf_counter() - start}
    with open(os.path.join(cfg.OUTPUT_DIR, "results.json"), "w") as file:
        json.dump(results, file, indent=1, default=float)

    pictures = {name: os.path.join(cfg.OUTPUT_DIR, f"{name}.png") for name in ("predictions", "losses", "groups")}
    draw_validation(cfg, trainer.model, pictures["predictions"])
    plot_losses(os.path.join(cfg.OUTPUT_DIR, "metrics.json"), pictures["losses"])
    plot_groups(norm_table(trainer.model), pictures["groups"])

    print(f"\n{'':18}{'PQ':>8}{'PQ_th':>8}{'PQ_st':>8}")
    for name, result in (("before training", before), ("after training", after)):
        print(f"{name:18}" + "".join(f"{result[key]:8.2f}" for key in ("PQ", "PQ_th", "PQ_st")))
    print("\npictures:", *pictures.values(), sep="\n  ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=CONFIG, metavar="FILE", help="a panoptic config; default: quick PGN")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")
    try:
        main(parser.parse_args())
    except InputError as error:
        sys.exit(f"error: {error}")
