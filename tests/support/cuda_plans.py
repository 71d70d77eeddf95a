"""Plans of CUDA launches as tests make them: sizes, operands by address, and csrc's host code over the emulated
runtime."""

from tests.support import cuda_runtime

SIZES = dict(backward=False, fp16=False, dropout=False, group_m=4, splits=1, fused=False, ctas=4, m=64, n=64, k=64, r=8)
TILE, LARGE_TILE = {"block_m": 64, "block_n": 128}, {"block_m": 128, "block_n": 256}
MOST = 2**31 - 1024  # of M, N, K, tiles and flags
BACKWARD_ONLY = ("layer_input", "saved_s", "grad_a", "grad_b", "grad_bias")


def make_plan(**problem):
    return cuda_runtime.runtime().module.Plan(**problem)


def arguments(plan, **changes):
    """Addresses that a plan of SIZES, with all gradients, can be launched with; None takes one out."""
    matrices = {"act": 64, "weight": 64, "lora_a": 64, "lora_b": 8, "out": 64, "layer_input": 64, "saved_s": 8}
    given = {name: (1 << 20, stride) for name, stride in matrices.items()}
    given |= dict.fromkeys(("s", "grad_a", "grad_b", "grad_bias", "workspace"), 1 << 20) | {"scale_in_s": 1.5}
    if not plan.variant["backward"]:
        given = {n: t for n, t in given.items() if n not in BACKWARD_ONLY}
    return {name: value for name, value in {**given, **changes}.items() if value is not None}


# Unlike each other, as are the strides and the addresses below.
M, IN, OUT, R = 304, 136, 200, 24
MATRICES = {"act": 1, "weight": 2, "lora_a": 3, "lora_b": 4, "out": 5, "layer_input": 6, "saved_s": 7}
VECTORS = {"s": 8, "bias": 9, "grad_a": 10, "grad_b": 11, "grad_bias": 12, "gradient_partials": 13, "workspace": 14}
