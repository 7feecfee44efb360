import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import KERNELS, RECOMPUTE, needs_torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

import gng_d2
from gng_d2.errors import InputError
from gng_d2.ops import backends, cpu_kernels, group_norm, set_kernels_enabled, standardize_weight

pytestmark = [
    pytest.mark.skipif(not cpu_kernels.is_compiled(), reason="gng_d2 was installed without a C compiler"),
    KERNELS,
]


@pytest.fixture(autouse=True)
def default():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    with set_kernels_enabled(True):
        yield
    torch.set_num_threads(before)


def uses_kernels():
    """Whether group norm and weight standardization do, which agree."""
    x = torch.randn(1, 64, 128, 128, requires_grad=True)
    outputs = group_norm(x, 1), standardize_weight(torch.randn(4, 9, requires_grad=True))
    used = {type(y.grad_fn).__name__ in ("_GroupNormBackward", "_StandardizeBackward") for y in outputs}
    assert len(used) == 1
    with torch.no_grad():
        torch.testing.assert_close(group_norm(x, 1), F.group_norm(x, 1))
    return used.pop()


@pytest.mark.parametrize("off", ["off", False])
@pytest.mark.parametrize("on", ["cpu", "cuda", True])
def test_switch(on, off):
    assert uses_kernels()
    set_kernels_enabled(off)
    assert not uses_kernels() and backends.enabled_kernels() == "off"
    set_kernels_enabled(on)
    assert uses_kernels() and backends.enabled_kernels() == (backends.DEFAULT_KERNELS if on is True else on)


def test_other_states_are_refused():
    for state in ("on", "1", 1, None, ""):
        with pytest.raises(InputError, match="set_kernels_enabled is .*: set it to off .*, cpu .* or cuda"):
            set_kernels_enabled(state)
    assert backends.enabled_kernels() == backends.DEFAULT_KERNELS


def test_the_default_follows_what_was_measured():
    """The kernels for CUDA run by default once their tests passed on a GPU and their time was measured there."""
    results = Path("docs", "results")
    tests, costs = results / "kernel_tests_cuda.json", results / "benchmark_norm_cuda.json"
    measured = (
        costs.exists() and tests.exists() and "failed" not in {t["outcome"] for t in json.loads(tests.read_text())}
    )
    assert ("cuda" if measured else "cpu") == backends.DEFAULT_KERNELS


@needs_torch(2, 11, "fake tensors of a GPU that is not there")
def test_kernels_for_cuda_are_off_at_first_and_the_log_says_so_once(monkeypatch, caplog):
    op_module = pytest.importorskip("gng_d2.ops.group_norm_triton") and sys.modules["gng_d2.ops.group_norm"]
    weight_module = sys.modules["gng_d2.ops.weight_standardization"]
    monkeypatch.setattr(backends, "_ordinary_types", (*backends._ordinary_types, FakeTensor))
    monkeypatch.setattr(backends, "triton_works", lambda device_index: True)
    backends._log_that_cuda_is_off.cache_clear()

    def chosen(state, dtype=torch.float32):
        with FakeTensorMode(), set_kernels_enabled(state), caplog.at_level(logging.INFO):
            x = torch.empty(1, 4, 8, 8, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
            found = {op_module._backend(x, 2, None, None, 1e-5) is not None, weight_module._backend(x) is not None}
        assert len(found) == 1
        return found.pop()

    assert not chosen("off") and not chosen("cpu", torch.float64) and not caplog.records
    assert not chosen("cpu") and not chosen("cpu")
    assert ["GNG_D2_KERNELS=cuda turns them on" in record.message for record in caplog.records] == [True]
    assert chosen("cuda")


def test_switch_as_a_context():
    with set_kernels_enabled("off"):
        assert not uses_kernels()
        with set_kernels_enabled("cpu"):
            assert uses_kernels()
        assert not uses_kernels()
    assert uses_kernels()
    with pytest.raises(KeyError), set_kernels_enabled(False):
        raise KeyError
    assert uses_kernels()


def test_off_gives_pytorchs_bits():
    x, (weight, bias) = torch.randn(1, 64, 128, 128), torch.randn(2, 64)
    with set_kernels_enabled("off"):
        assert torch.equal(group_norm(x, 1, weight, bias), F.group_norm(x, 1, weight, bias))


ENVIRONMENT = """
import torch
from gng_d2.ops import group_norm
torch.set_num_threads(4)
print(type(group_norm(torch.randn(1, 64, 128, 128, requires_grad=True), 1).grad_fn).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("value, expected", [("off", "NativeGroupNormBackward0"), ("0", "")])
def test_environment_variable(value, expected):
    environment = {**os.environ, "GNG_D2_KERNELS": value}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENVIRONMENT], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == expected, run.stderr
    assert expected or "GNG_D2_KERNELS is '0': set it to off " in run.stderr


@RECOMPUTE
@pytest.mark.parametrize("state", ["off", "cpu", "cuda"])
def test_what_recompute_norms_runs_again_finds_the_state_of_its_first_run(state):
    seen = []

    class Norm(gng_d2.GroupNorm):
        def forward(self, x):
            seen.append(backends.enabled_kernels())
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Norm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    gng_d2.recompute_norms(model)
    with set_kernels_enabled(state):
        loss = model(torch.randn(1, 3, 8, 8)).sum()
    ran = len(seen)
    loss.backward()
    assert len(seen) > ran and {*seen} == {state}
