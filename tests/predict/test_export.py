"""Exported files are run without gng_d2 and compared with the model, which is neither exported nor folded."""

import io
import re
import sys

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from needs import EXPORT, KERNELS, needs_torch
from PIL import Image
from torch import nn

import export as tool
import gng_d2.predict.export
from command_line import run_tool
from gng_d2.errors import InputError
from gng_d2.job.checkpoint import Checkpointer
from gng_d2.job.config import load_config

TINY = (
    "MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.CONV_DIM 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 "
    "MODEL.ROI_MASK_HEAD.CONV_DIM 32 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96 MODEL.RPN.PRE_NMS_TOPK_TEST 50 "
    "MODEL.RPN.POST_NMS_TOPK_TEST 20 TEST.DETECTIONS_PER_IMAGE 10 MODEL.RESNETS.NORM PGN MODEL.FPN.NORM PGN"
).split()
DETECTOR, PANOPTIC = "configs/quick/faster_rcnn_pgn_ws.yaml", "configs/quick/pfpn_pgn.yaml"
WS = ["MODEL.RESNETS.NORM", "PGN+WS", "MODEL.FPN.NORM", "PGN+WS"]
SEMANTIC = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN"]
SEMANTIC += ["MODEL.FPN.OUT_CHANNELS", "64"]


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """Runs the tool with drawn weights and returns its exit status, its output, the file, and the unfolded model."""

    def export(config, format, flags=(), opts=()):
        cfg = load_config(config, [*TINY, *opts, "MODEL.DEVICE", "cpu"])
        model = build_model(cfg).eval()
        Checkpointer(model, str(tmp_path)).save("weights")
        path = tmp_path / "exported"
        words = ["--config-file", config, "--weights", str(tmp_path / "weights.pth"), "--format", format]
        words += ["--output", str(path), *flags, *TINY, *opts]
        monkeypatch.setattr(sys, "argv", ["export.py", *words])
        try:
            run_tool(tool.main)
            status = None
        except SystemExit as error:
            status = str(error)
        return status, capsys.readouterr().out, path, model

    return export


def run_file(path, format, image):
    """The outputs of the file by name or number, as the runtime of its format gives them."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        sizes = [size for value in (*session.get_inputs(), *session.get_outputs()) for size in value.shape]
        words = {word for size in sizes if isinstance(size, str) for word in re.findall(r"[a-zA-Z_]\w*", size)}
        assert {"height", "width"} <= words <= {"batch", "height", "width", "detections"}
        values = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        return {output.name: torch.as_tensor(x) for output, x in zip(session.get_outputs(), values)}
    if format == "torchscript":
        model = torch.jit.load(path)
        assert "gng_d2::" not in str(model.inlined_graph)  # an op; names of classes are no more than names
    else:
        program = torch.export.load(path)
        assert not [node for node in program.graph.nodes if str(node.target).startswith("gng_d2")]
        model = program.module()
    with torch.enable_grad():
        outputs = model(image)
    assert not any(output.requires_grad for output in outputs)
    return dict(enumerate(outputs))


def assert_equal(found, expected):
    """Check that the outputs are equal and in the order of their names."""
    assert list(found) in (sorted(expected), list(range(len(expected))))
    for ours, name in zip(found.values(), sorted(expected)):
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(ours, expected[name], atol=1e-3 * scale, rtol=0, check_dtype=False)


NEWER = [pytest.param(f, marks=() if f == "torchscript" else EXPORT) for f in gng_d2.predict.export._EXPORT]


@pytest.mark.slow
@pytest.mark.parametrize("format", NEWER)
def test_a_backbone_takes_any_number_of_images_of_any_size(format, export):
    status, out, path, model = export(DETECTOR, format, ["--backbone"], WS)
    assert status is None and f"wrote {path}" in out and "multiples of 32" in out
    images = torch.randn(3, 3, 256, 320)
    with torch.no_grad():
        assert_equal(run_file(path, format, images), model.backbone(images))


@pytest.mark.slow
@pytest.mark.parametrize("format", NEWER[:2])
@pytest.mark.parametrize("config", [DETECTOR, PANOPTIC])
def test_a_whole_model_takes_an_image_of_any_size(config, format, export):
    status, out, path, model = export(config, format)
    assert status is None and "pred_boxes" in out
    image = torch.rand(3, 70, 90) * 255
    with torch.no_grad():
        outputs = model.inference([{"image": image}], do_postprocess=False)
    instances = (outputs[0] if config == PANOPTIC else outputs)[0]
    expected = {"pred_boxes": instances.pred_boxes.tensor, "pred_classes": instances.pred_classes}
    expected["scores"] = instances.scores
    if config == PANOPTIC:
        expected |= {"pred_masks": instances.pred_masks, "sem_seg": outputs[1][0][:, :70, :90]}
    assert len(instances) == 10
    assert_equal(run_file(path, format, image), expected)


class Head(nn.Module):
    """Stands in for a traced model whose mask head has norms: it detects the positive numbers of an image."""

    class outputs_schema:
        keys = ["pred_masks"]

    def __init__(self, norm):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3), norm)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, image):
        detections = image[image > 0][:, None, None, None]
        return (self.layers(detections * image[:1]),)


@EXPORT
@pytest.mark.parametrize(
    "make_norm",
    [
        lambda: nn.GroupNorm(2, 6, eps=1e-3),
        lambda: nn.GroupNorm(2, 6, eps=1e-3, affine=False),
        lambda: gng_d2.LearnedGroupNorm(6),
    ],
)
def test_norms_of_a_mask_head_take_any_number_of_detections(make_norm, tmp_path):
    """None too, at which PyTorch's own ONNX of a group norm stops."""
    head, path = Head(make_norm()).eval(), tmp_path / "head.onnx"
    path.write_bytes(gng_d2.predict.export._onnx(head, (torch.randn(1, 9, 8),)))
    for image in (torch.randn(1, 7, 11), -torch.rand(1, 7, 11)):
        with torch.no_grad():
            (expected,) = head(image)
        (found,) = run_file(path, "onnx", image).values()
        assert len(expected) == int((image > 0).sum())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@needs_torch(2, 14, "torch.export of a semantic model")
def test_torch_export_takes_a_semantic_model(export):
    status, _, path, model = export(PANOPTIC, "torch_export", opts=SEMANTIC)
    assert status is None
    image = torch.rand(3, 64, 64) * 255
    with torch.no_grad():
        assert_equal(run_file(path, "torch_export", image), model([{"image": image}])[0])


@pytest.mark.slow
@EXPORT
def test_what_cannot_be_exported_says_what_can(export):
    status, _, path, _ = export(DETECTOR, "torch_export")
    assert status.startswith("error: --format torch_export cannot take this model")
    assert "torchscript and, without keypoints, onnx; --backbone" in status and len(status) < 600 and not path.exists()


@pytest.mark.slow
def test_a_file_that_differs_is_not_written(export, monkeypatch):
    def differently(content, format, examples):
        model = torch.jit.load(io.BytesIO(content))
        return [[x * 1.01 for x in model(example)] for example in examples]

    monkeypatch.setattr(gng_d2.predict.export, "load_and_run", differently)
    status, _, path, _ = export(PANOPTIC, "torchscript", opts=SEMANTIC)
    assert "The exported file differs from the model" in status and "sem_seg by 1.0e-02" in status
    assert not path.exists()


@pytest.mark.slow
@KERNELS
def test_a_file_that_needs_gng_d2_does_not_pass():
    class Plain(nn.Module):
        def forward(self, x):
            return (torch.nn.functional.group_norm(x, 2),)

    class Ours(nn.Module):
        def forward(self, x):
            return (torch.ops.gng_d2.group_norm_statistics(x, num_groups=2, eps=1e-5)[0],)

    x = torch.randn(1, 4, 5, 5)
    for module, passes in ((Plain(), True), (Ours(), False)):
        content = torch.jit.trace(module, x).save_to_buffer()
        if passes:
            ((result,),) = gng_d2.predict.export.load_and_run(content, "torchscript", [x])
            torch.testing.assert_close(result, module(x)[0])
        else:
            with pytest.raises(InputError, match="does not run without gng_d2"):
                gng_d2.predict.export.load_and_run(content, "torchscript", [x])


class Detections:
    """A stand-in for a traced detector."""

    class outputs_schema:
        keys = ["pred_boxes", "pred_classes", "scores"]

    def __call__(self, image):
        boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20], [0, 0, 10, 10]])
        return boxes, torch.tensor([1, 1, 2]), torch.tensor([0.9, 0.9, 0.8])


@pytest.mark.parametrize(
    "order, score, message",
    [
        ([0, 1, 2], 0.9, None),
        ([1, 2, 0], 0.9, None),
        ([0, 1, 2], 0.91, "scores by 1.1e-02"),
        ([0, 1, 2], float("nan"), "scores by nan"),
        ([0, 1], 0.9, "pred_boxes is \\(2, 4\\), not \\(3, 4\\)"),
        ([0, 1, 1], 0.9, "pred_classes by"),
    ],
)
def test_detections_may_change_places_and_nothing_else(order, score, message):
    boxes, classes, scores = Detections()(None)
    scores[0] = score
    result = [boxes[order], classes[order], scores[order]]
    if message is None:
        assert gng_d2.predict.export.largest_difference(Detections(), [torch.zeros(3, 4, 4)], [result]) == 0
    else:
        with pytest.raises(InputError, match=message):
            gng_d2.predict.export.largest_difference(Detections(), [torch.zeros(3, 4, 4)], [result])


def test_bad_input_is_one_line(export, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("no image")
    status, _, path, _ = export(PANOPTIC, "torchscript", ["--image", str(tmp_path / "notes.txt")])
    assert (
        status.startswith(f"error: --image: {tmp_path / 'notes.txt'} cannot be read as an image") and not path.exists()
    )
    monkeypatch.setattr(gng_d2.predict.export, "find_spec", lambda name: None)
    assert export(PANOPTIC, "onnx")[0].endswith("pip install onnx onnxruntime onnxscript")


def test_an_image_of_ones_own_is_the_example(tmp_path):
    Image.fromarray(np.random.randint(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    first, second = tool.example_images("BGR", str(tmp_path / "a.png"), one_size=False)
    assert (first[:, :, ::-1] == np.asarray(Image.open(tmp_path / "a.png"))).all() and second.shape == (30, 60, 3)
    assert len({image.shape for image in tool.example_images("BGR", None, one_size=True)}) == 1


def test_the_smallest_image_gives_two(tmp_path):
    path = tmp_path / "one.png"
    Image.new("RGB", (1, 1)).save(path)
    assert [image.shape for image in tool.example_images("BGR", str(path), one_size=False)] == [(1, 1, 3), (1, 1, 3)]
