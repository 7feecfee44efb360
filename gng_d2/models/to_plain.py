"""Turn our modules into PyTorch's own classes, for tools that look modules up by their exact class."""

from torch import nn

from gng_d2.errors import InputError
from gng_d2.layers import GroupNorm, LearnedGroupNorm, PracticalGroupNorm, unbound_norms
from gng_d2.layers.class_change import has, original_class
from gng_d2.layers.group_norm_act import GroupNormAct, PracticalGroupNormAct
from gng_d2.layers.ws_conv import Conv2d, WSConv2d

from .fold import fold_weight_standardization
from .fuse_norms import fuse_norms
from .recompute_norms import recompute_norms


def to_plain(model: nn.Module) -> nn.Module:
    """Give the modules of ``model`` that are ours the classes of PyTorch, in place; its outputs stay the same.

    The outputs may differ by rounding, because PyTorch's op takes the place of our kernels. Two detections with nearly
    equal scores may then change places.

    This is for quantization, adapters, pruning, and other tools that look modules up by their exact class. Our norms
    become :class:`torch.nn.GroupNorm`. One that holds timm's dropout and activation becomes a
    :class:`torch.nn.Sequential` of a group norm and these, so that its parameters are called ``0.weight`` and
    ``0.bias``. Standardized weights are folded (:func:`~gng_d2.fold_weight_standardization`), and nothing is fused or
    recomputed in the backward pass any more. Parameters stay the same objects except for the folded weights, and hooks
    stay. Detectron2's ``Conv2d`` stays where it holds a norm or an activation. The state_dict no longer says how many
    groups each norm has, and the norms no longer look which layer makes their input.

    Returns:
        ``model``.

    Raises:
        InputError: a norm has no groups yet or is of a subclass of ours, or a weight cannot be folded. The
            message names it, and the model is then unchanged.

    Examples::
        >>> model = nn.Sequential(nn.Conv2d(64, 32, 3), PracticalGroupNorm(32, weight_standardization=True))
        >>> [type(module).__module__ for module in to_plain(model)]
        ['torch.nn.modules.conv', 'torch.nn.modules.normalization']
    """
    unbound = unbound_norms(model)
    if unbound:
        raise InputError(
            f"to_plain: {unbound[0]} has met no weight layer yet, so its outputs are not known ({len(unbound)} such "
            f"norms). Call gng_d2.bind_norms(model, example_inputs) first"
        )
    norms = {module: name for name, module in model.named_modules() if isinstance(module, GroupNorm)}
    convolutions = [module for module in model.modules() if has(module, WSConv2d)]
    for norm, name in norms.items():
        if isinstance(norm, LearnedGroupNorm):
            raise InputError(
                f"to_plain: PyTorch has no norm that computes what {name or 'the model'} does, which is LGN"
            )
        if original_class(norm) not in (GroupNorm, PracticalGroupNorm, GroupNormAct, PracticalGroupNormAct):
            raise InputError(
                f"to_plain: {name or 'the model'} is a {type(norm).__name__}, a subclass of a norm of gng_d2 that may "
                f"compute something else. Remove its parametrizations, or replace it first"
            )
    fold_weight_standardization(model)
    recompute_norms(fuse_norms(model, enable=False), enable=False)
    for norm in norms:
        _make_plain(norm)
    for layer in convolutions:
        del layer.weight_standardization_folded
        if type(layer) is Conv2d and layer.norm is None and layer.activation is None:
            layer.__class__ = nn.Conv2d
            del layer.norm, layer.activation
    return model


def _make_plain(norm):
    parts = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    ours = set(dir(PracticalGroupNorm(1))) - set(dir(nn.GroupNorm(1, 1)))
    for key in ours & vars(norm).keys():
        del vars(norm)[key]
    norm.__class__ = nn.GroupNorm
    norm._modules.clear()
    if parts:  # its parameters go to a group norm in front of them
        plain = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False).train(norm.training)
        plain.affine, plain._parameters = norm.affine, norm._parameters
        for key in nn.GroupNorm.__constants__:
            delattr(norm, key)
        norm._parameters = {}
        norm.__class__ = nn.Sequential
        norm.extend([plain, *parts])
