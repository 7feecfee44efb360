"""A trained model as a file that runs without gng_d2 and Detectron2: TorchScript, ONNX, or torch.export.

Detectron2's TracingAdapter makes a model take and return tensors. While it is traced or exported, the norms run
PyTorch's own op (:func:`gng_d2.ops.backends.is_transformed`). Weight standardization must be folded before.
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
from torch.onnx import symbolic_helper

from gng_d2.errors import InputError

# The largest difference that is allowed, as a part of an output's largest value. Where float32 numbers are added in
# another order, sums differ by 1e-6 to 1e-4.
TOLERANCE = 1e-3

_OPSET = 17  # of ONNX, for whole models

# The smallest side of the images with which a backbone is exported. With smaller ones the last map of a pyramid has one
# pixel, and torch.export would take that size as fixed.
MIN_SIDE = 256


def check_format(format: str) -> None:
    """Check that a model can be exported to ``format`` here.

    Raises:
        InputError: PyTorch is too old for ``format``, or a package that it needs is not installed.
    """
    if format != "torchscript" and torch.__version__ < (2, 6):
        raise InputError(
            f"--format {format} needs PyTorch 2.6 or newer; this is {torch.__version__}. Export torchscript, or "
            f"install a newer one: pip install 'torch>=2.6'"
        )
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if format == "onnx" and missing:
        raise InputError(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def trace(model: nn.Module, example: Tensor, backbone: bool = False) -> TracingAdapter:
    """``model`` as a module from a tensor to a tuple of tensors, which are called by :func:`output_names`.

    - A whole model takes a (3, H, W) image. Its boxes are in pixels of that image and its masks are relative to their
      boxes, as in Detectron2's models before they resize results to the original image. The step that combines the two
      heads of a panoptic model is Python code and is left out.
    - A backbone takes a batch as :func:`backbone_input` makes it, and returns the feature maps.
    """
    adapter = TracingAdapter(model.backbone, example) if backbone else TracingAdapter(model, example, _predict)
    adapter.eval()(example)  # this call records the names of the outputs
    return adapter


def backbone_input(model: nn.Module, image: Tensor) -> Tensor:
    """The input of the backbone for a (3, H, W) image: it is normalized, (1, 3, H', W'), and its sides are multiples of
    the backbone's largest stride and have MIN_SIDE pixels or more."""
    normalized = (image.to(model.pixel_mean.device) - model.pixel_mean) / model.pixel_std
    scale = max(1.0, MIN_SIDE / min(image.shape[1:]))
    normalized = nn.functional.interpolate(normalized[None], size=[round(scale * side) for side in image.shape[1:]])[0]
    return ImageList.from_tensors([normalized], model.backbone.size_divisibility).tensor


def output_names(adapter: TracingAdapter) -> list[str]:
    """The names of the tensors that :func:`trace`'s module returns, in their order."""
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

    An exported backbone takes any number of images, whose sides are multiples of its largest stride and have MIN_SIDE
    pixels or more. A whole model takes one image: in TorchScript and ONNX of any size, in torch.export of the size with
    which it was traced.

    Raises:
        InputError: the model cannot be exported in this format; says which formats can take it.
    """
    try:
        with _quiet(), torch.no_grad():
            return _EXPORT[format](adapter, adapter.flattened_inputs)
    except Exception as error:  # exporters run the model's code on objects in place of tensors, so any error may come
        line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"--format {format} cannot take this model: {type(error).__name__}: {line}. Whole models can be exported "
            f"as torchscript and, without keypoints, onnx; --backbone exports the backbone alone, in each format"
        ) from error


@contextmanager
def _quiet():
    """Silence the hundreds of warnings about Python numbers in a trace, and the graph that a failed export prints."""
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
    options, content = {"dynamo": False, "opset_version": _OPSET, "dynamic_axes": axes}, io.BytesIO()
    torch.onnx.register_custom_op_symbolic("aten::group_norm", _group_norm, _OPSET)
    try:
        torch.onnx.export(adapter, inputs, content, input_names=["image"], output_names=names, **options)
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::group_norm", _OPSET)
    return _with_fixed_sizes(content.getvalue(), adapter(*inputs))


@symbolic_helper.parse_args("v", "i", "v", "v", "f", "b")
def _group_norm(g, x, num_groups, weight, bias, eps, cudnn_enabled):
    """A group norm in ONNX that takes a batch of nothing too, which a mask head gets where nothing is detected.

    PyTorch's has a Reshape to (N, G, -1), and ONNX cannot tell the size that -1 stands for where N is 0.
    """

    def constant(value):
        return g.op("Constant", value_t=torch.as_tensor(value))

    rank, shape = symbolic_helper._get_tensor_rank(x), g.op("Shape", x)
    images = g.op("Slice", shape, constant([0]), constant([1]))
    of_image = g.op("ReduceProd", g.op("Slice", shape, constant([1]), constant([rank])), keepdims_i=1)
    sizes = images, constant([num_groups]), g.op("Div", of_image, constant([num_groups]))
    grouped = g.op("Reshape", x, g.op("Concat", *sizes, axis_i=0))
    ones, zeros = constant(torch.ones(num_groups)), constant(torch.zeros(num_groups))
    y = g.op("Reshape", g.op("InstanceNormalization", grouped, ones, zeros, epsilon_f=eps), shape)
    axes = constant(torch.arange(1, rank - 1))
    for op, parameter in (("Mul", weight), ("Add", bias)):
        if not symbolic_helper._is_none(parameter):
            y = g.op(op, y, g.op("Unsqueeze", parameter, axes))
    return y


def _with_fixed_sizes(content, outputs):
    """An ONNX model in which those sizes of ``outputs`` are fixed that do not depend on the input. PyTorch's exporter
    takes them for dynamic ones without a name."""
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
sys.modules.update(gng_d2=None, detectron2=None)  # to import them is an error, as if they were not installed
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
    """Load and run the ``content`` of an exported file in a process that can import neither gng_d2 nor Detectron2, and
    return its outputs for each example.

    Raises:
        InputError: the file cannot be loaded or run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, inputs, outputs = (os.path.join(folder, name) for name in ("model.pt2", "inputs", "outputs"))
        with open(path, "wb") as file:
            file.write(content)
        torch.save([example.cpu() for example in examples], inputs)
        device = "cpu" if format == "onnx" else str(examples[0].device)
        command = [sys.executable, "-W", "ignore", "-c", _LOAD_AND_RUN, format, device, path, inputs, outputs]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise InputError(f"the exported file does not run without gng_d2 and Detectron2: {' '.join(last)}")
        return torch.load(outputs)


def largest_difference(adapter: TracingAdapter, examples: Sequence[Tensor], results: Sequence[list[Tensor]]) -> float:
    """The largest difference between the ``results`` of an exported file and the outputs of the model, as a part of the
    largest value of each output. The order of detections does not matter.

    Raises:
        InputError: they differ by more than TOLERANCE, or in shape.
    """
    names, largest = output_names(adapter), 0.0
    for example, result in zip(examples, results):
        expected, found = dict(zip(names, (x.cpu() for x in adapter(example)))), dict(zip(names, result))
        where = f"The exported file differs from the model on an image of {tuple(example.shape)}"
        for name in names:
            if found[name].shape != expected[name].shape:
                shapes = f"{tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
                raise InputError(f"{where}: {name} is {shapes}. Nothing is written")
        found = _in_the_order_of(expected, found)
        for name in names:
            ours, theirs = expected[name].double(), found[name].double()
            difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-6)) if ours.numel() else 0.0
            if not difference <= TOLERANCE:  # this is true for NaN too
                raise InputError(f"{where}: {name} by {difference:.1e} of its largest value. Nothing is written")
            largest = max(largest, difference)
    return largest


def _in_the_order_of(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """``found`` with its detections in the order of ``expected``, because detections with nearly the same score may
    change places."""
    if "pred_boxes" not in expected or not len(expected["pred_boxes"]):
        return found
    distance = torch.cdist(expected["pred_boxes"], found["pred_boxes"], p=float("inf"))
    distance += 1e6 * (expected["pred_classes"][:, None] != found["pred_classes"])
    order = distance.argmin(dim=1)
    return {name: x if name == "sem_seg" else x[order] for name, x in found.items()}
