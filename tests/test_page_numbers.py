"""The numbers in README and docs are the measured ones, and the sentences around them say what they show."""

import json
import re
from math import log2
from pathlib import Path
from statistics import geometric_mean, mean

from gng_d2.job.build import build_on_meta
from gng_d2.job.config import load_config
from gng_d2.models.norm_table import norm_table
from study.goals import fused_goals, learned_goals
from study.intervals import half_interval, mean_with_interval
from study.norm_cost import NormCostRow
from study.report import ComparisonRow, difference_interval
from study.retention import IMAGES, RetentionRow
from study.rows import read_rows

README, RESULTS, CHOOSING = "README.md", "docs/results.md", "docs/choosing-g.md"
SPEED, FROM_BATCH_NORM = "docs/speed-and-memory.md", "docs/from-batch-norm.md"
METRICS = {"camvid": "mIoU", "bccd": "AP"}


def prose(path):
    """The text of a page without its line breaks."""
    return " ".join(Path(path).read_text().split())


def measured(name):
    return json.loads(Path(f"docs/results/{name}.json").read_text())


def rows_of(name, metric=None):
    """Those of a comparison by norm, of the metric that is usual for its images."""
    metric = metric or METRICS[name.split("_")[0]]
    found = [row for row in measured(name) if row["metric"] == metric]
    rows = {row["norm"]: row for row in found}
    assert len(rows) == len(found)
    return rows


def values_of(name):
    """By norm, those of each seed."""
    return {norm: row["values"] for norm, row in rows_of(name).items()}


def right(norm, affine, images=IMAGES, head="old_head", results="retention_caltech101"):
    """Percents of classifiers that kept or calibrated their affines, with each seed."""
    rows = read_rows(f"docs/results/{results}.json", RetentionRow)
    of_norm = [row for row in rows if (row.norm, row.affine) == (norm, affine)]
    return [getattr(row, head) for row in of_norm if row.images in (0, images)]  # 0: nothing was calibrated


def difference(ours, theirs, unit=""):
    """Of two lists by seed, as the pages write it: "0.7 (-4.8 to +6.2)", "0.7 mIoU (-4.8 to +6.2)"."""
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    middle, half = mean(values), half_interval(values)
    return f"{' '.join([f'{middle:.1f}', *unit.split()])} ({middle - half:+.1f} to {middle + half:+.1f})"


def unsigned(difference):
    return difference.replace("+", "")


def is_noise(difference):
    return "(-" in difference and "to +" in difference


def is_ahead(difference):
    """Beyond seed noise."""
    return "(+" in difference and "(+0.0" not in difference


# what was measured with each number of groups


def test_numbers_of_choosing_g():
    page = prose(CHOOSING)
    camvid, bccd = (
        {norm: row["difference"] for norm, row in rows_of(name).items()}
        for name in ("camvid_semantic_fpn", "bccd_faster_rcnn")
    )
    assert f"instance norm (`GN/1`) is {camvid['GN/1']:.1f} mIoU ahead of `GN`" in page
    behind = f"PGN is {-camvid['PGN']:.1f} behind, `GN/16` {-camvid['GN/16']:.1f} and G = 1 {-camvid['GN1']:.1f}"
    assert behind in page
    assert f"`GN/1` is {-bccd['GN/1']:.1f} AP behind `GN`" in page
    assert f"and {-rows_of('bccd_faster_rcnn', 'AP75')['GN/1']['difference']:.1f} in AP75" in page
    ahead = f"PGN is {-bccd['PGN']:.1f} AP behind, `GN/16` {bccd['GN/16']:.1f} ahead and G = 1 {bccd['GN1']:.1f}"
    assert ahead in page
    beds = [{norm: difference or 0 for norm, difference in bed.items()} for bed in (camvid, bccd)]  # GN's own is None
    assert f"`GN` was at most {max(max(bed.values()) for bed in beds):.1f} points behind the best" in page
    assert all(min(bed, key=bed.get) not in ("GN", "GN/16") for bed in beds), "neither was the worst"
    assert max(camvid["PGN"], bccd["PGN"]) < 0, "nothing measured here on real images has PGN ahead"


def test_numbers_of_the_readme():
    readme = prose(README)
    assert len(Path(README).read_text().splitlines()) <= 100
    demo = json.loads(Path("docs/demo.json").read_text())
    for when in ("before", "after"):
        assert " | ".join(f"{demo[when][key]:.1f}" for key in ("PQ", "PQ_th", "PQ_st")) in readme
    beds = [
        {row.norm: row for row in read_rows(f"docs/results/{name}.json", ComparisonRow) if row.metric == metric}
        for name, metric in (("camvid_semantic_fpn", "mIoU"), ("bccd_faster_rcnn", "AP"))
    ]
    for norm in ("GN/1", "GN/16", "PGN", "GN1"):
        cells = ["{:+.1f} ({:+.1f} to {:+.1f})".format(b[norm].difference, *difference_interval(b[norm])) for b in beds]
        assert f"| `{norm}` | {' | '.join(cells)} |" in readme
    assert max(bed["PGN"].difference for bed in beds) < 0, "PGN is ahead of GN on neither"
    learned = [values_of(name)["LGN"] for name in ("camvid_mixtures", "bccd_plain")]
    cells = [f"+{difference(of[: len(bed['GN'].values)], bed['GN'].values)}" for of, bed in zip(learned, beds)]
    assert f"| `LGN` | {' | '.join(cells)}, itself without `+WS` |" in readme


def test_weight_standardization_does_not_decide():
    plain, ws = values_of("camvid_semantic_fpn"), values_of("camvid_ws")
    without, with_ws = (
        [few - many for few, many in zip(of[f"GN1{name}"][:3], of[f"GN/1{name}"][:3], strict=True)]
        for of, name in ((plain, ""), (ws, "+WS"))
    )
    change, interval = difference(with_ws, without).split(" ", 1)
    assert f"weight standardization changes D by {change} points" in prose(RESULTS)
    assert interval in prose(RESULTS)
    still = difference(ws["GN/1+WS"][:3], ws["GN1+WS"][:3], "mIoU")
    assert f"GN1 is still behind GN/1, by {unsigned(still)}." in prose(RESULTS)
    assert f"by {unsigned(still)[:-1]}, three seeds)" in prose(CHOOSING) and is_ahead(still)


def test_one_group_in_a_whole_detector_needs_weight_standardization():
    with_ws, without = values_of("bccd_faster_rcnn"), values_of("bccd_plain")
    results, choosing, readme = map(prose, (RESULTS, CHOOSING, README))
    lost = difference(with_ws["GN1"], without["GN1"], "AP")
    assert f"GN1, which loses {lost} when" in results and is_ahead(lost)
    many, neither = (difference(with_ws[norm], without[norm][:3]) for norm in ("GN/1", "GN"))
    assert f"not seen to lose any: {many}, and neither is GN (first three seeds): {neither}." in results
    assert is_noise(many) and is_noise(neither)
    left = difference(without["GN1"], without["GN/1"])
    assert f"the mean of D is {left.split()[0]}, which is within seed noise" in results and is_noise(left)
    advantage = [[a - b for a, b in zip(of["GN1"], of["GN/1"], strict=True)] for of in (with_ws, without)]
    assert all(a > b for a, b in zip(*advantage, strict=True)), "the direction of the hypothesis with each seed"
    less = unsigned(difference(with_ws["GN1"], without["GN1"], "AP less"))
    assert f"{less[:-1]}, three seeds)" in choosing
    assert f"without it `GN1` has {less}, and" in readme


def test_mean_and_variance_over_different_groups():
    values = values_of("camvid_semantic_fpn") | values_of("camvid_mixtures")
    results, choosing = map(prose, (RESULTS, CHOOSING))
    best = max(("GN", "GN1", "GN/16", "GN/1", "PGN"), key=lambda norm: mean(values[norm]))
    assert best == "GN/1", "the best fixed number of groups here"

    def ahead(norm, of="GN/1", seeds=5):
        """With the seeds that both have, which are the first ones."""
        seeds = min(seeds, len(values[norm]), len(values[of]))
        return difference(values[norm][:seeds], values[of][:seeds], "mIoU")

    last = ahead("MIX-fixed-last")
    assert f"number of groups here, by {last}, and of GN by {ahead('MIX-fixed-last', 'GN')}. It" in results
    assert f"of instance norm by {last[:-1]}, five seeds)" in choosing and is_ahead(last)
    shared, to_last = ahead("MIX-shared"), ahead("MIX-shared", "MIX-fixed-last")
    assert f"ahead of instance norm by {shared}, and of `MIX-fixed-last` by {to_last}." in results and is_ahead(shared)
    fixed, of_three, learned = ahead("MIX-fixed"), ahead("MIX-fixed", seeds=3), ahead("LGN")
    assert f"`MIX-fixed` is ahead of instance norm by {fixed}, which is within seed noise." in results
    assert f"With the first three seeds alone it was {of_three}, and two" in results and is_ahead(of_three)
    assert f"`LGN` is ahead by {learned}, within seed noise" in results
    assert round(mean(values["LGN"][:3]) - mean(values_of("camvid_ws")["GN/1+WS"]), 1) == 0, "a difference of 0.0"
    assert max(map(mean, values_of("camvid_ws").values())) == mean(values_of("camvid_ws")["GN/1+WS"])
    to_gn, to_best = (mean(values["LGN"]) - mean(values[norm]) for norm in ("GN", "GN/1"))
    assert f"is {to_gn:.1f} mIoU ahead of `GN` on CamVid and {to_best:.1f} ahead of instance norm, both" in choosing
    assert f"instance norm by {fixed}, within" in choosing
    assert all(map(is_noise, (fixed, learned, to_last)))
    assert mean(values["MIX-uniform"]) < mean(values["GN/1"][:4])
    learned = {}
    for row in measured("camvid_learned"):
        if row["run"] == "LGN" and row["under_test"]:
            learned.setdefault(row["name"], []).append(row["mixtures"])
    for name, seeds in learned.items():
        in_mean, in_variance = (
            2 ** mean(sum(weights[place] * log2(weights[0]) for weights in mixtures) for mixtures in seeds)
            for place in (1, 2)
        )
        last = name in {f"sem_seg_head.{of}.norm" for of in ("p2.0", "p3.0", "p4.2", "p5.4")}
        assert (in_mean < 1.5 if last else in_mean > 11.5) and 4.5 < in_variance < 13.5


def test_the_mean_over_single_channels_on_bccd():
    fixed, (mixed,) = values_of("bccd_faster_rcnn"), values_of("bccd_mixtures").values()
    results, choosing = map(prose, (RESULTS, CHOOSING))
    assert max(fixed, key=lambda norm: mean(fixed[norm])) == "GN1"
    to_gn = difference(mixed, fixed["GN"])
    assert f"with a difference of {to_gn}" in results
    assert f"a difference of {to_gn.replace('(', '').replace(' -', ', -')}" in choosing
    assert f"the best fixed number of groups here, by {difference(fixed['GN1'], mixed)}." in results
    assert f"has {difference(mixed, fixed['GN/1'], 'AP less')}." in results


def test_the_norm_that_learns_its_groups_on_bccd():
    with_ws, plain, mixed = values_of("bccd_faster_rcnn"), values_of("bccd_plain"), values_of("bccd_mixtures")
    results, choosing, readme = map(prose, (RESULTS, CHOOSING, README))
    learned, gn = plain["LGN"], plain["GN"]
    assert len(learned) == len(gn) == 5 and all(len(values) == 3 for values in with_ws.values())
    others = [*with_ws.values(), *mixed.values(), *(values for norm, values in plain.items() if norm != "LGN")]
    assert mean(learned) > max(map(mean, others)), "the highest"
    assert all(is_ahead(difference(learned[: len(values)], values)) for values in others if len(values) > 2)
    to_best, to_gn = (difference(learned[:3], with_ws[norm], "AP") for norm in ("GN1", "GN"))
    assert f"standardization by {to_best}, and of GN with it by {to_gn}, three seeds each." in results
    to_plain, of_three = difference(learned, gn, "AP"), difference(learned[:3], gn[:3], "AP")
    assert f"GN without weight standardization by {to_plain}, with each of five seeds." in results
    assert all(ours > theirs for ours, theirs in zip(learned, gn, strict=True))
    assert f"With three seeds the difference to GN without it was {of_three}." in results and is_noise(of_three)
    assert f"standardization by {to_plain[:-1]}, five seeds), and by {to_best[:-1]}, three seeds) of G" in choosing
    assert f"is ahead of `GN` by {unsigned(to_plain)}, five seeds." in readme
    behind = difference(gn[:3], plain["MIX-shared"], "AP")
    assert f"](#bccd-without-weight-standardization) by {behind}, and the interval" in results and is_noise(behind)


def test_three_times_as_long():
    long, short = values_of("camvid_long"), values_of("camvid_semantic_fpn")
    at_first, at_last = (
        [instance - group for instance, group in zip(values["GN/1"][:3], values["GN"][:3])] for values in (short, long)
    )
    advantage, before = difference(long["GN/1"], long["GN"]), f"where it was {mean(at_first):.1f}"
    changed, larger = difference(at_last, at_first), sum(b > a for a, b in zip(at_first, at_last))
    results, choosing = map(prose, (RESULTS, CHOOSING))
    assert f"Instance norm's advantage is {advantage} mIoU, {before} after 1,200 steps" in results
    assert f"Seed by seed it changed by {changed}: it became smaller with one seed and larger with two" in results
    assert larger == 2 and is_noise(changed) and is_noise(advantage)
    shown = advantage.replace("(", "mIoU](results.md#camvid-three-times-as-long) (")
    assert f"[{shown[:-1]}, three seeds), {before}. " in choosing
    assert all(round(mean(long[norm]) - mean(short[norm][:3])) == 6 for norm in ("GN", "GN/1"))


# what norms cost


def test_numbers_of_what_group_norm_costs():
    readme, page = map(prose, (README, SPEED))
    ratios = {
        name: geometric_mean(
            row["ratio_to_native_gn32"]
            for row in measured("benchmark_norm_cpu")
            if (row["direction"], row["implementation"]) == ("forward", name)
        )
        for name in ("ours", "native")
    }
    assert f"Forward, PGN's norms take {ratios['ours']:.2f} times as long as `GN`'s do in PyTorch." in readme
    ours = f"the forward pass of PGN's norms takes {ratios['ours']:.2f} times as long as that of GN's in PyTorch, and "
    assert f"{ours}with PyTorch's op {ratios['native']:.2f} times." in page
    learned = read_rows("docs/results/learned_norm_cpu.json", NormCostRow)
    alone, both = learned_goals(learned)
    assert f"take {both.reached[:4]} times as long as those of `GN` in PyTorch, forward and backward," in page
    assert f"With the backward pass `LGN`'s take {both.reached[:4]} times." in readme
    assert f"as when you only predict, it is {alone.reached[:4]} times." in page
    (most,) = re.findall(r"([\d.]+) at most \(512x256x7x7,", both.reached)
    assert f"The most is {most} times, on the 7 x 7 maps" in page
    rows = {
        row["recomputed"]: row
        for row in measured("memory_cpu")
        if (row["model"], row["norm"]) == ("faster_rcnn", "PGN+WS") and not row.get("fused")
    }
    kept, again = (f"{rows[recomputed]['peak_ratio']:.2f} times" for recomputed in (False, True))
    high, wide = rows[True]["size"]
    assert f"of Faster R-CNN, one image of {high} x {wide} on a CPU, is {kept} FrozenBN's with `PGN+WS`" in readme
    same = "with the same gradients, bit by bit."
    assert f"everywhere, and {again} after `gng_d2.recompute_norms(model)`, {same}" in readme
    peaks = f"one image of {high} x {wide}, peaks at {kept} FrozenBN's memory, and with `--recompute-norms` at {again}."
    assert f"under PGN+WS, {peaks}" in page


def test_the_time_of_recomputation_is_within_noise():
    readme, page = map(prose, (README, SPEED))
    rows = measured("benchmark_train_cpu")
    ratio = {(row["model"], row["fused"]): row["ratio_to_kept"] for row in rows if row["recomputed"]}
    assert len(ratio) == 4
    ((high, wide),) = {tuple(row["size"]) for row in rows}
    took = f"took {min(ratio.values()):.2f} to {max(ratio.values()):.2f} times as long"
    assert f"Steps at {high} x {wide} then {took}, which is as far as two runs of one program differed." in readme
    models = "of Faster R-CNN and Panoptic FPN, with and without `--fuse-norms`"
    assert f"a step at {high} x {wide}, {models}, {took}" in page
    gn = {}  # PyTorch's op, with our kernels on and off
    for row in rows:
        if row["norm"] == "GN":
            gn.setdefault(row["model"], []).append(row["step_milliseconds"])
    assert {len(times) for times in gn.values()} == {2}
    noise = f"{max(max(times) / min(times) for times in gn.values()):.2f}"
    assert f"which it does not use) differed by a factor of up to {noise}." in page
    assert noise == f"{max(ratio.values()):.2f}"
    both, alone = ([ratio[model, fused] for model in ("faster_rcnn", "pfpn")] for fused in (True, False))
    said = f"took {both[0]:.2f} times as long (Faster R-CNN) and {both[1]:.2f} times (Panoptic FPN) beside"
    assert f"{said} `--fuse-norms`, and {alone[0]:.2f} and {alone[1]:.2f} times without it." in page
    assert min(both) > max(alone), "fused norms are not seen to cost less to compute again"


def test_numbers_of_fused_norms():
    rows = read_rows("docs/results/fused_norm_cpu.json", NormCostRow)
    means = [goal.reached.split()[0] for goal in fused_goals(rows) if "geometric mean" in (goal.reached or "")]
    to_parts, to_frozen, _, to_three, to_frozen_three, _ = means
    page = prose(SPEED)
    assert f"norm and ReLU take {to_parts} times as long as one after the other, and norm, addition and ReLU " in page
    assert f"ReLU {to_three} times. That is {to_frozen} and {to_frozen_three} times what Detectron2's FrozenBN" in page


# what becomes of pretrained weights


def test_pretrained_weights_in_the_readme():
    """Its table: a classifier before and detectors after fine-tuning, as loaded and calibrated."""
    readme = Path(README).read_text()

    def of_beds(norm, affine):
        return [values_of(f"{bed}_{affine}")[norm] for bed in METRICS]

    frozen = [right("BN", "trained"), *of_beds("FrozenBN", "pretrained")]
    assert f"| batch norm, frozen | {' | '.join(map(mean_with_interval, frozen))} |" in readme
    for norm in ("GN1", "GN/16", "PGN"):
        loaded = [right(norm, "kept"), *of_beds(norm, "pretrained")]
        calibrated = [right(norm, "calibrated"), *of_beds(norm, "calibrated")]
        cells = [f"{mean(a):.1f} → {mean_with_interval(b)}" for a, b in zip(loaded, calibrated, strict=True)]
        assert f"| `{norm}` | {' | '.join(cells)} |" in readme


def test_how_many_images_calibration_takes():
    def gained(norm, many, few):
        return difference(right(norm, "calibrated", many), right(norm, "calibrated", few))

    more = {norm: gained(norm, 256, IMAGES) for norm in ("GN1", "GN/16", "PGN")}
    assert all("(-" in interval for interval in more.values()), "not beyond seed noise"
    page = prose(FROM_BATCH_NORM)
    assert f"by {more['GN1']} points under GN1, {more['GN/16']} under GN/16, {more['PGN']} under PGN." in page
    norms = "GN1", "GN/64", "GN/32", "GN/16", "PGN", "GN/1"
    fewer = {(norm, images): gained(norm, IMAGES, images) for norm in norms for images in (16, 4)}
    lost = {key: text for key, text in fewer.items() if is_ahead(text)}
    assert list(lost) == [("GN/32", 4), ("GN/16", 4), ("PGN", 16), ("PGN", 4)]
    by_16, of_all = unsigned(lost["PGN", 16]), mean(right("PGN", "calibrated"))
    said = f"16 images cost PGN {by_16} of its {of_all:.1f} points, and the other norms nothing"
    assert f"{said} beyond seed noise." in page
    points = [lost[norm, 4].split()[0] for norm in ("GN/32", "GN/16", "PGN")]
    assert "4 images cost GN/32 {} points, GN/16 {} and PGN {}, and the others nothing".format(*points) in page


def test_what_weight_standardization_leaves_of_them():
    def right_with_ws(norm, affine, head):
        return right(norm, affine, head=head, results="retention_ws_caltech101")

    for norm in ("GN1+WS", "GN/16+WS"):
        assert max(right_with_ws(norm, "calibrated", "old_head")) < 2, "100 classes"
        calibrated = right_with_ws(norm, "calibrated", "new_head")
        for affine in ("fresh", "kept"):
            assert "(-" in difference(calibrated, right_with_ws(norm, affine, "new_head"))
    old, new = (mean(right_with_ws("GN1+WS", "calibrated", head)) for head in ("old_head", "new_head"))
    said = f"the old head had {old:.1f} % right, which is chance, and a new one {new:.1f} %,"
    assert f"Of MobileNetV2 under `GN1+WS` {said}" in prose(FROM_BATCH_NORM)


def test_what_fine_tuning_makes_of_them():
    """Each norm at the learning rate with its best mean."""
    found = {}
    for row in measured("finetune_caltech101"):
        if row["seed"] in (0, 1, 2):
            found.setdefault((row["norm"], row["affine"], row["lr"]), []).append(row["accuracy"])
    assert {len(accuracies) for accuracies in found.values()} == {3}
    best = {}
    for (norm, affine, _), accuracies in found.items():
        best[norm, affine] = max(best.get((norm, affine), 0), mean(accuracies))
    frozen, gn1, gn16 = best["FrozenBN", "trained"], best["GN1", "calibrated"], best["GN/16", "calibrated"]
    fresh = max(accuracy for (_, affine), accuracy in best.items() if affine == "fresh")
    page, readme = map(prose, (FROM_BATCH_NORM, README))
    assert (
        f"had {gn1:.1f} % right after calibration and two epochs of fine-tuning on Caltech-101 with `GN1`, and "
        f"{gn16:.1f} % with `GN/16`, at the best of three learning rates, where FrozenBN had {frozen:.1f} %." in page
    )
    assert f"With weight 1 and bias 0 no group norm had more than {fresh:.1f} %" in page
    assert f"batch norm with statistics over two images had {best['BN', 'trained']:.1f} %." in page
    assert f"after two epochs it has {frozen:.1f} %, `GN1` {gn1:.1f}, which is within seed noise (the 95 % " in readme
    (missed,) = re.findall(r"missed by ([\d.]+) points in the mean under GN1", prose(RESULTS))
    assert missed == f"{frozen - 0.5 - gn1:.1f}"


def test_detectors_from_pretrained_weights():
    ahead = []
    for bed, metric in METRICS.items():
        loaded, calibrated = values_of(f"{bed}_pretrained"), values_of(f"{bed}_calibrated")
        to_frozen = {norm: difference(values, loaded["FrozenBN"]) for norm, values in calibrated.items()}
        assert all(is_noise(to_frozen[norm]) for norm in ("GN1", "GN/16"))
        assert is_noise(difference(loaded["PGN"], loaded["FrozenBN"]))
        assert is_ahead(to_frozen["PGN"]) and max(calibrated, key=lambda norm: mean(calibrated[norm])) == "PGN"
        for norm, values in calibrated.items():
            assert is_ahead(difference(values, loaded[norm])), "calibration helps"
        number, interval = unsigned(to_frozen["PGN"]).split(" ", 1)
        ahead += f"{number} {metric}", interval
    camvid, its, bccd, theirs = ahead
    said = f"by {camvid} on CamVid {its.replace('(', '(95 % interval ')} and by {bccd} on BCCD {theirs}"
    assert said in prose(FROM_BATCH_NORM)
    assert f"ahead of FrozenBN by {camvid} {its} and by {bccd} {theirs};" in prose(README)


def test_the_rate_that_was_tried_later():
    bccd = {row["learning_rate"]: row["value"] for row in measured("mobilenet_recipe") if row["bed"].startswith("BCCD")}
    assert f"With the latter FrozenBN had {bccd[0.018] - bccd[0.01]:.1f} AP more" in prose(RESULTS)


# which groups norms have


def test_numbers_of_the_survey():
    summary, *rows = json.loads(Path("docs/convert_timm.json").read_text())
    rows = [row for row in rows if row.get("norms")]
    assert summary["wrong"] == 0 and summary["norms"] == sum(row["norms"] for row in rows)
    said = (
        f"{len(rows)} of {summary['of']} families have such norms, {summary['norms']} in all: {summary['converted']} "
        f"have the groups of their layer, {summary['own_width']} their own width, {summary['fewer']} fewer "
        f"groups behind a global pooling, {summary['left']} were left, 0 were wrong"
    )
    assert said in prose("docs/any-model.md")


def test_the_norm_table_of_the_readme():
    """Its rows are those that norm_table prints for the config that it names."""
    norms = [row for row in norm_table(build_on_meta(load_config("configs/faster_rcnn_pgn_ws.yaml"))) if row.num_groups]
    count = f"a single group in {sum(row.num_groups == 1 for row in norms)} of the {len(norms)} norms of Faster R-CNN"
    assert f"{count} R-50-FPN with a box head of 4 convolutions" in Path(README).read_text()
    (shown,) = re.findall(r"^```text\n(.*?)^```", Path(README).read_text(), re.DOTALL | re.MULTILINE)
    table = {row.name: row for row in norm_table(build_on_meta(load_config("configs/quick/pfpn_gn.yaml")))}
    for line in shown.splitlines()[1:]:
        name, *cells = line.split()
        row = table[name]
        found = [row.norm, row.n_in, row.n_out, row.num_groups, row.n_out // row.num_groups]
        assert cells == [*map(str, found)]
