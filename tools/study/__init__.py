"""The paper, measured: a file for each experiment, with its recipe, command line, rows, table and plot.

``tools/reproduce.py`` runs them. Study code is imported as ``study``, with tools/ on the path.
"""

import os

# of the checkout
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
