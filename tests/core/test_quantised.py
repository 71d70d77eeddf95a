"""LoRA layers over quantised weights: the libraries' own values, exact gradients, nothing of N×K kept."""

import sys

import pytest
import torch
from torch import nn

import fastlora
from fastlora import quantised_layer
from fastlora.finetune.memory import SavedTensors
from fastlora.quantised_weight import QuantisedWeight
from tests.support.quantised_models import (
    EIGHT_BIT,
    FORMATS,
    FOUR_BIT,
    bitsandbytes,
    by_the_book,
    decoded,
    quantise,
    torchao,
)

N, K, R = 24, 40, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Blocks that run over the end of a row, rows of an odd length, a last block that is not full, one byte, one row.
SHAPES = ((24, 40, 64), (7, 13, 32), (33, 40, 256), (1, 64, 64), (1, 2, 32), (101, 77, 4096))


def make(name, dtype=torch.float32, n=N, k=K, **options):
    torch.manual_seed(0)
    return quantise(nn.Linear(k, n, dtype=dtype), name, **options)


def operands(dtype=torch.float32, adapter_dtype=None, n=N, k=K, m=(2, 5)):
    torch.manual_seed(1)
    x, bias = torch.randn(*m, k, dtype=dtype), torch.randn(n, dtype=dtype)
    a, b = (torch.randn(s, dtype=adapter_dtype or dtype) for s in ((R, k), (n, R)))
    return {name: t.requires_grad_() for name, t in {"x": x, "lora_a": a, "lora_b": b, "bias": bias}.items()}


def step_forward(weight, given, **options):
    return fastlora.lora_linear(given["x"], weight, given["lora_a"], given["lora_b"], 0.7, given["bias"], **options)


def step(weight, given, seed=2, **options):
    """Output and gradients of one call."""
    torch.manual_seed(seed)
    y = step_forward(weight, given, **options)
    wanted = [t for t in given.values() if t.requires_grad]
    return y, *torch.autograd.grad(y.float().pow(2).sum(), wanted)


def same(got, wanted):
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FOUR_BIT)
def test_4_bit_values_are_bitsandbytes_own(name, dtype):
    for n, k, block in SHAPES:
        layer = make(name, dtype, n, k, block=block)
        packed = fastlora.quantised(layer.weight)
        assert packed == (name[:3], packed.tensors, (n, k), dtype, (block, 256 * ("nested" in name)))
        values = packed.dequantize()
        assert values.is_contiguous() and torch.equal(values, decoded(layer).view(n, k)), (n, k, block)
        for other in DTYPES:  # +0.0: the libraries' code paths differ in the sign of fp4's second zero
            expected = by_the_book(layer, other) + 0.0
            assert torch.equal(packed.to(other).dequantize() + 0.0, expected), (n, k, block, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FOUR_BIT)
def test_rows_that_are_no_multiple_of_a_block(name, dtype):
    """bitsandbytes 0.50.2 itself takes a neighbour's scale for some of their elements on a CPU with AVX-512."""
    for n, k, block in ((72, 80, 64), (64, 192, 128), (72, 80, 32), (5, 96, 64)):
        layer = make(name, dtype, n, k, block=block)
        assert torch.equal(fastlora.quantised(layer.weight).dequantize() + 0.0, by_the_book(layer, dtype) + 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_8_bit_values_are_torchaos_own(name, dtype):
    for n, k in ((24, 40), (7, 26), (1, 64)):
        layer = make(name, dtype, n, k)
        packed = fastlora.quantised(layer.weight)
        assert torch.equal(packed.dequantize(), decoded(layer)) and packed.dtype == dtype
        assert packed.shape == (n, k)
        for other in DTYPES:
            assert torch.equal(packed.to(other).dequantize(), by_the_book(layer, other)), (n, k, other)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_that_are_stored_in_another_dtype(storage):
    """As FSDP's users have them, whose shards are of one dtype."""
    bnb, plain = bitsandbytes(), make("nf4 nested")
    torch.manual_seed(0)
    weight = nn.Linear(K, N).weight.detach()
    stored = bnb.nn.Params4bit(weight, False, quant_type="nf4", quant_storage=storage).to("cpu")
    assert stored.dtype == storage
    assert torch.equal(fastlora.quantised(stored).dequantize(), decoded(plain))


@pytest.mark.parametrize("compute", DTYPES, ids=str)
def test_the_weight_is_the_one_that_bitsandbytes_forward_multiplies_with(compute):
    """Rounded once to the compute dtype, whatever the weight was quantised from."""
    for dtype in DTYPES:
        layer = make("nf4 nested", dtype, compute_dtype=compute)
        layer.bias = None
        own = layer(torch.eye(K, dtype=compute)).t()
        assert torch.equal(fastlora.quantised(layer.weight, compute).dequantize(), own)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_the_layer_over_that_weight_bit_for_bit(name, dtype, adapter_dtype, dropout_p):
    layer = make(name, dtype)
    given = operands(dtype, adapter_dtype)
    wanted = step(decoded(layer), given, dropout_p=dropout_p)
    fastlora.reset_dispatch_counts()
    for weight in (layer.weight, fastlora.quantised(layer.weight)):
        assert same(step(weight, given, dropout_p=dropout_p), wanted)
    assert fastlora.dispatch_counts()["reference"] == 4 and not fastlora.dispatch_counts()["fallbacks"]
    with torch.no_grad():
        torch.manual_seed(2)
        options = {"dropout_p": dropout_p, "bias": given["bias"]}
        assert torch.equal(
            fastlora.lora_linear(given["x"], layer.weight, given["lora_a"], given["lora_b"], 0.7, **options), wanted[0]
        )


@pytest.mark.parametrize("frozen", ["x", "lora_a", "lora_b", "bias"])
def test_each_gradient_may_be_left_out(frozen, monkeypatch):
    layer, given = make("nf4"), operands()
    given[frozen].requires_grad_(False)
    wanted = step(decoded(layer), given)
    calls, dequantize = [], QuantisedWeight.dequantize
    monkeypatch.setattr(QuantisedWeight, "dequantize", lambda self: calls.append(1) or dequantize(self))
    assert same(step(layer.weight, given), wanted)
    assert len(calls) == (1 if frozen == "x" else 2)  # the backward reads the weight for dX alone


@pytest.mark.parametrize("name, compiled", [("nf4 nested", False), ("float8", False), ("nf4 nested", True)])
def test_nothing_of_the_weights_size_is_saved(name, compiled):
    n = k = 64
    layer, given = make(name, torch.bfloat16, n, k), operands(torch.bfloat16, torch.float32, n, k, m=(4,))
    packed = fastlora.quantised(layer.weight)

    def call(x, weight, a, b):
        return fastlora.lora_linear(x, weight, a, b, 0.7)

    call = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    with SavedTensors([given["x"], given["lora_a"], given["lora_b"], *packed.tensors]) as saved:
        y = call(given["x"], layer.weight, given["lora_a"], given["lora_b"])
    assert 0 < saved.bytes <= 4 * R * 4 + 8, "S [4, R] alone is new"
    y.sum().backward()
    assert given["x"].grad.shape == (4, k)


@pytest.mark.parametrize("name", ["nf4 nested", "int8"])
def test_in_a_graph_of_torch_compile(name):
    layer, given = make(name), operands()
    wanted = step(decoded(layer), given)
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: step_forward(layer.weight, given), backend="aot_eager", fullgraph=True)
    y = compiled(given)
    assert same((y, *torch.autograd.grad(y.pow(2).sum(), list(given.values()))), wanted)
    with torch.no_grad():
        assert torch.equal(compiled(given), wanted[0])


def test_gradients_of_gradients_and_transforms():
    layer, given = make("nf4 nested"), operands()
    found = []
    for weight in (layer.weight, decoded(layer)):
        y = step_forward(weight, given)
        dx, da = torch.autograd.grad(y.pow(3).sum(), (given["x"], given["lora_a"]), create_graph=True)
        found.append(torch.autograd.grad((dx.pow(2).sum() + da.pow(2).sum()), list(given.values()), retain_graph=True))
    assert same(*found)

    def loss(x, weight):
        return step_forward(weight, {**given, "x": x}).pow(2).sum()

    rows = torch.randn(3, *y.shape)
    batched = []
    for weight in (layer.weight, decoded(layer)):
        y = step_forward(weight, given)
        batched.append(torch.autograd.grad(y, list(given.values()), rows, is_grads_batched=True))
    assert same(*batched)

    per_sample = [
        torch.func.vmap(torch.func.grad(lambda x, w=w: loss(x, w)))(given["x"]) for w in (layer.weight, decoded(layer))
    ]
    torch.testing.assert_close(*per_sample)
    assert fastlora.dispatch_counts()["fallbacks"]["torch.func transform"] >= 2


def test_autocast_and_jagged_inputs():
    layer, given = make("nf4"), operands()
    with torch.autocast("cpu", torch.bfloat16):
        y = step_forward(layer.weight, given)
        wanted = step_forward(fastlora.quantised(layer.weight, torch.bfloat16).dequantize(), given)
    assert y.dtype == torch.bfloat16 and torch.equal(y, wanted)
    rows = [torch.randn(2, K), torch.randn(3, K)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    found = step_forward(layer.weight, {**given, "x": nested}).values()
    torch.testing.assert_close(found, step_forward(decoded(layer), {**given, "x": torch.cat(rows)}))


def test_selective_checkpointing_sees_one_op():
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    layer, given = make("nf4"), operands()
    wanted = step(decoded(layer), given)
    save = [torch.ops.fastlora.lora_forward_quantised.default]
    y = checkpoint(
        lambda: step_forward(layer.weight, given),
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(save),
    )
    assert same((y, *torch.autograd.grad(y.pow(2).sum(), list(given.values()))), wanted)


def test_the_flops_are_those_of_the_dense_layer():
    from torch.utils.flop_counter import FlopCounterMode

    layer, given = make("nf4"), operands()
    counted = []
    for weight in (layer.weight, decoded(layer)):
        with FlopCounterMode(display=False) as counter:
            step_forward(weight, given).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 2 * 10 * N * K


def test_an_input_that_is_modified_afterwards():
    layer, given = make("nf4", n=K), operands(n=K)
    h = given["x"] * 1
    h += fastlora.lora_linear(h, layer.weight, given["lora_a"], given["lora_b"], 0.7, copy_input=True)
    h.sum().backward()
    h = given["x"] * 1
    h += fastlora.lora_linear(h, layer.weight, given["lora_a"], given["lora_b"], 0.7)
    with pytest.raises(RuntimeError, match="over a nf4 weight .* write x = x"):
        h.sum().backward()


def test_what_is_no_usable_weight_is_refused_with_the_remedy():
    bnb, given = bitsandbytes(), operands()

    def refused(weight, error, message):
        with pytest.raises(error, match=message):
            step_forward(weight, given)

    def broken(**changes):
        weight = make("nf4 nested").weight
        for name, value in changes.items():
            setattr(weight.quant_state, name, value)
        return weight

    refused(bnb.nn.Params4bit(torch.randn(N, K), False), ValueError, r"not quantised yet.*layer.to\(device\)")
    weight = make("nf4").weight
    weight.quant_state = None
    refused(weight, ValueError, "lost its quant_state.*load")
    refused(broken(quant_type="int4"), ValueError, "quant_type 'int4'; nf4 and fp4")
    refused(broken(blocksize=48), ValueError, "block size 48; bitsandbytes has 32")
    refused(broken(blocksize=32), ValueError, "bytes of codes and 15 scales.*blocks of 32")
    refused(broken(shape=torch.Size((N, K - 2))), ValueError, "quantise the whole weight anew")
    refused(broken(packing_format_for_cpu=True), ValueError, "CPU inference.*reload")
    weight = make("nf4 nested").weight
    weight.quant_state.state2.code = weight.quant_state.state2.code[:16]
    refused(weight, ValueError, "nested statistics of another code")
    refused(fastlora.quantised(make("nf4").weight, torch.bfloat16), TypeError, "decoded to torch.bfloat16.*autocast")
    refused(make("nf4", n=N + 1).weight, ValueError, r"shapes do not fit.*weight \[25, 40\]")
    given = {name: tensor.detach().double() for name, tensor in given.items()}
    refused(make("nf4").weight, ValueError, "not to torch.float64")
    with pytest.raises(TypeError, match="a Tensor is no quantised weight"):
        fastlora.quantised(torch.randn(N, K))


@pytest.mark.filterwarnings("ignore:Deprecation")
def test_weights_that_quantise_the_input_are_refused():
    ao = torchao()
    layer = nn.Linear(K, N)
    ao.quantize_(layer, ao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(TypeError, match="quantises the layer's input as well"):
        step_forward(layer.weight, operands())


def test_decoding_in_front_of_a_gpus_launch_is_counted(monkeypatch):
    packed = fastlora.quantised(make("nf4").weight)
    monkeypatch.setattr(QuantisedWeight, "device", torch.device("cuda"))
    fastlora.reset_dispatch_counts()
    quantised_layer._decoded(packed)
    assert fastlora.dispatch_counts()["fallbacks"] == {"nf4 base: decoded in front of the launch": 1}


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    packed = fastlora.quantised(make("nf4").weight)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="bitsandbytes decodes a nf4 weight: pip install bitsandbytes"):
        packed.dequantize()
