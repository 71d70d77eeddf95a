"""The launcher of DoRA layers: which calls it serves and why not others, and what it compiles where."""

import dataclasses
import itertools

import pytest
import torch

import fastlora
from fastlora import routes, scaled_operands, selection
from fastlora.backends import composed, reference
from fastlora.backends.configs import FUSED_RANK, TILE_TABLES, table_for
from fastlora.backends.cuda import extension
from fastlora.backends.cuda import launch as cuda
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as triton_lora
from fastlora.backends.triton import scaled_launch
from fastlora.problem import BackwardOperands, ForwardOperands, Needs, ScaledBackward, ScaledForward
from tests.support.compile_gate import MORE_ARCHITECTURES, assert_fits, expected_instruction
from tests.support.compile_target import compile_for
from tests.support.specialisations import asked_for
from tests.support.triton_checks import ALL, needs_compiler


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def described(needs: Needs | None = None, m=256, n=64, k=128, r=16, dtype=torch.bfloat16, trains=True, **changed):
    """Operands of a call on "meta", and their description."""
    x, dy, weight, a, b, s = (meta(*shape, dtype=dtype) for shape in ((m, k), (m, n), (n, k), (r, k), (n, r), (m, r)))
    shared = {"weight": weight, "lora_a": a, "lora_b": b, "scaling": 2.0, "dropout_p": 0.0, "seed": None}
    factors = {"magnitude": meta(n, dtype=torch.float32), "norm": meta(n, dtype=torch.float32)}
    factors |= {name: changed.pop(name) for name in factors.keys() & changed.keys()}
    if needs is None:
        layer = ForwardOperands(x=x, bias=meta(n, dtype=dtype), **(shared | changed))
        return scaled_operands.describe_forward(ScaledForward(layer, **factors, keeps_unscaled=trains))
    unscaled = meta(m, n, dtype=dtype) if trains else None
    backward = BackwardOperands(dy=dy, x=x, s=s, **(shared | changed))
    return scaled_operands.describe_backward(ScaledBackward(backward, **factors, unscaled=unscaled), needs)


def test_no_other_backend_takes_a_layer_whose_columns_are_scaled():
    """They would leave the scale out."""
    for needs in (None, ALL):
        spec = described(needs)[1]
        assert scaled_launch.why_unsupported(spec) is None
        for backend in (triton_lora, composed, reference):
            assert "scales the columns of Y" in backend.why_unsupported(spec)
        assert selection.serving_module("triton", spec) is scaled_launch
        with pytest.raises(ValueError, match="cannot serve this call: reference: no code scales the columns"):
            selection.select_backend(spec, "reference")


@pytest.mark.skipif(extension.load()[0] is None, reason=f"CUDA extension: {extension.load()[1]}")
def test_the_cuda_backend_refuses_it():
    spec = described()[1]
    assert cuda.why_not_compiled(spec) == "no kernel scales the columns of Y"
    assert cuda.why_not_compiled(spec._replace(column_scale=None)) is None


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"magnitude": meta(64, dtype=torch.float64)}, "a magnitude of torch.float64"),
        ({"norm": meta(64, dtype=torch.float64)}, "a norm of torch.float64"),
        ({"dropout_p": 0.1, "seed": torch.tensor(1)}, "no kernel scales columns with dropout"),
        ({"r": 300}, "rank 300 is above 256"),
    ],
    ids=str,
)
def test_what_is_not_served_says_why(changed, reason):
    for needs in (None, ALL):
        assert reason in scaled_launch.why_unsupported(described(needs, **changed)[1])


def test_a_call_is_empty_where_nothing_is_asked_for():
    none = Needs(False, False, False, False)
    assert described(none, trains=False)[1].is_empty and not described(none, trains=True)[1].is_empty


def test_a_key_says_all_that_a_description_reads():
    keys = {scaled_operands.forward_key(described()[0]), scaled_operands.backward_key(described(ALL)[0], ALL)}
    for changed in (
        {"magnitude": meta(64)},
        {"trains": False},
        {"magnitude": meta(128, dtype=torch.float32)[::2]},
    ):
        keys.add(scaled_operands.forward_key(described(**changed)[0]))
        keys.add(scaled_operands.backward_key(described(ALL, **changed)[0], ALL))
    assert len(keys) == 6, "a strided magnitude is made contiguous: described as the first"


@needs_compiler
def test_one_kernel_for_any_number_of_rows(monkeypatch):
    """Where sums are of one step as of several, with dX and without."""
    config = dataclasses.replace(TILE_TABLES["hopper"][1], fused=False)  # without dX nothing is fused
    monkeypatch.setattr(scaled_launch, "target_of", lambda device: Target(90, n_sms=132))
    with asked_for(90) as found:
        for m, dx in itertools.product((600, 2048, 9000), (True, False)):
            for needs in (None, Needs(dx, True, True, True)):
                operands, spec = described(needs, m=m, n=512, k=512)
                scaled_launch.prepare(spec, config).compile(operands)
    assert sorted(name for name, _ in found) == ["scaled_backward_kernel", "scaled_forward_kernel"]


@needs_compiler
def test_what_a_warm_up_compiles(monkeypatch):
    """Of a layer that trains: forwards that keep Z and that do not, a backward; with dropout, what is evaluated."""
    monkeypatch.setattr(selection, "why_unsupported", lambda name, spec: None)
    monkeypatch.setattr(scaled_launch, "target_of", lambda device: Target(90, n_sms=132))
    found = {}
    for dropout in (0.0, 0.1):
        options = {"r": 16, "dora": True, "dropout": dropout, "dtype": torch.bfloat16, "device": "meta"}
        routes.forget_routes()
        with asked_for(90) as asked:
            fastlora.warmup(fastlora.LoRALinear(512, 512, **options), 2048, backend="triton")
        found[dropout] = sorted(name for name, _ in asked)
    routes.forget_routes()
    assert found[0.0] == ["scaled_backward_kernel", "scaled_forward_kernel", "scaled_forward_kernel"]
    assert found[0.1] == ["scaled_forward_kernel"]


def tiles():
    """The tiles of the tables by architecture. That of sm_90 and sm_80 meet the gate where they run, in
    test_scaled_ptx.py."""
    for arch, (name, table) in itertools.product((100, *MORE_ARCHITECTURES), TILE_TABLES.items()):
        dtype = torch.float32 if name.startswith("float32") else torch.bfloat16
        large_rank, few_rows, aligned = (
            name.endswith(" large-rank"),
            name.endswith(" few rows"),
            "unaligned" not in name,
        )
        rank = 256 if large_rank else FUSED_RANK
        if table_for(arch, rank, dtype.itemsize, aligned, few_rows) == name:
            for config, needs in itertools.product(table, (None,) if few_rows else (None, ALL)):
                label = (
                    f"sm_{arch}-{name}-{config.block_m}x{config.block_n}-{'forward' if needs is None else 'backward'}"
                )
                yield pytest.param(arch, config, needs, rank, dtype, aligned, id=label)


@needs_compiler
@pytest.mark.sweep
@pytest.mark.parametrize("arch, config, needs, rank, dtype, aligned", list(tiles()))
def test_shipped_tiles_on_other_architectures(monkeypatch, arch, config, needs, rank, dtype, aligned):
    monkeypatch.setattr(scaled_launch, "target_of", lambda device: Target(arch, n_sms=132))
    m, n, k = (4096, 4096, 4096) if aligned else (4001, 4003, 4005)
    operands, spec = described(needs, m, n, k, rank, dtype)
    with compile_for(arch) as driver:
        scaled_launch.prepare(spec, config)(operands)
    assert_fits(driver.launched[-1].kernel, arch, expected_instruction(arch, config, dtype))
