"""Draw the embedded dataset: `python -m gng_d2.job.data`."""

import argparse

from .embedded import datasets_root, draw_if_missing

argparse.ArgumentParser(prog="python -m gng_d2.job.data", description=__doc__).parse_args()
draw_if_missing()
print(f"the embedded dataset is in {datasets_root()}")
