"""Whether the ``NORM`` keys of a config do what they say: heads that compare norm names literally ignore ours."""

import logging

from torch import nn

from gng_d2.errors import InputError
from gng_d2.layers.kinds import num_channels
from gng_d2.layers.norm_names import norm_from_name, norm_name

from .build import build_on_meta
from .config import norm_keys, with_value

__all__ = ["check_norm_keys"]


def check_norm_keys(cfg, model: nn.Module | None = None) -> None:
    """Every ``NORM`` key of a Detectron2 ``cfg`` that holds a name of ours has made norms of that name.

    In a lazy config the keys are those of its ``model`` that are called ``norm`` or end in ``_norm``.

    Some heads compare the name with "GN" or "BN" and give no norm, or another, where it is neither. So for each key the
    model is built, on the meta device, with those names in its place. Where they change the norms, ours has to as well.
    A key that changes nothing under any name is not used by this model, and passes; where the model cannot be built on
    the meta device, a line in the log says that the key is not checked.

    Args:
        model: the model of ``cfg``. None: it is built on the meta device.

    Raises:
        InputError: a key's norm was not made, or not everywhere where GN is; names the key and a place.

    Examples::
        >>> cfg = get_cfg()  # doctest: +SKIP
        >>> cfg.MODEL.FCOS.NORM = "PGN"  # doctest: +SKIP
        >>> check_norm_keys(cfg, build_model(cfg))  # doctest: +SKIP
        InputError: MODEL.FCOS.NORM: PGN makes no norm at fcos_head.cls_tower.1, where GN makes one. ...
    """
    keys = [(key, value) for key, value in norm_keys(cfg) if value != "GN" and _canonical(value)]
    if not keys:
        return
    norms = _norms(model) if model is not None else _norms_of(cfg)
    for key, value in keys:
        if norms is None or not _is_checked(cfg, key, value, norms):
            logging.getLogger(__name__).warning(
                f"{key} {value}: not checked whether it makes such norms, the model cannot be built on the meta device"
            )


def _is_checked(cfg, key, value, norms):
    ours, could_be_built = _canonical(value), False
    for name in ("GN", "BN"):
        others = _norms_of(cfg, key, name)
        if others is None:
            continue
        could_be_built = True
        changed = [path for path in {**norms, **others} if norms.get(path) != others.get(path)]
        made = [path for path in changed if norms.get(path) == ours]
        # Under BN there can be norms in other places, such as one for each level of a pyramid.
        missing = [path for path in changed if path not in made] if name == "GN" or not made else []
        if missing:
            raise InputError(_message(key, value, name, missing, norms, others))
        if changed:
            break
    return could_be_built


def _message(key, value, name, missing, norms, others):
    path = missing[0]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"{key}: {value} makes {norms.get(path, 'no norm')} at {path}{more}, where {name} makes "
        f"{others.get(path, 'no norm')}. The code that reads this key does not ask detectron2.layers.get_norm for its "
        f"norms, but compares names: use one that it knows, or have it call get_norm"
    )


def _canonical(value):
    """The name that norms of the name ``value`` give themselves, as GN32 is GN; None where it is none of ours."""
    make = norm_from_name(value) if isinstance(value, str) else None
    return make and norm_name(make(32))


def _norms(model) -> dict[str, str]:
    """Path -> name of each norm."""
    return {path: norm_name(m) for path, m in model.named_modules() if num_channels(m) is not None}


def _norms_of(cfg, key=None, name=None) -> dict[str, str] | None:
    cfg = with_value(cfg, key, name) if key else cfg
    try:
        return _norms(build_on_meta(cfg))
    except InputError:
        return None
