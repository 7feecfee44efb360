"""PyTorch's own quantization, flop counts and exporters, on what ``get_norm("GN")`` makes and on ``nn.GroupNorm``."""

import io
import subprocess
import sys

import onnx
import pytest
import torch
import torch.ao.quantization as quantization
from detectron2.layers import get_norm
from fvcore.nn import FlopCountAnalysis
from needs import EXPORT
from timm import layers as timm_layers
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from gng_d2 import PracticalGroupNorm, convert_norms, practical_num_groups, to_plain

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def net(norm):
    torch.manual_seed(0)
    stubs = quantization.QuantStub(), quantization.DeQuantStub()
    return nn.Sequential(stubs[0], nn.Conv2d(3, 32, 3), norm, nn.ReLU(), stubs[1]).eval()


def eager(model):
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    model = quantization.prepare(model)
    model(X)
    return quantization.convert(model)


def with_fx(model):
    model = prepare_fx(model[1:4], quantization.get_default_qconfig_mapping("fbgemm"), (X,))
    model(X)
    return convert_fx(model)


@pytest.mark.parametrize("quantize", [eager, with_fx])
@pytest.mark.parametrize("make", [lambda: get_norm("GN", 32), lambda: PracticalGroupNorm(32, in_channels=64)])
def test_quantization(quantize, make):
    norm = make()
    ours, theirs = quantize(net(norm)), quantize(net(nn.GroupNorm(norm.num_groups, 32)))
    assert torch.equal(ours(X), theirs(X))
    assert [type(a) for a in ours.children()] == [type(a) for a in theirs.children()] or quantize is with_fx


@pytest.mark.parametrize("first", ["convert", "prepare"])
def test_quantization_aware_training_keeps_the_layer_of_each_norm(first):
    """Its ops round the outputs of a layer, and are no layers themselves."""
    model = nn.Sequential(nn.Conv2d(64, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).train()
    model.qconfig, x = quantization.get_default_qat_qconfig("fbgemm"), torch.randn(2, 64, 8, 8)
    if first == "convert":
        model = quantization.prepare_qat(convert_norms(model, "PGN", x))
    else:
        model = convert_norms(quantization.prepare_qat(model), "PGN", x)
    for _ in range(3):
        model(x).sum().backward()
    assert model[1].num_groups == practical_num_groups(64, 16) > 1 and model[1].in_channels == 64


def test_eager_quantization_of_standardized_weights():
    model = net(PracticalGroupNorm(32, weight_standardization=True))
    right = model(X)
    quantized = eager(to_plain(model))
    assert type(quantized[1]) is torch.ao.nn.quantized.Conv2d
    torch.testing.assert_close(quantized(X), right, atol=0.1, rtol=0.1)


def test_eager_quantization_of_a_norm_with_an_activation():
    model = convert_norms(net(timm_layers.BatchNormAct2d(32))[:3], "PGN").append(quantization.DeQuantStub())
    right = model(X)
    quantized = eager(to_plain(model))
    assert type(quantized[2][0]) is torch.ao.nn.quantized.GroupNorm
    torch.testing.assert_close(quantized(X), right, atol=0.1, rtol=0.1)


def test_flops():
    ours, theirs = net(get_norm("GN", 32))[1:4], net(nn.GroupNorm(32, 32))[1:4]
    counts = [FlopCountAnalysis(model, X).by_operator() for model in (ours, theirs)]
    assert counts[0] == counts[1] and counts[0]["group_norm"] > 0


@EXPORT
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx(dynamo):
    ops = []
    for norm in (get_norm("GN", 32), nn.GroupNorm(32, 32)):
        file = io.BytesIO()
        torch.onnx.export(net(norm)[1:4], (X,), file, dynamo=dynamo)
        ops.append([node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node])
    assert ops[0] == ops[1] and "InstanceNormalization" in ops[0]


@pytest.mark.slow
def test_only_where_it_is_imported():
    """PyTorch without its quantization: nothing is imported, and nothing fails."""
    program = (
        "import sys, torch\n"
        "name = 'torch.ao.quantization.quantization_mappings'\n"
        "table = dict(sys.modules.pop(name).DEFAULT_STATIC_QUANT_MODULE_MAPPINGS)\n"
        "import gng_d2\n"
        "assert name not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
