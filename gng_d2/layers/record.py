"""What a state_dict says of each norm beside its weights: its groups, and whether its convolution is standardized.

Group norm's weights fit any number of groups. So each norm writes a record into the ``_metadata`` of the state_dict,
which adds no key, and compares it when it is loaded, by whichever program.

The record travels through ``torch.save``, ``torch.load`` (``weights_only`` too), the checkpointers of fvcore and
Detectron2 for .pth, a stripped ``module.``, ``deepcopy``, EMA. It is lost by ``dict(state_dict)`` and any
comprehension, in a .pkl, in safetensors and in TorchScript. After ``model.state_dict().update(file)``, and in a
distributed checkpoint, it is the record of the model itself, which then fits whatever the file holds.
"""

import logging
import sys
from collections.abc import Iterator, Mapping

from torch import nn

__all__ = ["norm_record", "write_record", "take_record", "records_of", "put_records", "fits", "describe_record"]

_KEY = "gng_d2"

Record = dict[str, object]


def norm_record(norm: nn.Module) -> Record:
    """The record of one of our norms.

    Keys: ``num_groups`` and ``in_channels`` (None: not known), ``weight_standardized``: True, False, or "folded"
    where the weights of its convolution were standardized for good.
    """
    folded = getattr(norm, "weight_standardization_folded", False)
    return {
        "num_groups": norm.num_groups,
        "in_channels": norm.in_channels,
        "weight_standardized": "folded" if folded else norm.weight_standardization,
    }


def write_record(norm: nn.Module, state_dict: Mapping, prefix: str) -> None:
    """Write the record of ``norm``, whose keys begin with ``prefix``: for its ``_save_to_state_dict``."""
    if hasattr(state_dict, "_metadata"):
        put_records(state_dict, {prefix[:-1]: norm_record(norm)})


def put_records(state_dict: Mapping, records: Mapping[str, Record]) -> None:
    """Write records by the norms' names into a state_dict that has ``_metadata``."""
    for name, record in records.items():
        state_dict._metadata[name] = {**state_dict._metadata.get(name, {}), _KEY: record}


def records_of(state_dict: Mapping) -> dict[str, Record]:
    """The records in a state_dict by the norms' names, without those that nobody could have written."""
    metadata = getattr(state_dict, "_metadata", None)
    if not isinstance(metadata, Mapping):
        return {}
    records = {name: _valid(entry.get(_KEY)) for name, entry in metadata.items() if isinstance(entry, Mapping)}
    return {name: record for name, record in records.items() if record is not None}


def _valid(record):
    if not isinstance(record, Mapping) or not {"num_groups", "weight_standardized"} <= set(record):
        return None
    sizes = all(n is None or (type(n) is int and n > 0) for n in (record["num_groups"], record.get("in_channels")))
    standardized = record["weight_standardized"]
    return record if sizes and (type(standardized) is bool or str(standardized) == "folded") else None


def take_record(norm: nn.Module, prefix: str, local_metadata: Mapping) -> None:
    """For the ``_load_from_state_dict`` of ``norm``: an unbound norm takes its groups from the record.

    The first norm of a model compares for all of them, and logs what differs or was not recorded.
    """
    record = _valid(local_metadata.get(_KEY))
    if norm.num_groups is None and record is not None and record["num_groups"] is not None:
        norm.num_groups, norm.in_channels = record["num_groups"], record.get("in_channels")
    model, state_dict = _load_in_progress()
    if model is not None and next(_our_norms(model)) == (prefix[:-1], norm):
        _log_differences(model, state_dict)


def _load_in_progress() -> tuple[nn.Module | None, Mapping | None]:
    """The model and the state_dict of the ``load_state_dict`` that calls this.

    PyTorch tells a module that is loaded neither, nor when the load is over. Without its frame there would be a
    warning for each norm.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    return (None, None) if frame is None else (frame.f_locals["self"], frame.f_locals["state_dict"])


def _our_norms(model) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(type(module), "norm_name"))


def _log_differences(model, state_dict):
    records = records_of(state_dict)
    loaded = {
        name: norm
        for name, norm in _our_norms(model)
        if (f"{name}.weight".lstrip(".") in state_dict if norm.affine else name in records)
    }
    differ = [
        f"{name or 'the norm'}: {describe_record(records[name])} there, {describe_record(norm_record(norm))} here"
        for name, norm in loaded.items()
        if name in records and norm.num_groups is not None and not fits(records[name], norm_record(norm))
    ]
    if differ:
        logging.getLogger(__name__).warning(
            f"{len(differ)} of {len(loaded)} norms take weights that were trained with other groups or another weight "
            f"standardization than they have here, for instance {differ[0]}"
        )
    unknown = [name for name, norm in loaded.items() if name not in records and norm.norm_name() != "GN"]
    if unknown:
        logging.getLogger(__name__).info(
            f"the groups of {len(unknown)} of {len(loaded)} norms were not checked, for instance "
            f"{unknown[0] or 'the norm'}: the weights came without a record of the groups that they were trained with"
        )


def fits(recorded: Record, here: Record) -> bool:
    """Whether weights of the one norm compute the same in the other. Folded weights are plain ones."""
    standardized = [record["weight_standardized"] is True for record in (recorded, here)]
    return recorded["num_groups"] == here["num_groups"] and standardized[0] == standardized[1]


def describe_record(record: Record | None) -> str:
    """For instance "8 groups and WS"; None: "no norm"."""
    if record is None:
        return "no norm"
    if record["num_groups"] is None:
        return "a norm without groups"
    standardized = {True: " and WS", "folded": " and folded WS"}.get(record["weight_standardized"], "")
    return f"{record['num_groups']} group{'s' * (record['num_groups'] > 1)}{standardized}"
