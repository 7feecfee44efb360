#!/usr/bin/env python3
"""Measure the paper's tables again and the costs of norms, and write docs/results.md.

    tools/reproduce.py table1 --json table1.json
    tools/reproduce.py table3 --data datasets --processes 2 --plot figure2.png
    tools/reproduce.py gradients --help

Tables 5 and 6 are trainings under several norms and seeds; tools/compare.py runs these.
"""

import argparse
import importlib
import sys

from command_line import ANEW, run_tool, tool_parser

RESUMES = "with --json and --resume the same command goes on with the rows that are missing"

# name -> its module in study/, and what it measures
EXPERIMENTS = {
    "table1": ("table1", "Equations A to D for the paper's four blocks"),
    "table2": ("table2", "gains of eleven activations"),
    "channels": ("channels", "channels in a group along the depth of a detector, under several norms"),
    "sweep": ("sweep", "what a block does to the gradient, over the size of its groups (Eqs. 22 and 31)"),
    "gradients": ("gradients", "what each block of a real model does to the gradient"),
    "table3": ("mlp", "and Figure 2: an MLP on MNIST under every number of groups"),
    "table4": ("classifier", "ResNets as image classifiers under GN, GN1 and PGN"),
    "retention": ("retention", "what is left of a network when its batch norms become group norms"),
    "finetune": ("finetune", "batch-norm weights that are fine-tuned under fresh and calibrated group norms"),
    "kernel-tests": ("kernel_tests", "the tests of the kernels, on a GPU where there is one"),
    "norm-cost": ("norm_cost", "the time of each norm of a detector"),
    "step-cost": ("step_cost", "the time and memory of a training step"),
    "memory": ("memory", "the memory of a training step, with recomputed norms and without"),
    "collapse": ("collapse", "what the norms of trained models receive and lose"),
    "page": ("page", "docs/results.md, from docs/results/*.json"),
}


def main():
    words = sys.argv[1:]
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="EXPERIMENT", dest="experiment")
    for name, (module, summary) in EXPERIMENTS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:  # importing the others too would take seconds
            experiment = importlib.import_module(f"study.{module}")
            command.description = experiment.__doc__
            experiment.add_arguments(command)
    args = parser.parse_args(words)
    if_stopped = getattr(experiment, "IF_STOPPED", RESUMES if hasattr(args, "resume") else ANEW)
    run_tool(lambda: experiment.main(args), if_stopped)


if __name__ == "__main__":
    run_tool(main)
