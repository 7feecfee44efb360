"""The model of a config, YAML or lazy, with its norms bound to their layers."""

import logging

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from torch import nn

from gng_d2.errors import InputError
from gng_d2.layers.binding import build_naming_norms, unbound_norms
from gng_d2.models.bind_norms import bind_norms

from .config import Config, norm_keys, with_value

__all__ = ["bind_remaining_norms", "build", "build_on_meta"]


def build(cfg: Config, device: str | None = None) -> nn.Module:
    """The model of ``cfg`` with fresh weights.

    Args:
        device: None: the config's own, MODEL.DEVICE or train.device, or the CPU where there is no CUDA.

    Raises:
        InputError: it cannot be built.
    """
    try:
        if isinstance(cfg, CfgNode):
            return build_naming_norms(build_model, with_value(cfg, "MODEL.DEVICE", device) if device else cfg)
        return build_naming_norms(instantiate, cfg.model).to(device or _device(cfg))
    except InputError as error:
        unknown = [key for key, value in norm_keys(cfg) if str(error).startswith(f"unknown norm {value!r}")]
        raise InputError(f"{unknown[0]}: {error}" if unknown else str(error)) from error
    except Exception as error:  # of any kind: it runs every constructor that the config names
        raise InputError(f"the model of this config cannot be built: {type(error).__name__}: {error}") from error


def _device(cfg):
    device = str(OmegaConf.select(cfg, "train.device") or "cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).info("no CUDA device here: train.device is cpu")
        return "cpu"
    return device


def build_on_meta(cfg) -> nn.Module:
    """The model of a Detectron2 ``cfg``, YAML or lazy, without memory for its weights: for its structure, in a second.

    Raises:
        InputError: Detectron2 cannot build it.
    """
    with torch.device("meta"):
        return build(cfg, "meta")


def bind_remaining_norms(model: nn.Module) -> nn.Module:
    """Bind the norms of a Detectron2 ``model`` that met no layer while it was built, if there are any, and return it.

    The model runs on a blank image for it. What that does not reach (a mask head, where nothing is detected) stays
    unbound, and takes its groups from weights that are loaded or in the first training step.
    """
    if unbound_norms(model):
        side = 256
        try:
            bind_norms(model, [{"image": torch.zeros(3, side, side), "height": side, "width": side}])
        except InputError as error:
            logging.getLogger(__name__).warning(f"norms that met no layer stay unbound: {error}")
    return model
