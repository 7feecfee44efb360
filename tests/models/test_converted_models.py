"""What is done with a model whose norms were converted: copies, EMA, AMP, graphs, DDP."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torchvision
from timm import layers as timm_layers
from torch import nn

from gng_d2 import convert_norms
from gng_d2.layers.group_norm_act import PracticalGroupNormAct


@pytest.fixture
def model():
    """timm's norm with an activation inside, converted, small."""
    model = nn.Sequential(
        timm_layers.ConvNormAct(3, 16, 3, act_layer=nn.SiLU), timm_layers.ConvNormAct(16, 8, 1, apply_act=False)
    )
    convert_norms(model)
    assert type(model[0].bn) is PracticalGroupNormAct and model[1].bn.num_groups == 2
    return model


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def test_state_dict_deepcopy_pickle(model):
    other = convert_norms(
        nn.Sequential(
            timm_layers.ConvNormAct(3, 16, 3, act_layer=nn.SiLU), timm_layers.ConvNormAct(16, 8, 1, apply_act=False)
        )
    )
    assert "0.bn.weight" in model.state_dict() and "0.bn.running_mean" not in model.state_dict()
    other.load_state_dict(model.state_dict())
    for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(X), model(X))


def test_ema(model):
    ema = torch.optim.swa_utils.AveragedModel(model)
    ema.update_parameters(model)
    assert torch.equal(ema(X), model(X))


def test_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X)
    torch.testing.assert_close(y.float(), model(X), atol=0.1, rtol=0.1)
    y.sum().backward()


@pytest.mark.slow
def test_compile(model):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))


def test_fx(model):
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), model(X))
    whole = convert_norms(torchvision.models.resnet18())
    extractor = torchvision.models.feature_extraction.create_feature_extractor(whole.eval(), ["layer1"])
    assert extractor(X)["layer1"].shape == (2, 64, 2, 2)


def test_torchscript(model):
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))
    torch.testing.assert_close(torch.jit.trace(model, X)(X), model(X))


def test_distributed(model, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(X).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(X).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


WITHOUT_DETECTRON2 = """
import sys
sys.modules["detectron2"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.startswith("detectron2") else find(name, *args)
import logging, torch, torchvision, gng_d2
assert logging.getLogger("gng_d2").parent is logging.getLogger()
model = gng_d2.convert_norms(torchvision.models.resnet18(), "PGN+WS", torch.rand(1, 3, 64, 64))
model(torch.rand(2, 3, 64, 64)).sum().backward()
assert not any(name.startswith("detectron2.") for name in sys.modules)
print(model.layer2[0].bn1.num_groups)
"""


@pytest.mark.slow
def test_without_detectron2():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_DETECTRON2], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr
