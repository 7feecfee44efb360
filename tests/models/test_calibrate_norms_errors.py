"""Networks and inputs that calibrate_norms refuses, and that all is as it was after an error."""

import contextlib
import copy
import threading

import pytest
import torch
from calibrated_networks import TwoNorms, assert_equal, both, converted, has_hooks, images, trained
from torch import nn

from gng_d2 import GroupNorm, PracticalGroupNorm, calibrate_norms, convert_norms
from gng_d2.errors import InputError


def wider(model):
    model = copy.deepcopy(model)
    model[3], model[4], model[6] = nn.Conv2d(8, 6, 3, stride=2), GroupNorm(2, 6), nn.Conv2d(6, 4, 1)
    return model


def taking_a_weight_of(reference, model):
    model[4].weight = reference[4].weight
    return model


def unbound(model):
    model._modules["1"] = PracticalGroupNorm(8)  # not registered, so it meets no layer
    return model


FIVE = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(5)))
MISFITS = {
    "other names": (
        lambda model, reference: (model, nn.Sequential(reference)),
        r"lacks: 0\.1, 0\.4, 0\.7\. Group norms of the model: 1, 4, 7$",
    ),
    "many other names": (
        lambda model, reference: (converted(FIVE), nn.Sequential(FIVE)),
        r"lacks: 0\.0, 0\.1, 0\.2 and 2 more. Group norms of the model: 0, 1, 2 and 2 more$",
    ),
    "not converted": (
        lambda model, reference: (copy.deepcopy(reference), reference),
        r"lacks: none\. Group norms of the model: none\. Convert the model first \(convert_norms\), or swap the two",
    ),
    "swapped": (lambda model, reference: (reference, model), "or swap the two"),
    "other widths": (
        lambda model, reference: (wider(model), reference),
        r"4 gives \(.*, 12, .* in the reference and takes \(.*, 6, .* in the model",
    ),
    "the same": (lambda model, reference: (model, model), "model and reference share the norm 1"),
    "a shared weight": (
        lambda model, reference: (taking_a_weight_of(reference, model), reference),
        "model and reference share the norm 4",
    ),
    "on meta": (lambda model, reference: (copy.deepcopy(model).to("meta"), reference), "meta device"),
    "without groups": (lambda model, reference: (unbound(model), reference), "never met a weight layer"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_networks_that_do_not_fit_are_refused(kind):
    """Messages list up to three norms of each."""
    misfit, message = MISFITS[kind]
    reference = trained()
    with pytest.raises(InputError, match=message):
        calibrate_norms(*misfit(converted(reference), reference), images())


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_norms_that_share_a_parameter_are_refused(name):
    """One affine cannot fit two norms: the first would silently lose its own to the second."""
    reference = trained()
    reference[3], reference[4], reference[6] = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    model = converted(reference)
    setattr(model[4], name, getattr(model[1], name))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="the norms 1 and 4 share a parameter.*Give 4 a copy"):
        calibrate_norms(model, reference, images())
    assert_equal(model.state_dict(), before)


def test_networks_that_run_otherwise_are_refused():
    reference = trained()
    model = converted(reference)
    model[3].stride = (1, 1)
    with pytest.raises(InputError, match=r"4 gives \(8, 12, 5, 5\) in the reference and takes \(8, 12, 10, 10\)"):
        calibrate_norms(model, reference, images())
    theirs, ours = both(TwoNorms)
    ours.forward = lambda x: ours.last(ours.norm(ours.conv(x)))
    theirs.forward = lambda x: theirs.norm(theirs.last(theirs.conv(x)))
    with pytest.raises(InputError, match="the model reaches norm when the reference reaches last"):
        calibrate_norms(ours, theirs, images())
    with pytest.raises(InputError, match="the reference with batch 1 of 1, Sequential, cannot be run in eval mode"):
        calibrate_norms(converted(reference), reference.double(), images())


@pytest.mark.parametrize(
    "inputs, message",
    [
        (64, "inputs is 64: give images"),
        (torch.randn(1, 3, 3, 3), r"the input \(1, 8, 1, 1\) of 1 has one number in each group"),
    ],
)
def test_inputs_on_which_nothing_can_be_fitted_are_refused(inputs, message):
    reference = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model = converted(reference, "GN/1")
    with pytest.raises(InputError, match=f"^calibrate_norms: {message}"):
        calibrate_norms(model, reference, inputs)


def test_what_cannot_be_copied_takes_one_batch():
    class Locked(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.lock = threading.Lock()

    reference, inputs = trained(), images()
    reference, model = Locked(*reference), Locked(*converted(reference))
    assert calibrate_norms(model, reference, inputs)[1].calibration_error > 0
    with pytest.raises(InputError, match="several batches need copies of Locked.*Give one batch"):
        calibrate_norms(model, reference, inputs.split(4))


def test_a_model_that_cannot_be_copied_is_not_calibrated():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8))
    model(images())
    with pytest.raises(InputError, match=r"convert_norms\(calibrate=...\) needs a copy of the model, which cannot"):
        convert_norms(model, "GN1", calibrate=images())
    assert type(model[1]) is nn.BatchNorm2d


class Breaks(nn.Module):
    def forward(self, x):
        raise RuntimeError("no more memory")


@pytest.mark.parametrize(
    "inputs, message",
    [
        (images(4), "the .*, Sequential, cannot be run in eval mode: RuntimeError: no more memory"),
        ([], "no batch"),
        (torch.full((4, 3, 9, 9), torch.nan), "NaN"),
        ((images(4), torch.zeros(4)), "the model with batch 2 of 2, Sequential, cannot be run"),
    ],
)
def test_after_an_error_all_is_as_it_was(inputs, message):
    reference = trained()
    reference.append(Breaks())
    model = converted(reference)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        calibrate_norms(model, reference, inputs)
    assert_equal(model.state_dict(), before)
    assert not has_hooks(model, reference)
    with pytest.raises(InputError, match=message):
        convert_norms(reference, "GN1", calibrate=inputs)
    assert type(reference[1]) is nn.BatchNorm2d and reference[1].running_mean is not None


def test_a_network_that_catches_every_error_ends_with_the_others():
    class Catches(TwoNorms):
        def forward(self, x):
            x = self.conv(x)
            with contextlib.suppress(BaseException):
                x = self.norm(x)
            if x.shape[2] == 12:
                raise RuntimeError("no more memory")
            return self.last(x)

    def calibrate():
        reference, model = both(Catches)
        with pytest.raises(InputError, match="no more memory"):
            calibrate_norms(model, reference, [images(), images(2, 8)])
        ended.append(True)

    ended = []
    thread = threading.Thread(target=calibrate, daemon=True)
    thread.start()
    thread.join(60)
    assert ended
