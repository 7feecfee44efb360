"""A trained model as a file that runs without gng_d2 and Detectron2: TorchScript, ONNX, or torch.export.

Detectron2's TracingAdapter turns a model into one from tensors to tensors. While it is traced or exported, the norms
run PyTorch's own op (:func:`gng_d2.ops.backends.is_transformed`). Weight standardization must be folded before.
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

import torch
from detectron2.export import TracingAdapter
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from gng_d2.errors import InputError
from gng_d2.job.files import atomic_open

__all__ = ["FORMATS", "MIN_SIDE", "TOLERANCE", "backbone_input", "check_format", "export", "largest_difference"]
__all__ += ["load_and_run", "output_names", "trace"]

FORMATS = ("torchscript", "onnx", "torch_export")

# as a part of the largest value of an output: float32 sums in another order differ by 1e-6 to 1e-4
TOLERANCE = 1e-3

# Of the images that a backbone is exported with. The last map of a pyramid has one pixel for smaller ones, and
# torch.export takes a size of 1 as fixed.
MIN_SIDE = 256


def check_format(format: str) -> None:
    """Raises: InputError: PyTorch is too old for ``format``, or a package that it needs is not installed."""
    if format != "torchscript" and torch.__version__ < (2, 6):
        raise InputError(
            f"--format {format} needs PyTorch 2.6 or newer; this is {torch.__version__}. Export torchscript, or "
            f"install a newer one: pip install 'torch>=2.6'"
        )
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if format == "onnx" and missing:
        raise InputError(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def trace(model: nn.Module, example: Tensor, backbone: bool = False) -> TracingAdapter:
    """``model`` as a module from a tensor to a tuple of tensors, whose names are :func:`output_names`.

    - A whole model takes a (3, H, W) image. Its boxes are in pixels of that image and its masks are relative to their
      boxes, as Detectron2's models have them before they resize results to the original image. The step that combines
      the two heads of a panoptic model is Python code and is left out.
    - A backbone takes a batch as :func:`backbone_input` makes it, and returns the feature maps.
    """
    if backbone:
        adapter = TracingAdapter(model.backbone, example)
    else:
        adapter = TracingAdapter(model, example, _predict)
    adapter.eval()(example)  # after this call it knows its outputs
    return adapter


def backbone_input(model: nn.Module, image: Tensor) -> Tensor:
    """A (3, H, W) image as the backbone takes it: (1, 3, H', W'), normalized, with sides that the backbone can divide
    and that have MIN_SIDE pixels or more."""
    normalized = (image.to(model.pixel_mean.device) - model.pixel_mean) / model.pixel_std
    scale = max(1.0, MIN_SIDE / min(image.shape[1:]))
    normalized = nn.functional.interpolate(normalized[None], size=[round(scale * side) for side in image.shape[1:]])[0]
    return ImageList.from_tensors([normalized], model.backbone.size_divisibility).tensor


def output_names(adapter: TracingAdapter) -> list[str]:
    return adapter.outputs_schema.keys


def _predict(model, image):
    inputs = [{"image": image}]
    if not hasattr(model, "roi_heads"):
        return _tensors(model(inputs)[0])
    outputs = model.inference(inputs, do_postprocess=False)
    if isinstance(outputs, tuple):  # the two heads of a panoptic model
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


def export(adapter: TracingAdapter, format: str) -> bytes:
    """The content of a file in ``format`` that computes what ``adapter`` does.

    An exported backbone takes any number of images, of any size that it can divide, from MIN_SIDE pixels on. A whole
    model takes one image: of any size in TorchScript and ONNX, of the size that it was traced with in torch.export.

    Raises:
        InputError: the model cannot be exported in this format; says in which it can.
    """
    try:
        with _quiet(), torch.no_grad():
            return _EXPORT[format](adapter, adapter.flattened_inputs)
    except Exception as error:  # of any kind, because exporters run the model's Python on things that are no tensors
        line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"--format {format} cannot take this model: {type(error).__name__}: {line}. Whole models can "
            f"be exported as torchscript and onnx; --backbone exports the backbone alone, in each format"
        ) from error


@contextmanager
def _quiet():
    """Silences the hundreds of warnings about Python numbers in a trace, and the printed graph of a failed export."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _torchscript(adapter, inputs):
    return torch.jit.trace(adapter, inputs, check_trace=False).save_to_buffer()


def _torch_export(adapter, inputs):
    auto, content = torch.export.Dim.AUTO, io.BytesIO()
    shapes = (({0: auto, 2: auto, 3: auto},),) if inputs[0].dim() == 4 else None
    torch.export.save(torch.export.export(adapter, inputs, dynamic_shapes=shapes, strict=False), content)
    return content.getvalue()


def _onnx(adapter, inputs):
    names = output_names(adapter)
    if inputs[0].dim() == 4:
        axes = {0: "batch", 2: "height", 3: "width"}
        options = {"dynamo": True, "verbose": False, "dynamic_shapes": ((axes,),)}
        program = torch.onnx.export(adapter, inputs, input_names=["images"], output_names=names, **options)
        return program.model_proto.SerializeToString()
    axes = {name: {1: "height", 2: "width"} if name == "sem_seg" else {0: "detections"} for name in names}
    axes["image"] = {1: "height", 2: "width"}
    # torch.export, on which dynamo=True relies, cannot take a number of detections that depends on the image
    options, content = {"dynamo": False, "opset_version": 17, "dynamic_axes": axes}, io.BytesIO()
    torch.onnx.export(adapter, inputs, content, input_names=["image"], output_names=names, **options)
    return _with_fixed_sizes(content.getvalue(), adapter(*inputs))


def _with_fixed_sizes(content, outputs):
    """An ONNX model with those sizes of its ``outputs`` that its exporter took for dynamic ones without a name."""
    import onnx

    model = onnx.load_from_string(content)
    for value, output in zip(model.graph.output, outputs):
        for dim, size in zip(value.type.tensor_type.shape.dim, output.shape):
            if dim.dim_param not in ("height", "width", "detections"):
                dim.dim_value = size
    return model.SerializeToString()


_EXPORT = {"torchscript": _torchscript, "onnx": _onnx, "torch_export": _torch_export}


_LOAD_AND_RUN = """
import sys
sys.modules.update(gng_d2=None, detectron2=None)  # importing them is an error, as where they are not installed
import torch, torchvision  # torchvision has ops that a detector needs
format, device, path, inputs, outputs = sys.argv[1:]
if format == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model = lambda example: session.run(None, {session.get_inputs()[0].name: example.numpy()})
else:
    model = torch.jit.load(path) if format == "torchscript" else torch.export.load(path).module()
with torch.no_grad():
    results = [model(example.to(device)) for example in torch.load(inputs)]
torch.save([[torch.as_tensor(x).cpu() for x in result] for result in results], outputs)
"""


def load_and_run(content: bytes, format: str, examples: Sequence[Tensor]) -> list[list[Tensor]]:
    """The outputs of an exported file's ``content`` for each example, from a process that can import neither gng_d2
    nor Detectron2.

    Raises:
        InputError: the file cannot be loaded or run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, inputs, outputs = (os.path.join(folder, name) for name in ("model.pt2", "inputs", "outputs"))
        with atomic_open(path, "wb") as file:
            file.write(content)
        with atomic_open(inputs, "wb") as file:
            torch.save([example.cpu() for example in examples], file)
        device = "cpu" if format == "onnx" else str(examples[0].device)
        command = [sys.executable, "-W", "ignore", "-c", _LOAD_AND_RUN, format, device, path, inputs, outputs]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise InputError(f"the exported file does not run without gng_d2 and Detectron2: {' '.join(last)}")
        return torch.load(outputs)


def largest_difference(adapter: TracingAdapter, examples: Sequence[Tensor], results: Sequence[list[Tensor]]) -> float:
    """The largest difference between the ``results`` of an exported file and the model's, as a part of the largest
    value of each output. The order of detections does not count.

    Raises:
        InputError: they differ by more than TOLERANCE, or in shape.
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
            ours, theirs = expected[name].double(), found[name].double()
            difference = 0.0
            if ours.numel():
                difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-6))
            if not difference <= TOLERANCE:  # which holds for NaN too
                raise InputError(f"{where}: {name} by {difference:.1e} of its largest value. Nothing is written")
            largest = max(largest, difference)
    return largest


def _in_the_order_of(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """``found`` with its detections in the order of ``expected``: those of nearly the same score may change places."""
    if "pred_boxes" not in expected or not len(expected["pred_boxes"]):
        return found
    distance = torch.cdist(expected["pred_boxes"], found["pred_boxes"], p=float("inf"))
    distance += 1e6 * (expected["pred_classes"][:, None] != found["pred_classes"])
    order = distance.argmin(dim=1)
    return {name: x if name == "sem_seg" else x[order] for name, x in found.items()}
