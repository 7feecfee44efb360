"""The paper, measured: a file for each experiment, with its recipe, command line, rows, table and plot.

``tools/reproduce.py`` runs the experiments. This package is imported as ``study``, with tools/ on the path.
"""

import os

# the root folder of the checkout
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
