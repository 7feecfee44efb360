"""The model of a config, YAML or lazy, with its norms bound to their layers."""

import logging
import re
from collections.abc import Callable
from contextlib import contextmanager, suppress

import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from omegaconf import OmegaConf
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from gng_d2.errors import InputError
from gng_d2.layers.binding import build_naming_norms, unbound_norms
from gng_d2.models.bind_norms import bind_norms

from .config import Config, leaves, norm_keys, with_value


def build(cfg: Config, device: str | None = None, make: Callable = build_model) -> nn.Module:
    """The model of ``cfg`` with fresh weights.

    Args:
        device: by default that of the config, MODEL.DEVICE or train.device, or the CPU where there is no CUDA.
        make: builds the model of a YAML config.

    Raises:
        InputError: the model cannot be built; names the key at fault if one is found.
    """
    try:
        if isinstance(cfg, CfgNode):
            return build_naming_norms(make, with_value(cfg, "MODEL.DEVICE", device) if device else cfg)
        return build_naming_norms(instantiate, cfg.model).to(device or _device(cfg))
    except Exception as error:  # of any kind, as any constructor may run that the config names
        key_at_fault = "" if device == "meta" else _key_at_fault(cfg, make)
        raise InputError(_why_not(cfg, error).rstrip(".") + key_at_fault) from error


def _why_not(cfg, error):
    """Why the model of ``cfg`` cannot be built."""
    if isinstance(error, InputError):
        unknown = [f"{key}: " for key, value in norm_keys(cfg) if str(error).startswith(f"unknown norm {value!r}")]
        return "".join(unknown[:1]) + str(error)
    reason = f"{type(error).__name__}: {error}"
    unregistered = re.search("No object named .* registry!", str(error))
    if unregistered:
        reason = f"{unregistered[0]} Your own is registered by a module of yours: --import FILE.py runs it first"
    return f"the model of this config cannot be built: {reason}"


def _device(cfg):
    device = str(OmegaConf.select(cfg, "train.device") or "cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).info("no CUDA device here: train.device is cpu")
        return "cpu"
    return device


def _key_at_fault(cfg, make):
    """A sentence on the first key with whose default value the model can be built. Numbers are tried before names, and
    those of norms before others."""
    if not isinstance(cfg, CfgNode):
        return ""
    with suppress(InputError), _parameters_on_meta():
        build(cfg, "meta", make)
        return ""  # the device is at fault, or the memory
    defaults = dict(leaves(get_cfg()))
    differing = [(k, v) for k, v in leaves(cfg) if k.startswith("MODEL.") and defaults.get(k, v) != v]
    for key, value in sorted(differing, key=lambda pair: (isinstance(pair[1], str), not pair[0].endswith(".NORM"))):
        with suppress(InputError), _parameters_on_meta():
            build(with_value(cfg, key, defaults[key]), "meta", make)
            return f". {key} is {value!r}; with its default, {defaults[key]!r}, the model can be built"
    return ""


def build_on_meta(cfg: Config, like: nn.Module | None = None) -> nn.Module:
    """The model of ``cfg`` for its structure alone, with parameters on the meta device, where they take no memory.

    A model that computes with its parameters while it is built is built on the CPU.

    Args:
        like: a model of such a YAML config. If Detectron2's registry lacks its class, because another project's
            registry has it, that class builds this model too.

    Raises:
        InputError: the model cannot be built.
    """
    make = build_model
    if like is not None and isinstance(cfg, CfgNode):
        if type(like) is not META_ARCH_REGISTRY._obj_map.get(cfg.MODEL.META_ARCHITECTURE):
            make = type(like)
    try:
        with _parameters_on_meta():
            return build(cfg, "meta", make)
    except InputError:
        return build(cfg, "cpu", make)


@contextmanager
def _parameters_on_meta():
    """Inside, a parameter moves to the meta device when a module gets it. Other tensors stay where they are made, as a
    constructor may read numbers from them."""

    def moved(module, name, parameter):
        if parameter is None or parameter.is_meta or is_lazy(parameter):
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        hook.remove()


def bind_remaining_norms(model: nn.Module) -> nn.Module:
    """Bind the norms of a Detectron2 ``model`` that met no layer while it was built, and return the model.

    If there are any, the model runs on a blank image. A norm that this does not reach (in a mask head, as nothing is
    detected) stays unbound. It takes its groups from weights that are loaded, or in the first training step.
    """
    if unbound_norms(model):
        try:
            bind_norms(model, [{"image": torch.zeros(3, 256, 256), "height": 256, "width": 256}])
        except InputError as error:
            logging.getLogger(__name__).warning(f"norms that met no layer stay unbound: {error}")
    return model
