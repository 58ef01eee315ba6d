"""Compiles the kernels for GPUs that need not be here, and prints what matters of the code.

Run by `comm/test_kernels`; with the argument `loss`, by `model/test_loss`.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from thinwire.comm.codecs import kernels
from thinwire.comm.codecs.blocks import BlockFormat
from thinwire.comm.codecs.codec import make_codec
from thinwire.comm.codecs.triton_blocks import encode_blocks, sum_blocks
from thinwire.model.triton_loss import MOST, softmax_gradient

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
COUNTS = dict.fromkeys(("n", "blocks", "codes_c"), "i32")


def assembly(form: BlockFormat, target: str) -> str:
    """Both kernels of a format, as the GPU's assembler gets them."""
    shape = kernels.constants(form)
    encoding = {**shape, "LARGEST": form.largest, "STOCHASTIC": form.stochastic}
    encode = {"x_ptr": "*fp32", "coded_ptr": "*u8", **COUNTS, "first": "i64", "length": "fp32"}
    sums = {"coded_ptr": "*u8", "out_ptr": "*bf16", **COUNTS, "stride": "i64", "ranks": "i32", "length": "fp32"}
    made = ""
    for kernel, arguments, values in ((encode_blocks, encode, encoding), (sum_blocks, sums, {**shape, "ADD": True})):
        source = ASTSource(kernel, arguments | dict.fromkeys(values, "constexpr"), constexprs=values)
        compiled = triton.compile(source, target=TARGETS[target], options=kernels.OPTIONS)
        made += compiled.asm["ptx" if target == "cuda" else "amdgcn"]
    return made


def loss(target: str) -> str:
    """The kernel of the loss, for bf16 logits."""
    arguments = {
        "logits_ptr": "*bf16",
        "targets_ptr": "*i64",
        "losses_ptr": "*fp32",
        "stride": "i32",
        "vocabulary": "i32",
    }
    source = ASTSource(softmax_gradient, arguments | {"BLOCK": "constexpr"}, constexprs={"BLOCK": MOST})
    warps = 32 if target == "cuda" else 16  # of 32 threads, and of 64
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps})
    return str(compiled.asm["ptx" if target == "cuda" else "amdgcn"])


def main() -> None:
    if sys.argv[1:] == ["loss"]:
        print(json.dumps({target: ["compiled"] if loss(target) else [] for target in TARGETS}))
        return
    found = {}
    for name, rounding in (("int8", "stochastic"), ("e3m0", "stochastic"), ("int4-hadamard", "nearest")):
        form = make_codec(name, rounding=rounding).form  # type: ignore[arg-type, attr-defined]
        text = assembly(form, "cuda")
        found[name] = sorted(set(re.findall(r"\b(?:div|fma|mad|mul|sqrt|ex2)[.\w]*f32\b|\.ftz\b", text)))
    found["hip"] = ["compiled"] if assembly(form, "hip") else []
    print(json.dumps(found))


if __name__ == "__main__":
    main()
