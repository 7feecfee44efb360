#!/usr/bin/env python3
"""Train a small Panoptic FPN with PGN, on the CPU, in minutes.

The tool draws a dataset, evaluates the untrained model, trains it and evaluates it again. Then it draws pictures of the
predictions beside the ground truth, of the losses, and of the groups of the norms.
"""

import os
import sys
import time

from command_line import add_overrides, run_tool, tool_parser

CONFIG = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", "quick", "pfpn_pgn.yaml")

# what the last lines say; {python} is the one that runs this
NEXT = """
What you saw: a Panoptic FPN with group norms learned from drawn images, as PQ says (panoptic quality, at best 100). By
one word of its config, MODEL.SEM_SEG_HEAD.NORM, the norms of its semantic head are PGN. So training works here. It says
nothing about one norm against another.

With a model of your own:
  see its groups       {python} tools/analyze_groups.py --config-file YOUR.yaml
  change a norm        import gng_d2 in your train_net.py, and NORM: GN/16 in the config
  compare norms        {python} tools/compare.py --config-file YOUR.yaml --norms GN GN/16 GN/1 PGN --seeds 0 1 2 \\
                           --output output/own
README.md says more."""


def parse_args():
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--config-file", default=CONFIG, metavar="FILE", help="a panoptic config; default: configs/quick/pfpn_pgn.yaml"
    )
    add_overrides(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    from detectron2.engine import default_setup

    from gng_d2.job.engine import Trainer, setup_job
    from gng_d2.job.files import write_json
    from gng_d2.models.norm_table import norm_table
    from gng_d2.predict.pictures import draw_validation, plot_groups
    from study.metrics import plot_losses

    cfg = setup_job(args.config_file, args.opts)
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    print("\n-- 1 of 3: evaluating the untrained model", flush=True)
    before = Trainer.test(cfg, trainer.model)["panoptic_seg"]
    trainer.resume_or_load(resume=False)
    print(f"\n-- 2 of 3: training {cfg.SOLVER.MAX_ITER} steps (eta is the time left), and evaluating", flush=True)
    start = time.perf_counter()
    after = trainer.train()["panoptic_seg"]
    results = {"before": before, "after": after, "seconds_of_training_and_evaluation": time.perf_counter() - start}
    write_json(os.path.join(cfg.OUTPUT_DIR, "results.json"), results)

    print("\n-- 3 of 3: drawing", flush=True)
    pictures = {name: os.path.join(cfg.OUTPUT_DIR, f"{name}.png") for name in ("predictions", "losses", "groups")}
    draw_validation(cfg, trainer.model, pictures["predictions"])
    plot_losses(os.path.join(cfg.OUTPUT_DIR, "metrics.json"), pictures["losses"])
    plot_groups(norm_table(trainer.model), pictures["groups"])

    print(f"\n{'':18}{'PQ':>8}{'PQ_th':>8}{'PQ_st':>8}")
    for name, result in (("before training", before), ("after training", after)):
        print(f"{name:18}" + "".join(f"{result[key]:8.2f}" for key in ("PQ", "PQ_th", "PQ_st")))
    print("\npictures:", *pictures.values(), sep="\n  ")
    print(NEXT.format(python=os.path.relpath(sys.executable)))


if __name__ == "__main__":
    run_tool(main)
