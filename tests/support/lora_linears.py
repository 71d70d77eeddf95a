"""Projections of one input for lora_linears, and the calls of single layers that it is to agree with."""

import torch
from torch.nn.functional import linear

from fastlora import lora_linear

K = 12
SIZES = ((8, 3), (4, None), (6, 17), (5, 1))  # N and rank of each projection; None: no adapter
SCALINGS = (1.7, 0.0, -0.5, 2.0)
WHOLE = (0.0,) * len(SIZES)  # nothing is dropped
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def draw(dtype=FLOAT32, adapter_dtype=None, lead=(3, 5), biases=(True, True, False, False), seed=0):
    """x, and weights, A, B and biases of SIZES; all but the weights train."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0, dtype=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    def train(tensor):
        return tensor.requires_grad_()

    adapter_dtype = adapter_dtype or dtype
    x = train(normal(*lead, K))
    weights = [normal(n, K, std=K**-0.5) for n, _ in SIZES]
    lora_as = [None if r is None else train(normal(r, K, std=K**-0.5, dtype=adapter_dtype)) for _, r in SIZES]
    lora_bs = [None if r is None else train(normal(n, r, std=r**-0.5, dtype=adapter_dtype)) for n, r in SIZES]
    of_bias = [train(normal(n)) if given else None for (n, _), given in zip(SIZES, biases, strict=True)]
    return x, weights, lora_as, lora_bs, SCALINGS, of_bias


def leaves(arguments):
    x, _, lora_as, lora_bs, _, biases = arguments
    return [x, *(t for t in (*lora_as, *lora_bs, *biases) if t is not None and t.requires_grad)]


def one_by_one(x, weights, lora_as, lora_bs, scalings, biases, dropout_p=WHOLE, **options):
    """What lora_linears is to agree with."""
    return [
        linear(x, w, bias) if a is None else lora_linear(x, w, a, b, scaling, bias, dropout_p=p, **options)
        for w, a, b, scaling, bias, p in zip(weights, lora_as, lora_bs, scalings, biases, dropout_p, strict=True)
    ]


def gradients(ys, arguments, **options):
    torch.manual_seed(7)
    used = [y for y in ys if y.requires_grad]
    return torch.autograd.grad(used, leaves(arguments), [torch.randn(y.shape).to(y.dtype) for y in used], **options)
