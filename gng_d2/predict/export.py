"""A trained model as a file that runs without gng_d2 and Detectron2: TorchScript, ONNX, or torch.export.

The road is Detectron2's TracingAdapter. Norms are PyTorch's own op in all three, as tracing and exporting ask for it
(:func:`gng_d2.ops.backends.is_transformed`), and weight standardization has been folded into the weights.
"""

import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec

import numpy as np
import torch
from detectron2.export import TracingAdapter
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from gng_d2.errors import InputError

__all__ = [
    "FORMATS",
    "MIN_SIDE",
    "TOLERANCE",
    "backbone_input",
    "check_installed",
    "export",
    "largest_difference",
    "load_and_run",
]
__all__ += ["trace_backbone", "trace_model"]

FORMATS = ("torchscript", "onnx", "torch_export")

# Of the largest value of an output. float32 in another order of additions differs by 1e-6 to 1e-4.
TOLERANCE = 1e-3

# Of a backbone's images: smaller ones have one pixel in the last map of a pyramid, and torch.export takes a size of 1
# as fixed.
MIN_SIDE = 256


def check_installed(format: str) -> None:
    """Raises: InputError: a package that ``format`` needs is not installed."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if format == "onnx" and missing:
        raise InputError(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def trace_model(model: nn.Module, image: Tensor) -> TracingAdapter:
    """``model`` as a module from a (3, H, W) image to a tuple of tensors, whose names are :func:`output_names`.

    Boxes are in that image's pixels, masks are those of the boxes, as Detectron2's models have them before they are
    resized to an original image. The combination of a panoptic model is Python, and is left to the caller.
    """
    return _adapter(model, image, _predict)


def trace_backbone(model: nn.Module, images: Tensor) -> TracingAdapter:
    """``model.backbone`` as a module from a batch of :func:`backbone_input` to the tuple of its feature maps."""
    return _adapter(model.backbone, images, lambda backbone, images: backbone(images))


def backbone_input(model: nn.Module, image: Tensor) -> Tensor:
    """A (3, H, W) image as the backbone takes it: (1, 3, H', W'), normalized, padded to what it can divide."""
    normalized = (image.to(model.pixel_mean.device) - model.pixel_mean) / model.pixel_std
    return ImageList.from_tensors([normalized], model.backbone.size_divisibility).tensor


def output_names(adapter: TracingAdapter) -> list[str]:
    return adapter.outputs_schema.keys


def _adapter(module, example, function):
    adapter = TracingAdapter(module, example, function).eval()
    adapter(example)  # from which it knows its outputs
    return adapter


def _predict(model, image):
    inputs = [{"image": image}]
    if not hasattr(model, "roi_heads"):
        return _tensors(model(inputs)[0])
    outputs = model.inference(inputs, do_postprocess=False)
    if isinstance(outputs, tuple):  # a panoptic model's two heads
        (instances,), (sem_seg,) = outputs
        return {**_tensors({"instances": instances}), "sem_seg": sem_seg[:, : image.shape[1], : image.shape[2]]}
    return _tensors({"instances": outputs[0]})


def _tensors(output):
    tensors = {}
    for name, value in output.items():
        if isinstance(value, Instances):
            tensors.update({key: getattr(field, "tensor", field) for key, field in value.get_fields().items()})
        else:
            tensors[name] = value
    return tensors


def export(adapter: TracingAdapter, format: str, path: str) -> None:
    """Write ``adapter`` to the file ``path``.

    A backbone takes any number of images of any size that it can divide, from MIN_SIDE pixels on. A whole model takes
    one image of any size in TorchScript and ONNX, and in torch.export one of the size that it was traced with.

    Raises:
        InputError: the model cannot be exported in this format; says what can. Or PyTorch is older than 2.6, and the
            format not TorchScript.
    """
    if format != "torchscript" and torch.__version__ < (2, 6):
        raise InputError(
            f"--format {format} needs PyTorch 2.6 or newer; this is {torch.__version__}. It can export torchscript, or "
            f"install a newer one: pip install 'torch>=2.6'"
        )
    try:
        with _quiet(), torch.no_grad():
            _EXPORT[format](adapter, path)
    except Exception as error:  # of any kind: it runs the model's Python in a way that it was not written for
        line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"--format {format} cannot take this model: {type(error).__name__}: {line}. Whole models can "
            f"be exported as torchscript and onnx; --backbone exports the backbone alone, in each format"
        ) from error


@contextmanager
def _quiet():
    """Without the warnings of each Python number on the way, by the hundred, and the graphs that failed."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _torchscript(adapter, path):
    torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False).save(path)


def _torch_export(adapter, path):
    torch.export.save(_program(adapter), path)


def _onnx(adapter, path):
    if _is_batch(adapter):
        torch.onnx.export(
            _program(adapter),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=output_names(adapter),
        ).save(path, external_data=False)
        return
    # torch.export, and with it dynamo=True, cannot take a number of detections that depends on the image.
    torch.onnx.export(
        adapter,
        adapter.flattened_inputs,
        path,
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=output_names(adapter),
        dynamic_axes={"image": {1: "height", 2: "width"}},
    )


_EXPORT = {"torchscript": _torchscript, "onnx": _onnx, "torch_export": _torch_export}


def _is_batch(adapter):
    return adapter.flattened_inputs[0].dim() == 4


def _program(adapter):
    auto = torch.export.Dim.AUTO
    shapes = (({0: auto, 2: auto, 3: auto},),) if _is_batch(adapter) else None
    return torch.export.export(adapter, adapter.flattened_inputs, dynamic_shapes=shapes, strict=False)


_LOAD_AND_RUN = """
import sys
sys.modules.update(gng_d2=None, detectron2=None)  # as where they are not installed: importing them is an error
import numpy as np
format, device, path, inputs, outputs = sys.argv[1:]
examples = list(np.load(inputs).values())
if format == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    results = [session.run(None, {session.get_inputs()[0].name: example}) for example in examples]
else:
    import torch, torchvision  # whose ops a detector needs
    load = torch.jit.load if format == "torchscript" else lambda path: torch.export.load(path).module()
    model = load(path)
    with torch.no_grad():
        results = [[x.cpu().numpy() for x in model(torch.as_tensor(e, device=device))] for e in examples]
np.savez(outputs, **{f"{i} {j}": x for i, result in enumerate(results) for j, x in enumerate(result)})
"""


def load_and_run(path: str, format: str, examples: Sequence[Tensor]) -> list[list[Tensor]]:
    """The outputs of the exported file ``path`` for each example, from a process that can import neither gng_d2 nor
    Detectron2.

    Raises:
        InputError: the file cannot be loaded or run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = os.path.join(folder, "inputs.npz"), os.path.join(folder, "outputs.npz")
        np.savez(inputs, *(example.cpu().numpy() for example in examples))
        command = [sys.executable, "-W", "ignore", "-c", _LOAD_AND_RUN, format, str(examples[0].device), path]
        done = subprocess.run([*command, inputs, outputs], capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise InputError(f"the exported file does not run without gng_d2 and Detectron2: {' '.join(last)}")
        arrays = np.load(outputs)
        results: list[list[Tensor]] = [[] for _ in examples]
        for key in sorted(arrays.files, key=lambda key: [int(i) for i in key.split()]):
            results[int(key.split()[0])].append(torch.as_tensor(arrays[key]))
        return results


def largest_difference(adapter: TracingAdapter, examples: Sequence[Tensor], results: Sequence[list[Tensor]]) -> float:
    """By how much the ``results`` of an exported file differ from what the model says, at most, as a part of the
    largest value of each output. Detections may come in another order.

    Raises:
        InputError: by more than TOLERANCE, or in number.
    """
    names, largest = output_names(adapter), 0.0
    for example, result in zip(examples, results):
        expected = dict(zip(names, (x.cpu() for x in adapter(example))))
        found = dict(zip(names, result))
        where = f"The exported file differs from the model on an image of {tuple(example.shape)}"
        for name in names:
            if found[name].shape != expected[name].shape:
                shapes = f"{tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
                raise InputError(f"{where}: {name} is {shapes}. Nothing is written")
        found = _in_the_order_of(expected, found)
        for name in names:
            difference = _difference(expected[name].double(), found[name].double())
            if not difference <= TOLERANCE:  # NaN is not
                raise InputError(f"{where}: {name} by {difference:.1e} of its largest value. Nothing is written")
            largest = max(largest, difference)
    return largest


def _difference(expected, found):
    if not expected.numel():
        return 0.0
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))


def _in_the_order_of(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detections of nearly the same score may have changed places."""
    if "pred_boxes" not in expected or not len(expected["pred_boxes"]):
        return found
    distance = torch.cdist(expected["pred_boxes"], found["pred_boxes"], p=float("inf"))
    distance += 1e6 * (expected["pred_classes"][:, None] != found["pred_classes"])
    order = distance.argmin(dim=1)
    return {name: x if name == "sem_seg" else x[order] for name, x in found.items()}
