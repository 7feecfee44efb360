"""Train one config under several norms and seeds, all else equal, each run by itself in a folder of its own.

A comparison's folder holds ``comparison.yaml``, what all its runs share, and for each run ``NORM/seed_SEED``:
what Detectron2's job writes, ``output.txt`` with what it prints, and ``run.json`` once it ended. A run whose files
are damaged counts as failed, and takes no other down. Where the runs are trained is another subject: ``local.py``,
``slurm.py``.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from gng_d2.errors import InputError
from gng_d2.job.build import build_on_meta
from gng_d2.job.config import load_config, norm_keys
from gng_d2.job.engine import setup_job
from gng_d2.job.files import atomic_open, last_iteration, prepare_outputs
from gng_d2.job.imports import import_modules
from gng_d2.layers.norm_names import norm_from_name, norm_in_path
from gng_d2.layers.ws_conv import WS
from gng_d2.models.norm_table import norm_table
from gng_d2.models.recompute_norms import recompute_norms

from . import ROOT
from .rows import differences, machine

__all__ = ["RunState", "Run", "Comparison", "default_norm_keys"]

TRAIN_NET = os.path.join(ROOT, "tools", "train_net.py")


@dataclass(frozen=True)
class RunState:
    """How a run ended, or how it stands."""

    # as its folder says: "finished", "failed" or "not finished"; as a cluster says: also "queued", "running", or "left"
    # to another process
    status: str
    reason: str | None = None  # of a failure, or what a run waits for
    machine: str | None = None

    def __str__(self):
        return self.status + f": {self.reason}" * bool(self.reason)


class Run(NamedTuple):
    """One training, in a folder of its own."""

    norm: str
    seed: int
    folder: str

    def __str__(self):
        return f"{self.norm} seed {self.seed}"

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def recorded_state(self) -> RunState:
        """What ``run.json`` says; that the run failed where it says nothing a program wrote."""
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
        """Write ``run.json``, whole or not at all."""
        with atomic_open(self.path("run.json")) as file:
            json.dump(asdict(state), file)


class Comparison:
    """The runs of ``config_file`` under each of ``norms`` and ``seeds``.

    Args:
        keys: the ``NORM`` keys to vary, by default :func:`default_norm_keys`. A key that has "+WS" keeps it.
        overrides: ``KEY VALUE`` pairs for all runs.
        imports: modules and files that are run first, here and in each run
            (:func:`~gng_d2.job.imports.import_modules`).
        recompute_norms: run each with ``--recompute-norms``: the same numbers in less memory.
        calibrate_norms: images that fit the norms of a backbone to batch-norm weights, in each run; 0: none.
        num_gpus: for each of ``num_machines``; without a GPU, CPU processes.

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
        calibrate_norms: int = 0,
        num_gpus: int = 1,
        num_machines: int = 1,
    ):
        for option, values in (("--norms", norms), ("--seeds", seeds)):
            if len(set(values)) < len(values):
                raise InputError(f"{option}: {' '.join(map(str, values))} has one twice")
        if min(seeds) < 0:
            raise InputError(f"--seeds: {min(seeds)} is no seed; 0 or more are")
        self.config_file, self.norms, self.seeds, self.output = config_file, norms, seeds, output
        self.overrides, self.imports = list(overrides), list(imports)
        self.recompute_norms, self.calibrate_norms = recompute_norms, calibrate_norms
        self.num_gpus, self.num_machines = num_gpus, num_machines
        self.world_size = num_gpus * num_machines
        import_modules(self.imports)
        cfg = load_config(config_file, self.overrides)
        self.keys = list(keys) if keys else default_norm_keys(cfg)
        known = dict(norm_keys(cfg))
        for key in self.keys:
            if key not in known:
                raise InputError(f"--norm-keys: {key} is no NORM key of the config; it has {', '.join(known)}")
        self.standardized = {key for key in self.keys if known[key].endswith(WS)}

    @cached_property
    def runs(self) -> list[Run]:
        """Seed by seed, so that what has run at any time can be compared."""
        return [
            Run(norm, seed, os.path.join(self.output, norm_in_path(norm), f"seed_{seed}"))
            for seed in self.seeds
            for norm in self.norms
        ]

    def norm_overrides(self, norm: str) -> list[str]:
        pairs = [(key, norm + WS if key in self.standardized and not norm.endswith(WS) else norm) for key in self.keys]
        return [word for pair in pairs for word in pair]

    def run_overrides(self, run: Run) -> list[str]:
        return [*self.overrides, *self.norm_overrides(run.norm), "SEED", str(run.seed), "OUTPUT_DIR", run.folder]

    def command(self, run: Run, machine_rank: int = 0, dist_url: str = "auto") -> list[str]:
        """What trains ``run`` on one of its machines, from its last checkpoint on."""
        return [
            *(sys.executable, TRAIN_NET, "--resume", "--config-file", self.config_file),
            *(("--import", *self.imports) if self.imports else ()),
            *(("--recompute-norms",) if self.recompute_norms else ()),
            *(("--calibrate-norms", str(self.calibrate_norms)) if self.calibrate_norms else ()),
            *("--num-gpus", str(self.num_gpus), "--num-machines", str(self.num_machines)),
            *("--machine-rank", str(machine_rank), "--dist-url", dist_url, *self.run_overrides(run)),
        ]

    def norm_cfg(self, norm: str) -> CfgNode:
        return load_config(self.config_file, [*self.overrides, *self.norm_overrides(norm)])

    def state(self, run: Run) -> RunState:
        """How ``run`` ended. A finished one whose metrics are not whole has failed."""
        state = run.recorded_state()
        damage = self._damage(run) if state.status == "finished" else None
        return RunState("failed", damage, state.machine) if damage else state

    def _damage(self, run):
        """What is wrong with the metrics.json of a run that is finished; None if nothing is."""
        path = run.path("metrics.json")
        # Detectron2 evaluates after the last iteration, and counts that as one more
        last, needed = last_iteration(path), self.cfg.SOLVER.MAX_ITER - (not self.cfg.DATASETS.TEST)
        if last >= needed:
            return None
        found = f"ends with iteration {last}" if os.path.isfile(path) else "is not there"
        return f"{path} {found}, and a finished run's ends with {needed}. Delete {run.folder} to train it anew"

    def iterations_done(self, run: Run) -> int:
        """As far as its metrics.json says."""
        iterations = self.cfg.SOLVER.MAX_ITER
        if run.recorded_state().status == "finished":
            return iterations
        return min(last_iteration(run.path("metrics.json")) + 1, iterations)

    @cached_property
    def cfg(self) -> CfgNode:
        """The first norm's config, scaled to the number of processes as Detectron2 does it."""
        return DefaultTrainer.auto_scale_workers(self.norm_cfg(self.norms[0]), self.world_size)

    def channels_per_group(self, norm: str) -> dict[int, int]:
        """In how many of the layers under test a group has how many channels: what ``norm`` makes of their widths."""

        def norms(name):
            words = [word for key in self.keys for word in (key, name)]
            return norm_table(build_on_meta(load_config(self.config_file, [*self.overrides, *words])))

        under_test = {a.name for a, b in zip(norms("LN"), norms("BN")) if a.norm != b.norm}
        rows = [row for row in norm_table(build_on_meta(self.norm_cfg(norm))) if row.name in under_test]
        known = [row.n_out // row.num_groups for row in rows if row.num_groups and row.n_out]
        return dict(sorted(Counter(known).items()))

    def machine(self) -> str:
        return f"{self.world_size} x " * (self.world_size > 1) + machine(self.cfg.MODEL.DEVICE)

    def settings(self) -> dict:
        cfg = self.cfg.clone()
        cfg.merge_from_list(self.norm_overrides("<norm>"))
        cfg.SEED, cfg.OUTPUT_DIR, cfg.MODEL.DEVICE = -1, "", ""
        calibrated = {"calibrate_norms": self.calibrate_norms} if self.calibrate_norms else {}
        return {"processes": self.world_size, **calibrated, "config": yaml.safe_load(cfg.dump())}

    def check(self) -> None:
        """Refuse before the first run what no run could finish with.

        Raises:
            InputError: says what.
        """
        with tempfile.TemporaryDirectory() as folder:
            for norm in self.norms:
                overrides = [*self.overrides, *self.norm_overrides(norm), "OUTPUT_DIR", folder]
                cfg = setup_job(self.config_file, overrides, world_size=self.world_size)
                if self.recompute_norms:
                    recompute_norms(build_on_meta(cfg))

    def claim_output(self) -> None:
        """Make the folder, or see that what is in it compares the same.

        Raises:
            InputError: it cannot be written, or says what differs.
        """
        path = os.path.join(self.output, "comparison.yaml")
        prepare_outputs(path)
        if not os.path.exists(path):
            with atomic_open(path) as file:
                yaml.safe_dump(self.settings(), file)
        differ = differences(_read_settings(path), self.settings())
        if differ:
            lines = "\n  ".join(
                f"{key.removeprefix('config.')}: {there} there, {here} here"
                for key, (there, here) in sorted(differ.items())
            )
            raise InputError(
                f"--output: {self.output} holds runs of another comparison, which must not mix with these. It differs "
                f"in\n  {lines}\nName another folder"
            )


def default_norm_keys(cfg: CfgNode) -> list[str]:
    """The ``NORM`` keys that are GN or a norm of ours and that the model of ``cfg`` depends on.

    Raises:
        InputError: there are none.
    """
    chosen = [key for key, value in norm_keys(cfg) if value == "GN" or norm_from_name(value) is not None]
    norms = norm_table(build_on_meta(cfg))
    keys = [key for key in chosen if norm_table(build_on_meta(_with(cfg, key, "BN"))) != norms]
    if not keys:
        raise InputError("the config has no norm that is GN, GN<k> or PGN: name what to vary with --norm-keys")
    return keys


def _with(cfg, key, value):
    cfg = cfg.clone()
    cfg.merge_from_list([key, value])
    return cfg


def _read_settings(path):
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"--output: {path}, which says what the runs there share, is damaged. Name another folder")
    return settings
