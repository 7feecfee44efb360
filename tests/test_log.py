"""What a Detectron2 program's log.txt says of our norms."""

import logging
import subprocess
import sys

import pytest
from needs import LOOK

PROGRAM = """
import sys, torch
from detectron2.utils.logger import setup_logger
import gng_d2
setup_logger(sys.argv[1])
unbound = torch.nn.Sequential(torch.nn.Conv2d(64, 8, 1), torch.nn.Identity(), gng_d2.PracticalGroupNorm(8))
for _ in range(3):
    unbound(torch.randn(2, 64, 4, 4))
    torch.nn.Sequential(torch.nn.Conv2d(64, 8, 1), gng_d2.PracticalGroupNorm(8, 24))(torch.randn(2, 64, 4, 4))
gng_d2.bind_norms(unbound, torch.randn(2, 64, 4, 4))
"""


@LOOK
@pytest.mark.slow
def test_it_holds_all_that_we_log_once(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    text = (tmp_path / "log.txt").read_text()
    assert text.count("gng_d2.layers.look WARNING: PracticalGroupNorm layers that met no weight layer") == 1
    assert text.count("gng_d2.layers.look WARNING: 1: this norm was given in_channels=24") == 1
    assert text.count("gng_d2.models.bind_norms INFO: 1 norms are bound") == 1
    assert "this norm was given" in done.stdout and "gng_d2" not in done.stderr


def test_our_logger_is_below_detectron2s():
    import gng_d2

    assert logging.getLogger(gng_d2.__name__).parent is logging.getLogger("detectron2")
