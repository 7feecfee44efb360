"""A trained model, ready for inference."""

from fvcore.common.checkpoint import _filter_reused_missing_keys
from torch import nn

from gng_d2.errors import InputError, abbreviated
from gng_d2.job.build import bind_remaining_norms
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.models.fold import fold_weight_standardization

__all__ = ["load_model", "set_threshold"]


def load_model(model: nn.Module, weights: str) -> nn.Module:
    """Load the file ``weights`` into ``model`` for inference: in eval mode, without gradients, with weight
    standardization folded.

    Raises:
        InputError: the file lacks a weight of the model or has it in another shape, it is of a model with more layers,
            or a weight is not finite.
    """
    if not weights:
        raise InputError("no file of weights is given: the model would predict with weights that nobody trained")
    bind_remaining_norms(model).eval()
    _WholeCheckpointer(model).load(weights)
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"{weights}: weights are not finite: {abbreviated(broken)}. The training may have diverged")
    return fold_weight_standardization(model).requires_grad_(False)


class _WholeCheckpointer(Checkpointer):
    """Raises an error where fine-tuning would keep a fresh weight or ignore a trained one."""

    def _log_incompatible_keys(self, incompatible):
        mend = "Use the config that the weights were trained with (the config.yaml beside them)"
        misshapen = [
            f"{name} ({theirs} there, {ours} in the model)" for name, theirs, ours in incompatible.incorrect_shapes
        ]
        if misshapen:
            raise InputError(f"{self._reading} has weights of other shapes: {abbreviated(misshapen)}. {mend}")
        without_alias = set(_filter_reused_missing_keys(self.model, incompatible.missing_keys))
        missing = [name for name in incompatible.missing_keys if name in without_alias]
        if missing:
            count = len(self.model.state_dict())
            raise InputError(
                f"{self._reading} lacks {len(missing)} of the model's {count} weights: {abbreviated(missing)}. {mend}"
            )
        unknown = [key for key in incompatible.unexpected_keys if _belongs_to_another_layer(self.model, key)]
        if unknown:
            raise InputError(
                f"{self._reading} is of another model, with layers that this one lacks: {abbreviated(unknown)}. {mend}"
            )
        super()._log_incompatible_keys(incompatible)


def _belongs_to_another_layer(model, key):
    """Whether a part that ``model`` has would compute something else with the weight ``key``, which it lacks.

    A whole part that the model lacks, such as a mask head, changes nothing in the other parts.
    """
    module = model
    for part in key.split("."):
        if module._modules.get(part) is None:
            break
        module = module._modules[part]
    if module is model or part == "num_batches_tracked" or getattr(module, part, None) is not None:
        return False
    own = {**module._parameters, **module._buffers}
    return bool(own) or isinstance(module, (nn.Sequential, nn.ModuleList))


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Make a Detectron2 ``model`` leave out the instances whose score is below ``threshold``, and no others."""
    for module in model.modules():
        for name in ("test_score_thresh", "combine_instances_score_thresh"):  # of heads; of a panoptic combination
            if hasattr(module, name):
                setattr(module, name, threshold)
