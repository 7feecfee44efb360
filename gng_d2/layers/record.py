"""The record of each norm in a state_dict: its groups, and whether its convolution is standardized.

The weights of a group norm fit any number of groups. So each norm writes a record into the ``_metadata`` of the
state_dict, which adds no key, and compares itself with the record when any program loads the weights.

The record survives ``torch.save``, ``torch.load`` (``weights_only`` too), fvcore's and Detectron2's checkpointers
for .pth, a stripped ``module.``, ``deepcopy`` and EMA. It is lost in ``dict(state_dict)`` and any comprehension, in a
.pkl, in safetensors and in TorchScript. After ``model.state_dict().update(file)``, and in a distributed checkpoint, the
record is that of the model itself, so the comparison finds no difference whatever the file holds.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

_KEY = "gng_d2"

Record = dict[str, object]


def norm_record(norm: nn.Module) -> Record:
    """The record of one of our norms.

    Its keys are ``num_groups`` (None if unknown, "learned" if it has groups of all sizes), ``in_channels`` (None if
    unknown), and ``weight_standardized``: True, False, or "folded" if the standardized weights were written into the
    convolution.
    """
    return {
        "num_groups": norm.recorded_groups(),
        "in_channels": norm.in_channels,
        "weight_standardized": "folded" if norm.weight_standardization_folded else norm.weight_standardization,
    }


def put_records(state_dict: Mapping, records: Mapping[str, Record]) -> None:
    """Write ``records``, a dict by the norms' names, into a state_dict that has ``_metadata``."""
    for name, record in records.items():
        state_dict._metadata[name] = {**state_dict._metadata.get(name, {}), _KEY: record}


def records_of(state_dict: Mapping) -> dict[str, Record]:
    """The records in a state_dict, by the norms' names."""
    metadata = getattr(state_dict, "_metadata", {})
    return {name: entry[_KEY] for name, entry in metadata.items() if _KEY in entry}


# the weight_layer of a norm whose groups come from a record
_RECORD = "the layer of a checkpoint's record"


def take_record(norm: Any, state_dict: Mapping, prefix: str, local_metadata: Mapping, load: list) -> None:
    """Compare ``norm`` with the record of the weights that it loads. A PGN without groups takes the record's groups.

    Its ``_load_from_state_dict`` calls this. A message that holds for many norms is logged once, for the first.

    Args:
        load: the list of errors that PyTorch passes to each module of one ``load_state_dict``. It shows where
            one load ends and the next begins.
    """
    record = local_metadata.get(_KEY)
    is_loaded = f"{prefix}weight" in state_dict if norm.affine else record is not None
    if not is_loaded:
        return
    name = prefix[:-1] or "the norm"
    if record is None:
        if norm.norm_name() != "GN":
            _log_once(load, logging.INFO, f"{name}: its groups were not checked, because its weights have no record")
        return
    takes = isinstance(record["num_groups"], int) and not norm.weight_standardization and not norm.is_bound()
    if takes:
        norm.num_groups, norm.weight_layer = record["num_groups"], _RECORD
        n_in = record.get("in_channels")
        if n_in and norm.groups_after(n_in) == norm.num_groups:
            norm.in_channels = n_in
    there, here = describe_record(record), norm_record(norm)
    unknown = here["num_groups"] is None and isinstance(record["num_groups"], int)
    if not fits(record, {**here, "num_groups": record["num_groups"] if unknown else here["num_groups"]}):
        here = describe_record(here)
        _log_once(load, logging.WARNING, f"{name}: {here} here, {there} where its weights were trained")
    elif takes and norm.in_channels is None:
        taken = f"{name}: this PGN takes {there} from the record of its weights, which another kind of norm wrote"
        _log_once(load, logging.WARNING, f"{taken}. Training or gng_d2.bind_norms compares them with its real layer")


_logged: dict[int, list] = {}  # level -> the load of the last message


def _log_once(load, level, message):
    if _logged.get(level) is not load:
        _logged[level] = load
        logging.getLogger(__name__).log(level, f"{message}. The same may hold for other norms of this model")


def fits(recorded: Record, here: Record) -> bool:
    """Whether weights of one norm compute the same in the other. Folded weights count as plain ones."""
    standardized = [record["weight_standardized"] is True for record in (recorded, here)]
    return recorded["num_groups"] == here["num_groups"] and standardized[0] == standardized[1]


def describe_record(record: Record | None) -> str:
    """Describe a record, for instance "8 groups and WS"; None is "no norm"."""
    if record is None:
        return "no norm"
    if record["num_groups"] is None:
        return "a norm without groups"
    standardized = {True: " and WS", "folded": " and folded WS"}.get(record["weight_standardized"], "")
    return f"{record['num_groups']} group{'s' * (record['num_groups'] != 1)}{standardized}"
