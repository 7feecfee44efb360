"""What convert_norms learns by running a model, and what it says of inputs that it cannot use."""

from collections import OrderedDict

import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from needs import LOOK, needs_torch
from survey_timm import brute_force_groups
from torch import nn
from torch.nn import functional as F

from gng_d2 import PracticalGroupNorm, convert_norms
from gng_d2.errors import InputError


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other, self.norm = nn.Conv2d(64, 16, 1), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x, scale=1.0):
        return self.other(x[:, :8]) + self.norm(input=self.conv(x * scale))


IMAGE = torch.randn(2, 64, 4, 4)
INPUTS = {
    "tensor": IMAGE,
    "arguments": (IMAGE, 2.0),
    "keywords": {"x": IMAGE, "scale": 2.0},
    "loader": next(iter(torch.utils.data.DataLoader([(image, 1, "name") for image in IMAGE], batch_size=2))),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(kind):
    model = convert_norms(TwoInputs(), "PGN", INPUTS[kind])
    assert model.norm.num_groups == brute_force_groups(64, 16) != convert_norms(TwoInputs()).norm.num_groups
    model.train()(IMAGE).sum().backward()


def test_what_was_found_by_running_is_not_forgotten():
    model = convert_norms(TwoInputs(), "PGN", torch.randn(2, 64, 4, 4))
    assert convert_norms(convert_norms(model, "GN4")).norm.num_groups == brute_force_groups(64, 16)


def test_what_rests_on_the_order_of_registration_is_known():
    assert convert_norms(TwoInputs()).norm.follows_registration
    model = convert_norms(TwoInputs(), "PGN", IMAGE)
    assert not model.norm.follows_registration
    assert not convert_norms(model, "GN4").norm.follows_registration
    assert not convert_norms(model, "PGN").norm.follows_registration


def test_inputs_in_inference_mode():
    model = TwoInputs()
    with torch.inference_mode():
        convert_norms(model, "PGN", IMAGE * 2)
    assert model.norm.num_groups == brute_force_groups(64, 16)


def test_inputs_that_do_not_fit_change_nothing():
    model = TwoInputs().train()
    with pytest.raises(InputError, match="TwoInputs cannot be run.*channels"):
        convert_norms(model, "PGN", [IMAGE[:, :9], torch.ones(2)])
    assert type(model.norm) is nn.BatchNorm2d and model.conv.training


def test_a_scripted_module_inside():
    model = nn.Sequential(nn.Conv2d(64, 16, 1), nn.BatchNorm2d(16), torch.jit.script(nn.ReLU()))
    assert convert_norms(model, "PGN", IMAGE)[1].num_groups == brute_force_groups(64, 16)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model[:2].modules())


@needs_torch(2, 6, "torch.compiler.set_stance")
def test_a_part_that_torch_compile_made_is_seen_and_nothing_is_compiled(monkeypatch):
    ignored = []
    monkeypatch.setattr("sys.unraisablehook", ignored.append)
    # in the order of registration the norm's layer is the second convolution
    part = nn.Sequential(OrderedDict(a=nn.Conv2d(8, 32, 1), b=nn.Conv2d(32, 32, 1), norm=nn.BatchNorm2d(32)))
    part.forward = lambda x: part.b(part.norm(part.a(x)))
    compiled = []
    model = nn.Sequential(torch.compile(part, backend=lambda graph, inputs: compiled.append(graph) or graph))
    convert_norms(model, "PGN", torch.rand(2, 8, 5, 5))
    assert part.norm.in_channels == 8 and not compiled and not ignored


def test_a_model_whose_train_freezes_and_returns_nothing():
    class Frozen(TwoInputs):
        def train(self, mode=True):
            super().train(mode)
            self.conv.requires_grad_(False)

    model = Frozen()
    assert convert_norms(model, "PGN", IMAGE).norm.num_groups == brute_force_groups(64, 16)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("length", [8, 32])
def test_short_sequences_are_not_taken_for_pooled_ones(length):
    """Tokens, of which a text may have more."""
    model = nn.Sequential(nn.Embedding(100, 512), Transposed(), nn.Conv1d(512, 64, 1), nn.BatchNorm1d(64))
    convert_norms(model, "PGN", torch.randint(100, (2, length)))
    assert model[3].num_groups == brute_force_groups(512, 64) and model[3].pooled_to is None


def test_a_vector_beside_an_image_keeps_its_length():
    """The images alone are widened to see which norms stand behind a global pooling."""

    class WithVector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.of_vector = nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32), nn.Linear(5, 32)

        def forward(self, image, vector):
            return self.norm(self.conv(image.mean((2, 3), keepdim=True)) + self.of_vector(vector)[:, :, None, None])

    model = convert_norms(WithVector(), "GN16", (IMAGE, torch.randn(2, 5)))
    assert model.norm.num_groups == 2 and model.norm.pooled_to == (1, 1)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_a_model_reads_the_attributes_of_its_norms():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(64, 16, 1), nn.BatchNorm2d(16)
            self.norm.scale = 2

        def forward(self, x):
            return self.norm.scale * self.norm(self.conv(x)).view(len(x), self.norm.num_features, -1)

    model = convert_norms(convert_norms(Net(), "PGN", IMAGE), "GN/4", IMAGE)
    model(IMAGE).sum().backward()
    assert model.norm.num_groups == 4 and not hasattr(model.norm, "gain_ratio")


def test_a_norm_whose_forward_was_replaced_is_left(caplog):
    model = nn.Sequential(nn.Conv2d(64, 16, 1), nn.BatchNorm2d(16))
    model[1].forward = lambda x: 2 * x
    convert_norms(model, "PGN", IMAGE)
    assert type(model[1]) is nn.BatchNorm2d and "BatchNorm2d whose forward was replaced (1)" in caplog.text


def test_detectron2_batch():
    def build(norm):
        cfg = get_cfg()
        cfg.merge_from_file("configs/quick/faster_rcnn_pgn_ws.yaml")
        for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD):
            node.NORM = norm
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
        return build_model(cfg)

    model, right = build("BN"), build("PGN")
    convert_norms(model, "PGN", [{"image": torch.zeros(3, 64, 64)}])
    groups = [
        {name: m.num_groups for name, m in each.named_modules() if isinstance(m, PracticalGroupNorm)}
        for each in (model, right)
    ]
    assert groups[0] == groups[1] and len(groups[0]) > 20


@pytest.mark.parametrize("norm", [IMAGE, None, 5])
def test_an_input_in_the_place_of_the_name(norm):
    with pytest.raises(InputError, match="norm is a name, not "):
        convert_norms(nn.BatchNorm2d(8), norm)


def test_norms_that_the_run_does_not_reach_are_listed(caplog):
    class Auxiliary(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if self.training else x

    model = nn.Sequential(nn.Conv2d(64, 16, 1), nn.BatchNorm2d(16))
    model.append(Auxiliary(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)))
    convert_norms(model, "PGN", IMAGE)
    assert "1 were not reached by example_inputs and follow the layer registered before them (2.1)" in caplog.text


class PerImage(nn.Module):
    """A weight for each image, applied by one convolution in as many groups as images, as in StyleGAN2."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(n_out, n_in, 3, 3)), nn.Linear(4, n_in)
        self.norm = nn.BatchNorm2d(n_out)

    def forward(self, x, style):
        weight = self.weight * self.style(style)[:, None, :, None, None]
        y = F.conv2d(x.flatten(0, 1)[None], weight.flatten(0, 1), padding=1, groups=len(x))
        return self.norm(y.view(len(x), -1, *y.shape[2:]))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_weights_for_each_image_are_a_layer_for_any_number_of_images(number):
    def inputs(number):
        return torch.randn(number, 64, 6, 6), torch.randn(number, 4)

    models = [
        (PerImage(64, 16), inputs),
        (timm.layers.CondConv2d(64, 16, 3, num_experts=2), lambda n: (inputs(n)[0], torch.rand(n, 2))),
    ]
    for model, draw in models:
        if not isinstance(model, PerImage):
            model.norm = nn.BatchNorm2d(16)
            model.register_forward_hook(lambda module, args, output: module.norm(output))
        convert_norms(model, "PGN", draw(number))
        assert model.norm.in_channels == 64 and model.norm.num_groups == 16
        for others in (1, 2, 4):  # training looks too
            model.train()(*draw(others)).sum().backward()


@LOOK
def test_channels_that_become_images_are_no_layer_of_their_own():
    """A convolution that is not divided into groups mixes them."""

    class Split(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).view(2 * len(x), 8, 4, 4))

    model = convert_norms(Split(nn.Conv2d(64, 16, 3), nn.BatchNorm2d(8)), "PGN", torch.randn(1, 64, 6, 6))
    assert model[1].num_groups == 1 and model[1].in_channels != 32
