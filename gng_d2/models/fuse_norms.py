"""Run norm, shortcut and activation in one op, in modules whose forward is known."""

import logging
import re
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from gng_d2.errors import InputError
from gng_d2.layers.class_change import StandIn, add, check_changeable, has, original_class, remove_everywhere, ways_of
from gng_d2.layers.group_norm import GroupNorm
from gng_d2.layers.learned_group_norm import LearnedGroupNorm
from gng_d2.layers.ws_conv import Conv2d, WSConv2d
from gng_d2.ops import group_norm, standardize_weight
from gng_d2.ops.backends import is_compiling, is_transformed

# What a forward does with its input, as names of children and functions. "+name": the output of that child for the
# input of the whole, or that input itself where there is no such child, is added. "?name": the code has that name, and
# goes another way where the module has a true attribute of that name. A forward of the same name whose code has other
# names, or has them in another order, is of another version and not known.
_FORWARDS = {
    "detectron2.modeling.backbone.resnet.BasicStem.forward": "conv1 F.relu_ F.max_pool2d",
    "detectron2.modeling.backbone.resnet.BasicBlock.forward": "conv1 F.relu_ conv2 +shortcut F.relu_",
    "detectron2.modeling.backbone.resnet.BottleneckBlock.forward": (
        "conv1 F.relu_ conv2 F.relu_ conv3 +shortcut F.relu_"
    ),
    "torchvision.models.resnet.BasicBlock.forward": "conv1 bn1 relu conv2 bn2 +downsample relu",
    "torchvision.models.resnet.Bottleneck.forward": "conv1 bn1 relu conv2 bn2 relu conv3 bn3 +downsample relu",
    "torchvision.models.resnet.ResNet._forward_impl": (
        "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool torch.flatten fc"
    ),
    "timm.models.resnet.BasicBlock.forward": "conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path +downsample act2",
    "timm.models.resnet.Bottleneck.forward": (
        "conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path +downsample act3"
    ),
    "timm.models.resnet.ResNet.forward_features": (
        "conv1 bn1 act1 maxpool ?grad_checkpointing ?torch.jit.is_scripting ?checkpoint_seq layer1 layer2 layer3 layer4"
    ),
}
_FPN = "detectron2.modeling.backbone.fpn.FPN.forward"  # _run_fpn repeats its code
_FORWARDS[_FPN] = (
    "bottom_up lateral_convs in_features append output_convs enumerate zip F.interpolate _fuse_type insert top_block "
    "in_feature _out_features index extend len"
)
_METHODS = "forward", "_forward_impl", "forward_features"
_FUNCTIONS = {
    "F.relu_": F.relu_,
    "F.max_pool2d": partial(F.max_pool2d, kernel_size=3, stride=2, padding=1),
    "torch.flatten": partial(torch.flatten, start_dim=1),
}
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_HOOKS_OF_ALL_MODULES = [getattr(torch_module, f"_global{name}") for name in _HOOKS]
_ACTIVATIONS = dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_), "relu")
_ACTIVATIONS |= dict.fromkeys((nn.SiLU, F.silu), "silu")


def fuse_norms(model: nn.Module, enable: bool = True) -> nn.Module:
    """Have group norms of ``model`` run in one op with the shortcut that is added and the activation that follow them.

    That is :func:`gng_d2.ops.group_norm` with its ``activation`` (ReLU, SiLU) and ``residual``, which reads and writes
    each tensor fewer times. It is done where the forward of the module that runs the norm is known: Detectron2's
    ``Conv2d`` with norm and activation (as in its box, mask and semantic heads), its ResNets and its FPN, torchvision's
    and timm's ResNets, and a norm and the activation after it in a ``Sequential`` (as in RetinaNet's and FCOS' towers
    and torchvision's ``Conv2dNormActivation``).

    Parameters, buffers, hooks and the keys of the state_dict stay; the class of a module is replaced by a subclass of
    it, so that copies and pickles work. A norm still checks its input. At each call the module runs its own forward
    instead if one of the fused modules has a hook, and while it is compiled, exported or traced.

    Args:
        model: changed in place. Its norms are group norms already, for instance by :func:`convert_norms`.
        enable: False undoes it.

    Returns:
        ``model``. The log names the modules, and those with a norm that is not fused.

    Raises:
        InputError: ``model`` has no norm that can be fused.

    Examples::
        >>> model = fuse_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()))
        >>> type(model).__name__
        'FusedSequential'
    """
    if not enable:
        remove_everywhere(model, _Fused)
        return model
    fused = {name: norms for name, module in model.named_modules() if (norms := _fused_norms(module))}
    if not fused:
        raise InputError(
            f"fuse_norms: {type(model).__name__} has no group norm that an activation or a shortcut follows in a "
            f"module whose forward is known (Detectron2's Conv2d, ResNet and FPN, torchvision's and timm's ResNets, "
            f"Sequential). If its norms are others, call gng_d2.convert_norms first. LGN is not fused"
        )
    modules = dict(model.named_modules())
    for name in fused:
        check_changeable(modules[name])
    for name in fused:
        add(modules[name], _Fused)
    done = {norm for norms in fused.values() for norm in norms}
    left = [
        f"{name or 'the model'} ({original_class(module).__name__})"
        for name, module in modules.items()
        if any(isinstance(child, nn.GroupNorm) and child not in done for child in module.children())
    ]
    total = sum(isinstance(module, nn.GroupNorm) for module in modules.values())
    logging.getLogger(__name__).info(
        f"fused: {len(done)} of {total} group norms, in "
        + ", ".join(f"{name or 'the model'} ({original_class(modules[name]).__name__})" for name in fused)
        + ("; not fused, as they are LGN or no activation or shortcut follows in a known forward: " + ", ".join(left))
        * bool(left)
    )
    return model


class _Fused(StandIn):
    """A module that runs norms in one op with what follows them."""

    order = 1

    @classmethod
    def method_of(cls, wrapped):
        return "forward" if wrapped is WSConv2d else _known(wrapped)[0]

    def run(self, method, args, kwargs):
        if kwargs or len(args) != 1 or is_compiling() or is_transformed() or any(_HOOKS_OF_ALL_MODULES):
            return method(*args, **kwargs)
        if _known(original_class(self))[1] == _FPN:
            is_hooked = any(_is_hooked(module) for conv in self.lateral_convs for module in conv.modules())
            return method(*args) if is_hooked else _run_fpn(self, *args)
        steps = _steps(self) if isinstance(args[0], Tensor) else None
        return _run(_groups(steps, _is_hooked), *args) if steps else method(*args)


@cache
def _known(cls):
    """(name, full name) of the method of ``cls`` that runs norms in a known way; None if there is none."""
    for name in _METHODS:
        method = getattr(cls, name, None)
        if method in (nn.Sequential.forward, Conv2d.forward):
            return name, method
        key = f"{getattr(method, '__module__', None)}.{getattr(method, '__qualname__', None)}"
        names = tuple(dict.fromkeys(re.findall(r"\w+", _FORWARDS.get(key, ""))))
        if names and method.__code__.co_names == names:
            return name, key
    return None


def _fused_norms(module):
    """The norms that ``module`` could run in one op with what follows them."""
    known = _known(original_class(module))
    if known is None:
        return []
    if known[1] == _FPN:
        lists = [[lateral, _Added(None)] for lateral in list(module.lateral_convs)[1:]]
    else:
        lists = [_steps(module)]
    return [norm for steps in lists for norm, *after in _groups(steps, lambda module: False) if after]


class _Added(NamedTuple):
    """A step that adds ``shortcut(x)``, where x is the input of all steps; it adds x if ``shortcut`` is None."""

    shortcut: Callable[[Tensor], Tensor] | None


def _steps(module):
    """The steps that ``module`` takes with its input, in order; none if its forward now takes another branch."""
    forward = _known(original_class(module))[1]
    if forward is Conv2d.forward:
        return _steps_of_convolution(module)
    if forward is nn.Sequential.forward:
        return list(module)
    steps = []
    for name in _FORWARDS[forward].split():
        if name.startswith("?"):
            if getattr(module, name[1:], False):
                return []
        elif name.startswith("+"):
            steps.append(_Added(getattr(module, name[1:])))
        else:
            steps.append(_FUNCTIONS[name] if name in _FUNCTIONS else getattr(module, name))
    return steps


def _steps_of_convolution(conv):
    return [partial(_convolve, conv), conv.norm, conv.activation]


def _convolve(conv, x):
    weight = standardize_weight(conv.weight) if has(conv, WSConv2d) else conv.weight
    return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _groups(steps, is_hooked):
    """Lists of steps: a norm together with the shortcut and activation that follow it; any other step alone."""
    groups, waiting = [], deque(_flat(steps, is_hooked))
    while waiting:
        groups.append([waiting.popleft()])
        if _is_group_norm(groups[-1][0]) and not is_hooked(groups[-1][0]):
            if waiting and isinstance(waiting[0], _Added):
                groups[-1].append(waiting.popleft())
            if waiting and _activation(waiting[0]) and not is_hooked(waiting[0]):
                groups[-1].append(waiting.popleft())
    return groups


def _flat(steps, is_hooked):
    """The steps that do something. Detectron2's convolutions, if an activation may follow, are split."""
    for step in steps:
        if step is None or (type(step) is nn.Identity and not is_hooked(step)):
            continue
        if _is_convolution(step) and step.activation is None and not is_hooked(step):
            yield from filter(None, _steps_of_convolution(step))
        else:
            yield step


def _is_convolution(step):
    return isinstance(step, nn.Conv2d) and original_class(step).forward is Conv2d.forward


def _is_group_norm(step):
    forwards = nn.GroupNorm.forward, GroupNorm.forward
    if isinstance(step, LearnedGroupNorm):
        return False  # the op has no groups of several sizes
    return isinstance(step, nn.GroupNorm) and original_class(step).forward in forwards


def _activation(step):
    kind = type(step) if isinstance(step, nn.Module) else step
    return _ACTIVATIONS.get(kind) if kind.__hash__ else None


def _is_hooked(step):
    """Whether calling it does more than its class's forward: it has hooks, its own forward, or recomputed norms."""
    if not isinstance(step, nn.Module):
        return False
    own = vars(step)
    changed = "forward" in own or own.get("_compiled_call_impl") is not None
    return changed or any(map(own.get, _HOOKS)) or any(way.order > _Fused.order for way in ways_of(step))


def _run(groups, x):
    first = x
    for step, *after in groups:
        if after:
            x = _run_norm(step, x, after, first)
        elif isinstance(step, _Added):
            x += _shortcut(step, first)
        else:
            x = step(x)
    return x


def _run_norm(norm, x, after, first):
    added = next((step for step in after if isinstance(step, _Added)), None)
    residual = None if added is None else _shortcut(added, first)
    if residual is not None and residual.shape != x.shape:
        residual = residual.expand_as(x)
    if isinstance(norm, GroupNorm):
        norm._check(x)
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, _activation(after[-1]), residual)


def _shortcut(added, first):
    return first if added.shortcut is None else added.shortcut(first)


def _run_fpn(fpn, x):
    features, results, above = fpn.bottom_up(x), [], None
    for name, lateral, output in zip(reversed(fpn.in_features), fpn.lateral_convs, fpn.output_convs):
        steps = [lateral]
        if above is not None:
            enlarged = F.interpolate(above, scale_factor=2.0, mode="nearest")
            steps.append(_Added(lambda _, enlarged=enlarged: enlarged))
        above = _run(_groups(steps, _is_hooked), features[name])
        if results and fpn._fuse_type == "avg":
            above /= 2
        results.insert(0, output(above))
    if fpn.top_block is not None:
        source = fpn.top_block.in_feature
        results.extend(
            fpn.top_block(features[source] if source in features else results[fpn._out_features.index(source)])
        )
    return dict(zip(fpn._out_features, results))
