"""The kernels compile for a GPU, where there is none: the interpreter takes what the compiler would refuse."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
from gng_d2.ops import group_norm_triton, weight_standardization_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

modules = group_norm_triton, weight_standardization_triton
kernels = [kernel for module in modules for name, kernel in vars(module).items() if name.endswith("_kernel")]
assert len(kernels) == 8
DATA = {"x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "residual_ptr", "kept_ptr", "dresidual_ptr"}
for data, activation in ("*fp32", None), ("*bf16", "relu"), ("*fp32", "silu"):
    # the values that Triton takes as constants: blocks, a stride of 1, no weight, a single image, group and chunk
    for constants in (
        dict(stride_s=1, BLOCK_C=1, BLOCK_S=2048, BLOCK=1024),
        dict(stride_c=1, BLOCK_C=64, BLOCK_S=32, BLOCK=16384, weight_ptr=None, bias_ptr=None)
        | dict(residual_ptr=None, kept_ptr=None, dresidual_ptr=None),
        dict(channels=1, positions=1, stride_s=1, num_groups=1, num_chunks=1, chunk=1)
        | dict(BLOCK_C=1, BLOCK_S=1, BLOCK=1024),
    ):
        for kernel in kernels:
            names = kernel.arg_names
            given = {name: value for name, value in constants.items() if name in names}
            given |= {"ACTIVATION": activation} if "ACTIVATION" in names else {}
            types = {
                name: "constexpr" if name in given else "fp32" if name == "eps" else "i32" if not name.endswith("_ptr")
                else data if name in DATA else "*fp32"
                for name in names
            }
            source = ASTSource(kernel, types, {(names.index(name),): value for name, value in given.items()})
            warps = {"num_warps": 16 if given.get("BLOCK") == 16384 else 4}
            assert compile(source, target=GPUTarget("cuda", 90, 32), options=warps).asm["cubin"]
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.stdout == "compiled\n", result.stderr
