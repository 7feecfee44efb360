"""Train one config under several norms and seeds, all else equal, each run in a folder of its own.

A comparison's folder holds ``comparison.yaml``, which says what all its runs share, and a folder ``NORM/seed_SEED`` for
each run. In it are the files that Detectron2's job writes, ``output.txt`` with what the job prints, and ``run.json``
once the job has ended. A run whose files are damaged counts as failed and does not stop the others. ``local.py`` and
``slurm.py`` train the runs.
"""

import glob
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.config import check_weights, load_config, norm_keys
from gng_d2.job.engine import setup_job
from gng_d2.job.files import atomic_open, prepare_outputs
from gng_d2.job.imports import import_modules
from gng_d2.job.norm_keys import check_norm_keys, norms_of_key
from gng_d2.layers.norm_names import THEIRS, norm_from_name
from gng_d2.layers.ws_conv import WS
from gng_d2.models.fuse_norms import fuse_norms
from gng_d2.models.norm_table import norm_table
from gng_d2.models.recompute_norms import recompute_norms

from . import ROOT
from .metrics import last_record
from .paper import TABLE_5, TABLE_6
from .rows import differences, leaves, machine, norm_in_path, norm_in_text

TRAIN_NET = os.path.join(ROOT, "tools", "train_net.py")

# keys that do not change what is trained
NEUTRAL = {
    *("SEED", "OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "TEST.EVAL_PERIOD"),
    *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE"),
}


@dataclass(frozen=True)
class RunState:
    """How a run stands, or how it ended."""

    # A run's folder says "finished", "failed" or "not finished". A cluster also says "queued", "running", or "left",
    # which means that another process trains the run.
    status: str
    reason: str | None = None  # why the run failed, or what it waits for
    machine: str | None = None
    commit: str | None = None  # of the code that trained it

    def __str__(self):
        return self.status + f": {self.reason}" * bool(self.reason)


class Run(NamedTuple):
    """One training, in a folder of its own."""

    norm: str
    seed: int
    folder: str

    def __str__(self):
        return f"{norm_in_text(self.norm)} seed {self.seed}"

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def log_hint(self, state: RunState) -> str:
        """Where to read why the run failed, if it did and has a log: " (PATH)"."""
        path = self.path("output.txt")
        return f" ({path})" * (state.status == "failed" and os.path.isfile(path))

    def recorded_state(self) -> RunState:
        """The state in ``run.json``. A run whose file is damaged has failed."""
        path = self.path("run.json")
        try:
            with open(path, encoding="utf-8") as file:
                state = RunState(**json.load(file))
        except FileNotFoundError:
            return RunState("not finished")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            return RunState("failed", f"{path} is damaged: {error}")
        if state.status not in ("finished", "failed") or not isinstance(state.reason, (str, type(None))):
            return RunState("failed", f"{path} is damaged: no run ends as {state.status!r}")
        return state

    def record(self, state: RunState) -> None:
        """Write ``state`` to ``run.json``, whole or not at all."""
        with atomic_open(self.path("run.json")) as file:
            json.dump(asdict(state), file)


class NormFacts(NamedTuple):
    """What is known of a norm before it is trained."""

    groups: str  # in the whole model, for instance "4 x 32, 53 x FrozenBN"; empty if the model cannot be built
    channels_per_group: list[tuple[int, int]]  # (channels in a group, how many of the layers under test have them)
    paper: dict[str, float]  # the paper's results for this training, by metric


class Comparison:
    """The runs of ``config_file``: one for each norm and seed.

    Args:
        keys: the ``NORM`` keys to vary, by default :func:`default_norm_keys`. A key that has "+WS" keeps it, except
            under Detectron2's own norms, which cannot have it.
        overrides: ``KEY VALUE`` pairs for all runs.
        imports: modules and files that are run first, here and in each run
            (:func:`~gng_d2.job.imports.import_modules`).
        recompute_norms: give each run ``--recompute-norms``, which computes the same numbers in less memory.
        fuse_norms: give each run ``--fuse-norms``, which computes the same numbers but for rounding in less time.
        calibrate_norms: the number of images with which each run calibrates its backbone's norms; 0 if it does not.
        num_gpus: GPUs of each machine, or processes of each machine where there are no GPUs.

    Raises:
        InputError: something that the user gave cannot be used.
    """

    def __init__(
        self,
        config_file: str,
        norms: Sequence[str],
        seeds: Sequence[int],
        output: str,
        keys: Sequence[str] | None = None,
        overrides: Sequence[str] = (),
        *,
        imports: Sequence[str] = (),
        recompute_norms: bool = False,
        fuse_norms: bool = False,
        calibrate_norms: int = 0,
        num_gpus: int = 1,
        num_machines: int = 1,
    ):
        for option, values in (("--norms", norms), ("--seeds", seeds)):
            if len(set(values)) < len(values):
                raise InputError(f"{option} {' '.join(map(str, values))}: one of them stands there twice")
        if min(seeds) < 0:
            raise InputError(f"--seeds {min(seeds)}: a seed is 0 or more")
        self.config_file, self.norms, self.seeds, self.output = config_file, norms, seeds, output
        self.overrides, self.imports = list(overrides), list(imports)
        self.recompute_norms, self.fuse_norms, self.calibrate_norms = recompute_norms, fuse_norms, calibrate_norms
        self.num_gpus, self.num_machines = num_gpus, num_machines
        self.world_size = num_gpus * num_machines
        import_modules(self.imports)
        cfg = load_config(config_file, self.overrides)
        self.keys = list(keys) if keys else default_norm_keys(cfg)
        known = dict(norm_keys(cfg))
        for key in self.keys:
            if key not in known:
                raise InputError(f"--norm-keys: the config has no NORM key {key}. It has {', '.join(known)}")
        self.standardized = {key for key in self.keys if known[key].endswith(WS)}
        self._check_distinct()

    def other_runs(self) -> list[str]:
        """The finished runs in the folder that are not among :attr:`runs`, as NORM/seed_SEED."""
        mine = {os.path.relpath(run.folder, self.output) for run in self.runs}
        found = {os.path.relpath(run.folder, self.output) for run in finished_runs(self.output)}
        return sorted(found - mine)

    @cached_property
    def runs(self) -> list[Run]:
        """All runs. Those of one seed stand together, so that norms can be compared before the last seed is trained."""
        return [
            Run(norm, seed, os.path.join(self.output, norm_in_path(norm), f"seed_{seed}"))
            for seed in self.seeds
            for norm in self.norms
        ]

    def norm_overrides(self, norm: str) -> list[str]:
        standardized = set() if norm.endswith(WS) or norm in ("", *THEIRS) else self.standardized
        return [word for key in self.keys for word in (key, norm + WS if key in standardized else norm)]

    def _check_distinct(self):
        first = {}
        for norm in self.norms:
            same = first.setdefault(tuple(self.norm_overrides(norm)), norm)
            if same != norm:
                keys = sorted(self.standardized)
                raise InputError(
                    f"--norms {same} {norm}: both are {norm.removesuffix(WS)}{WS} here, because the config has +WS in "
                    f"{', '.join(keys)}. To compare with and without, add the overrides "
                    f"{' '.join(f'{key} GN' for key in keys)}"
                )

    def run_overrides(self, run: Run) -> list[str]:
        return [*self.overrides, *self.norm_overrides(run.norm), "SEED", str(run.seed), "OUTPUT_DIR", run.folder]

    def command(self, run: Run, machine_rank: int = 0, dist_url: str = "auto") -> list[str]:
        """The command that trains ``run`` from its last checkpoint on, on the machine of rank ``machine_rank``."""
        return [
            *(sys.executable, TRAIN_NET, "--resume", "--config-file", self.config_file, *self.options()),
            *("--machine-rank", str(machine_rank), "--dist-url", dist_url, *self.run_overrides(run)),
        ]

    def options(self) -> list[str]:
        """The options of tools/train_net.py that all runs have."""
        return [
            *(("--import", *self.imports) if self.imports else ()),
            *(("--recompute-norms",) if self.recompute_norms else ()),
            *(("--fuse-norms",) if self.fuse_norms else ()),
            *(("--calibrate-norms", str(self.calibrate_norms)) if self.calibrate_norms else ()),
            *("--num-gpus", str(self.num_gpus), "--num-machines", str(self.num_machines)),
        ]

    def norm_cfg(self, norm: str) -> CfgNode:
        return load_config(self.config_file, [*self.overrides, *self.norm_overrides(norm)])

    def state(self, run: Run) -> RunState:
        """The state that the folder of ``run`` records. A finished run whose metrics are incomplete has failed."""
        state = run.recorded_state()
        path, needed = run.path("metrics.json"), self.last_iteration
        last = last_record(path)["iteration"]
        if state.status != "finished" or last >= needed:
            return state
        found = f"ends with iteration {last}" if os.path.isfile(path) else "is not there"
        reason = f"{path} {found}, and a finished run's ends with {needed}. Delete {run.folder} to train it anew"
        return RunState("failed", reason, state.machine)

    @property
    def last_iteration(self) -> int:
        """The last in a finished run's metrics.json. Detectron2 counts the evaluation at the end as one more."""
        return self.cfg.SOLVER.MAX_ITER - (not self.cfg.DATASETS.TEST)

    def iterations_done(self, run: Run) -> int:
        """The number of iterations that the metrics.json of ``run`` has."""
        iterations = self.cfg.SOLVER.MAX_ITER
        if run.recorded_state().status == "finished":
            return iterations
        return min(last_record(run.path("metrics.json"))["iteration"] + 1, iterations)

    @cached_property
    def cfg(self) -> CfgNode:
        """The first norm's config, with the schedule that Detectron2 scales to the number of processes."""
        return DefaultTrainer.auto_scale_workers(self.norm_cfg(self.norms[0]), self.world_size)

    @cached_property
    def facts(self) -> dict[str, NormFacts]:
        """What is known of each norm before it is trained."""
        tables, under_test = {}, set()
        for norm in self.norms:
            cfg = self.norm_cfg(norm)
            with suppress(InputError):
                model = build_on_meta(cfg)
                tables[norm] = norm_table(model)
                under_test = under_test or {path for key in self.keys for path in norms_of_key(cfg, key, model)[1]}
        facts = {}
        for norm in self.norms:
            rows = tables.get(norm, [])
            groups = Counter(row.num_groups or row.norm for row in rows)
            tested = [row.channels_per_group for row in rows if row.name in under_test]
            facts[norm] = NormFacts(
                groups=", ".join(f"{count} x {group}" for group, count in groups.items()),
                channels_per_group=sorted(Counter(filter(None, tested)).items()),
                paper=paper_values(self.norm_cfg(norm)),
            )
        return facts

    def machine(self, threads: int | None = None) -> str:
        return f"{self.world_size} x " * (self.world_size > 1) + machine(self.cfg.MODEL.DEVICE, threads)

    def settings(self) -> dict:
        """What all runs share: the config without norms and without :data:`NEUTRAL`, and the number of processes."""
        cfg = self.cfg.clone()
        cfg.merge_from_list(self.norm_overrides("<norm>"))
        config = {key: value for key, value in leaves(yaml.safe_load(cfg.dump())) if key not in NEUTRAL}
        options = {"fuse_norms": self.fuse_norms, "calibrate_norms": self.calibrate_norms}
        given = {name: value for name, value in options.items() if value}
        return {"processes": self.world_size, **given, "config": config}

    def recipe(self) -> str:
        """A hash of :meth:`settings`. Runs that have the same one differ in nothing but norm and seed."""
        return hashlib.sha256(yaml.safe_dump(self.settings()).encode()).hexdigest()[:16]

    def check(self) -> None:
        """Check, before the first run, that each key makes norms, and that the job of each norm could start.

        Raises:
            InputError: it could not; says why.
        """
        for norm in self.norms:
            cfg = self.norm_cfg(norm)
            model = build_on_meta(cfg)
            if norm == self.norms[0]:
                self._check_keys(cfg, model)
            else:  # a warning of FrozenBN without weights; for the first norm setup_job gives it
                check_weights(cfg)
            check_norm_keys(cfg, model)
            for wanted, change in ((self.recompute_norms, recompute_norms), (self.fuse_norms, fuse_norms)):
                if wanted:
                    change(model)
        with tempfile.TemporaryDirectory() as folder:  # once, as the data and all else are the same under each norm
            overrides = [*self.overrides, *self.norm_overrides(self.norms[0]), "OUTPUT_DIR", folder]
            options = {"world_size": self.world_size, "calibrate_norms": self.calibrate_norms}
            setup_job(self.config_file, overrides, **options)

    def _check_keys(self, cfg, model):
        for key in self.keys:
            try:
                changed = norms_of_key(cfg, key, model)[1]
            except InputError:  # of a head that builds with neither GN nor BN
                continue
            if not changed:
                raise InputError(f"--norm-keys {key}: this model has no norm that is made by that key")

    def claim_output(self) -> None:
        """Make the folder, or check that the runs in it are of this comparison.

        Raises:
            InputError: the folder cannot be written, or holds runs of another comparison; says in what they differ.
        """
        path = os.path.join(self.output, "comparison.yaml")
        prepare_outputs(path)
        if not os.path.exists(path):
            with atomic_open(path) as file:
                yaml.safe_dump(self.settings(), file)
        self.check_output()

    def check_output(self) -> None:
        """Check that the runs in the folder, if there are any, are of this comparison.

        Raises:
            InputError: they are of another one; says in what they differ.
        """
        path = os.path.join(self.output, "comparison.yaml")
        if not os.path.exists(path):
            return
        differ = {
            key: pair
            for name, pair in differences(_read_settings(path), self.settings()).items()
            if (key := name.removeprefix("config.")) not in NEUTRAL  # which folders of older versions have
        }
        if differ:
            lines = "\n  ".join(f"{key}: {there} there, {here} here" for key, (there, here) in sorted(differ.items()))
            raise InputError(
                f"--output: {self.output} holds runs of another comparison, which must not mix with these. They "
                f"differ in\n  {lines}\nName another folder"
            )


def finished_runs(output: str) -> list[Run]:
    """The finished runs in a comparison's folder, by nothing but their folders."""
    folders = sorted(glob.glob(os.path.join(glob.escape(output), "*", "seed_*")))
    runs = [Run("", 0, folder) for folder in folders]
    return [run for run in runs if run.recorded_state().status == "finished"]


def default_norm_keys(cfg: CfgNode) -> list[str]:
    """The ``NORM`` keys whose value is GN or a norm of ours and on which the model of ``cfg`` depends.

    Raises:
        InputError: there are none.
    """
    chosen = [key for key, value in norm_keys(cfg) if value == "GN" or norm_from_name(value) is not None]
    model = build_on_meta(cfg)
    keys = [key for key in chosen if norms_of_key(cfg, key, model)[1]]
    if not keys:
        raise InputError(
            "the config has no norm that is GN, GN<k> or PGN: name the keys to vary, such as --norm-keys MODEL.FPN.NORM"
        )
    return keys


def paper_values(cfg: CfgNode) -> dict[str, float]:
    """The paper's results, by metric, if the training in ``cfg`` is one of its tables'; else nothing."""
    for name, values in {**TABLE_5, **TABLE_6}.items():
        if differences(cfg, load_config(os.path.join(ROOT, "configs", name))).keys() <= NEUTRAL:
            return values
    return {}


def _read_settings(path):
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"--output: {path}, which says what the runs there share, is damaged. Name another folder")
    return settings
