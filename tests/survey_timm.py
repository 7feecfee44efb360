#!/usr/bin/env python3
"""Convert a small model of every family of timm and compare each group with the layer that fed its norm.

    python tests/survey_timm.py --json docs/convert_timm.json

A family is a file of timm's models. Which layer fed a norm is found here without gng_d2: by values. The input
of a norm holds the same numbers, in any order, as the output of the layer that made it.
"""

import argparse
import contextlib
import logging
import math
from collections import defaultdict

import timm
import torch
from torch import nn

import gng_d2
from gng_d2.job.files import write_json


def fingerprint(tensor):
    """The tensor's values without their order."""
    return hash(tensor.detach().double().flatten().sort().values.numpy().tobytes())


def fed_by(model, *inputs):
    """{norm's name: (its input's shape, (n_in, n_out) of the layer that made that or None)}, of those that ran."""
    made, found, handles = {}, {}, []

    def after_layer(layer, args, output):
        made[fingerprint(output)] = tuple(getattr(layer, a, None) or getattr(layer, b) for a, b in SIZES)

    for name, module in model.named_modules():
        if is_norm(module):

            def before_norm(norm, args, name=name):
                found.setdefault(name, (tuple(args[0].shape), made.get(fingerprint(args[0]))))

            handles.append(module.register_forward_pre_hook(before_norm))
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            handles.append(module.register_forward_hook(after_layer))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def is_norm(module):
    """Whether it is of a kind that convert_norms replaces."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    return isinstance(module, kinds) or type(module).__name__.startswith("FrozenBatchNorm")


def check(fed, model):
    """Compare the groups of ``model``, converted to PGN, with what fed its norms.

    Returns the names of those with the groups of their layer, or their own width, with fewer, left, and wrong.
    """
    converted, alone, fewer, left, wrong = [], [], [], [], []
    modules = dict(model.named_modules())
    for name, (shape, sizes) in fed.items():
        norm = modules[name]
        width = shape[1]
        groups = brute_force_groups(*(sizes or (width, width)))
        pixels = math.prod(shape[2:])
        one_number = len(shape) == 2 or (groups == width and pixels == 1)
        if isinstance(norm, gng_d2.GroupNorm) and not isinstance(norm, gng_d2.PracticalGroupNorm):
            enough = [d for d in range(1, groups) if width % d == 0 and width // d * pixels >= 16] or [1]
            right = width // groups * pixels < 16 and norm.num_groups == max(enough) < groups
            (fewer if right else wrong).append(name)
        elif not isinstance(norm, gng_d2.PracticalGroupNorm):
            (left if one_number else wrong).append(name)
        elif one_number or (norm.num_groups, norm.num_channels) != (groups, width):
            wrong.append(name)
        else:
            (converted if sizes else alone).append(name)
    return converted, alone, fewer, left, wrong


SIZES = (("in_channels", "in_features"), ("out_channels", "out_features"))


def randomize(model):
    """Give parameters that are all alike, such as a zero-initialized norm's, values that show in what they make."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
            nn.init.uniform_(tensor.data, 0.5, 1.5)


def brute_force_groups(n_in, n_out):
    ideal = min(max((n_in - n_out) / 4, 1), n_out)
    divisors = [d for d in range(1, n_out + 1) if n_out % d == 0]
    return min(divisors, key=lambda d: abs(math.log2(d) - math.log2(ideal)))


# what the names of small models hold, the smallest first
SMALL = "atto femto pico nano xxs tiny xs micro mini small 18 _t _s".split()


def small_models():
    """A small model of each family, one with norms that are replaced if one of the family's first five has any."""
    families = defaultdict(list)
    for name in timm.list_models(exclude_filters="test_*"):
        families[timm.model_entrypoint(name).__module__].append(name)
    for names in families.values():
        names.sort(key=lambda name: (next((i for i, part in enumerate(SMALL) if part in name), 99), len(name), name))
        yield next(filter(has_norms, names[:5]), names[0])


def has_norms(name):
    with torch.device("meta"), contextlib.suppress(Exception):
        return any(is_norm(module) for module in timm.create_model(name).modules())


def survey(name):
    """What became of the norms of the timm model ``name``, as a row."""
    row = {
        "model": name,
        "input": None,
        "norms": 0,
        "converted": 0,
        "own_width": 0,
        "fewer": 0,
        "left": 0,
        "not_run": 0,
        "wrong": [],
    }
    if not has_norms(name):
        return row
    torch.manual_seed(0)
    model = timm.create_model(name)
    norms = [n for n, module in model.named_modules() if is_norm(module)]
    randomize(model)
    images, fed = run_small(model)
    gng_d2.convert_norms(model, "PGN", images)
    converted, alone, fewer, left, wrong = check(fed, model)
    if not model.train()(images).isfinite().all():
        wrong.append("output")
    row |= {"input": list(images.shape[1:]), "norms": len(norms), "not_run": len(norms) - len(fed), "wrong": wrong}
    return row | {"converted": len(converted), "own_width": len(alone), "fewer": len(fewer), "left": len(left)}


def run_small(model):
    """The smallest images that the model takes, and what :func:`fed_by` says of them."""
    channels, *size = model.pretrained_cfg["input_size"]
    for size in ((64, 64), (96, 96), (128, 128), size):
        images = torch.rand(2, channels, *size)
        with contextlib.suppress(Exception):
            return images, fed_by(model, images)
    raise ValueError("runs at no size")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("models", nargs="*", help="timm models; default: one of each family")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    for name in args.models or small_models():
        try:
            rows.append(survey(name))
        except Exception as error:  # of any kind: it is timm's code
            rows.append({"model": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
        print(rows[-1], flush=True)
    done = [row for row in rows if "error" not in row]
    total = {
        key: sum(row[key] for row in done) for key in ("norms", "converted", "own_width", "fewer", "left", "not_run")
    }
    versions = f"timm {timm.__version__}, PyTorch {torch.__version__}"
    total["wrong"] = sum(len(row["wrong"]) for row in done)
    rows.insert(0, {"models": len(done), "of": len(rows), **total, "versions": versions})
    print(rows[0])
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
