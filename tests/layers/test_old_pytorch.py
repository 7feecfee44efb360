"""What an older PyTorch lacks is done otherwise, or refused with the version that has it. See docs/versions.md."""

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils import checkpoint

from gng_d2 import GroupNorm, PracticalGroupNorm, bind_norms, recompute_norms
from gng_d2.errors import InputError
from gng_d2.predict.export import check_format


def test_recompute_norms_names_the_version_that_it_needs(monkeypatch):
    monkeypatch.delattr(checkpoint, "create_selective_checkpoint_contexts", raising=False)
    with pytest.raises(InputError, match=r"needs PyTorch 2\.5 or newer.*pip install 'torch>=2\.5'"):
        recompute_norms(nn.Sequential(nn.Conv2d(3, 8, 3), GroupNorm(2, 8), nn.ReLU()))


def test_export_names_the_version_that_it_needs_and_the_format_that_does_not(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.5.1"))
    with pytest.raises(InputError, match=r"onnx needs PyTorch 2\.6 or newer; this is 2\.5\.1.* torchscript"):
        check_format("onnx")
    check_format("torchscript")


def test_bind_norms_binds_where_autograd_tells_no_shapes(monkeypatch):
    monkeypatch.setattr("gng_d2.layers.look.made_by", lambda tensor: None)
    model, x = nn.Sequential(nn.Conv2d(24, 8, 1), nn.Identity(), PracticalGroupNorm(8)), torch.randn(2, 24, 5, 5)
    with pytest.raises(InputError, match="never met a weight layer.*call gng_d2.bind_norms"):
        model(x)
    assert bind_norms(model, x).train()(x).requires_grad and model[2].num_groups == 4
