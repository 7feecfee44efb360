"""Check that the ``NORM`` keys of a config make our norms, which heads that compare names literally do not."""

import logging

from torch import nn

from gng_d2.errors import InputError, abbreviated
from gng_d2.layers.kinds import num_channels
from gng_d2.layers.norm_names import norm_from_name, norm_name

from .build import build_on_meta
from .config import Config, norm_keys, with_value


def check_norm_keys(cfg: Config, model: nn.Module | None = None) -> None:
    """See that each ``NORM`` key of a Detectron2 ``cfg`` that holds a name of ours has made norms of that name.

    In a lazy config these are the keys of its ``model`` that are called ``norm`` or end in ``_norm``.

    Some heads compare the name with "GN" or "BN", and with any other name they make no norm, or another one. So for
    each key the model is built with GN and BN in place of the name, without memory for its weights. Where this changes
    norms, there must be norms of our name. One INFO line lists the keys that change nothing, because this model does
    not use them. If the model cannot be built, a warning says that the key is not checked, and why.

    Args:
        model: the model of ``cfg``, by default built here. Give it if your project builds it from registries of its
            own, in which Detectron2 does not look.

    Raises:
        InputError: a key's norm was not made, or not at each place where GN is; names the key and a place.

    Examples::
        >>> cfg = get_cfg()  # doctest: +SKIP
        >>> cfg.MODEL.FCOS.NORM = "PGN"  # doctest: +SKIP
        >>> check_norm_keys(cfg, build_model(cfg))  # doctest: +SKIP
        InputError: MODEL.FCOS.NORM: PGN makes no norm at fcos_head.cls_tower.1, where GN makes one. ...
    """
    log, unused = logging.getLogger(__name__), []
    for key, value in norm_keys(cfg):
        make = norm_from_name(value) if isinstance(value, str) else None
        ours = make and norm_name(make(32))  # as such norms call themselves: GN32 is GN
        if ours is None or value == "GN":
            continue
        try:
            model = build_on_meta(cfg) if model is None else model
            name, changed = norms_of_key(cfg, key, model)
        except InputError as error:
            log.warning(f"{key} {value}: not checked whether it makes such norms. {error}")
            continue
        missing = [path for path, (here, _) in changed.items() if here != ours]
        # BN may make norms at more places, such as one for each level of a pyramid
        if missing and (name == "GN" or len(missing) == len(changed)):
            here, there = changed[missing[0]]
            raise InputError(
                f"{key}: {value} makes {here} at {abbreviated(missing, most=1)}, where {name} makes {there}. The code "
                f"that reads this key compares names and does not call detectron2.layers.get_norm. Use a name that it "
                f"knows, or let it call get_norm"
            )
        if not changed:
            unused.append(f"{key} {value}")
    if unused:
        log.info(f"{', '.join(unused)}: changes nothing, because this model has no norm that is made by that key")


def norms_of_key(cfg: Config, key: str, model: nn.Module) -> tuple[str, dict[str, tuple[str, str]]]:
    """The norms of ``model``, the model of ``cfg``, that the NORM key ``key`` makes.

    Returns:
        The name that took the place of the key's own, "GN" or "BN". And by path the norms that changed, each with what
        it is in ``model`` and what it is under that name; "no norm" where there is none.

    Raises:
        InputError: the model cannot be built under another name.
    """
    norms, value, failure = _norms(model), dict(norm_keys(cfg))[key], None
    for name in ("GN", "BN"):
        if name == value:
            continue
        try:
            others = _norms(build_on_meta(with_value(cfg, key, name), like=model))
        except InputError as error:
            failure = error
            continue
        pairs = {path: (norms.get(path, "no norm"), others.get(path, "no norm")) for path in {**norms, **others}}
        changed = {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
        if changed:
            return name, changed
    if failure is not None:
        raise failure
    return "GN", {}


def _norms(model) -> dict[str, str]:
    """Path -> name of each norm."""
    return {path: norm_name(m) for path, m in model.named_modules() if num_channels(m) is not None}
