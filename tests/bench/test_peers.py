"""Every variant computes the layer it claims to, and a wrong one is never timed."""

import weakref
from dataclasses import replace

import pytest
import torch

from fastlora.bench import decompositions, layer
from fastlora.bench.cases import LayerCase
from fastlora.bench.correctness import WrongResult, check_variant
from fastlora.bench.cost import pass_cost
from fastlora.bench.layer import build_variants, make_stage, measure_layer, random_tensors
from fastlora.bench.peers import (
    FASTLORA,
    FROZEN,
    NF4_BYTES,
    ORDINARY,
    STORED_S,
    Peer,
    _fastlora_backend,
    _from_function,
    find_peer,
)

UNCOMPILED = [peer for peer in (FROZEN, FASTLORA, STORED_S, *ORDINARY) if peer.name != "compiled peft"]
PEAKS = {"copy_gbs": 10.0, "matmul_tflops": {"float32": 0.1}}


def tensors_of(case):
    return random_tensors(case, "cpu", torch.Generator().manual_seed(3))


def check(peer, case):
    tensors = tensors_of(case)
    built = peer.build(case, tensors)
    check_variant(peer, built, case, tensors)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("peer", UNCOMPILED, ids=lambda peer: peer.name)
def test_every_variant_is_right(peer, dropout):
    case = LayerCase(37, 29, 43, 5, dropout, "float32")
    if peer.refuses(case):
        pytest.skip(peer.refuses(case))
    try:
        check(peer, case)
    except ImportError as error:
        pytest.skip(f"peer not installed: {error}")


@pytest.mark.parametrize("sizes", [(2, 40, 40, 16), (400, 8, 8, 4), (64, 8, 200, 30)])
def test_runlora_is_right_in_whichever_order_it_chooses(sizes):
    check(find_peer("runlora order"), LayerCase(*sizes, 0.0, "float32"))


def broken(change):
    """A variant whose gradients are changed by ``change(dx, da, db)``."""

    class Broken(decompositions.StoredS):
        @staticmethod
        def backward(ctx, dy):
            dx, _, da, db, _ = decompositions.StoredS.backward(ctx, dy)
            dx, da, db = change(dx, da, db)
            return dx, None, da, db, None

    return Peer("broken", _from_function(Broken.apply, False), "stand-in")


DEFECTS = {
    "dA negated": lambda dx, da, db: (dx, -da, db),
    "dA unscaled": lambda dx, da, db: (dx, da / 1.5, db),
    "dB negated": lambda dx, da, db: (dx, da, -db),
    "dB unscaled": lambda dx, da, db: (dx, da, db / 1.5),
    "dX lost": lambda dx, da, db: (torch.zeros_like(dx), da, db),
    "a NaN": lambda dx, da, db: (dx.masked_fill(torch.arange(dx.shape[1]) == 0, float("nan")), da, db),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_wrong_gradient_is_found(defect):
    with pytest.raises(WrongResult, match="broken: (dx|lora_a|lora_b) is off"):
        check(broken(DEFECTS[defect]), LayerCase(37, 29, 43, 5, 0.0, "float32"))


def without_branch(x, weight, lora_a, lora_b, scaling, dropout_p):
    return torch.nn.functional.linear(x, weight) + 0 * (lora_a.sum() + lora_b.sum())


def without_scaling(x, weight, lora_a, lora_b, scaling, dropout_p):
    return decompositions.eager(x, weight, lora_a, lora_b, 1.0, dropout_p)


def without_dropout(x, weight, lora_a, lora_b, scaling, dropout_p):
    return decompositions.eager(x, weight, lora_a, lora_b, scaling, 0.0)


@pytest.mark.parametrize("function", [without_branch, without_scaling, without_dropout])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_output_is_found(function, dtype):
    peer = Peer("broken", _from_function(function), "stand-in")
    with pytest.raises(WrongResult, match="broken: y is off|broken: dx is off|broken: lora_a is off"):
        check(peer, LayerCase(64, 48, 32, 8, 0.5, dtype))


def with_own_mask(function):
    """A variant whose mask nobody knows, drawn by ``function(x, p)``: what it drops, as 0, and 1 elsewhere."""

    def layer_of(x, weight, lora_a, lora_b, scaling, dropout_p):
        dropped = x * function(x, dropout_p) / (1 - dropout_p)
        return decompositions.eager(dropped, weight * 0, lora_a, lora_b, scaling, 0.0) + x @ weight.t()

    return Peer("own", _from_function(layer_of), "package", mask=None)


def own_mask(x, dropout_p):
    return (torch.rand(x.shape[1], x.shape[0]).t() >= dropout_p).to(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_a_mask_that_nobody_knows_is_read_from_the_variant(dropout, dtype):
    check(with_own_mask(own_mask), LayerCase(37, 29, 43, 5, dropout, dtype))


def seedless_mask(x, dropout_p):
    return (torch.rand(x.shape, generator=SEEDLESS) >= dropout_p).to(x.dtype)


SEEDLESS = torch.Generator().manual_seed(5)
WRONG_DROPOUT = {
    "wrong scaling": (_from_function(lambda *a: decompositions.eager(*a[:4], 7 * a[4], a[5])), "y is off"),
    "no dropout": (_from_function(lambda *a: decompositions.eager(*a[:5], 0.0)), "drops 0.0000 of the elements"),
    "half as much": (with_own_mask(lambda x, p: own_mask(x, p / 2)).build, "of the elements where 0.5 were asked for"),
    "kept but scaled": (with_own_mask(lambda x, p: torch.ones_like(x)).build, "drops 0.0000 of the elements"),
    "a seed of its own": (with_own_mask(seedless_mask).build, "cannot be checked"),
}


@pytest.mark.parametrize("defect", WRONG_DROPOUT)
def test_wrong_dropout_of_a_variant_with_its_own_mask_is_found(defect):
    build, message = WRONG_DROPOUT[defect]
    with pytest.raises(WrongResult, match=message):
        check(Peer("own", build, "package", mask=None), LayerCase(64, 48, 32, 8, 0.5, "float32"))


def absent(case, tensors):
    raise ImportError("No module named 'absent'")


def crashing(case, tensors):
    raise RuntimeError("no kernel\nimage")


def test_missing_and_failing_peers_are_listed_and_the_rest_is_measured():
    case = LayerCase(8, 8, 8, 2, 0.1, "float32")
    peers = [FROZEN, FASTLORA, STORED_S, Peer("absent", absent, "package"), Peer("crashing", crashing, "package")]
    built, missing = build_variants(case, peers, tensors_of(case))
    assert list(built) == ["frozen", "fastlora"]
    assert missing == {
        "autograd.Function": "no dropout",
        "absent": "not installed: No module named 'absent'",
        "crashing": "RuntimeError: no kernel image",
    }


def test_a_wrong_peer_is_listed_but_wrong_code_of_ours_stops_the_run():
    case = LayerCase(37, 29, 43, 5, 0.0, "float32")
    wrong = broken(DEFECTS["dA negated"])
    built, missing = build_variants(case, [FROZEN, wrong], tensors_of(case))
    assert "broken" not in built and "WrongResult" in missing["broken"]
    for kind in ("ours", "backend"):
        with pytest.raises(WrongResult):
            build_variants(case, [FROZEN, replace(wrong, kind=kind)], tensors_of(case))


def failing_later(calls):
    """A variant that is right for so many calls and fails from then on."""
    left = iter(range(calls))

    def function(x, weight, lora_a, lora_b, scaling, dropout_p):
        if next(left, None) is None:
            raise RuntimeError("no more")
        return decompositions.eager(x, weight, lora_a, lora_b, scaling, dropout_p)

    return Peer("failing later", _from_function(function), "package")


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_a_peer_that_fails_after_its_check_is_listed_and_the_rest_is_measured(calls, monkeypatch):
    monkeypatch.setattr(layer, "MAX_SETS", 3)
    case = LayerCase(8, 8, 8, 2, 0.0, "float32")
    rows, missing = measure_layer(case, [FASTLORA, failing_later(calls)], "cpu", PEAKS, seconds=0.0)
    assert {row["variant"] for row in rows} == {"frozen", "fastlora"}
    assert missing == {"failing later": "RuntimeError: no more"}


def test_a_step_leaves_nothing_behind():
    """What is left would be counted into the next step's peak, and freed within it."""
    case = LayerCase(8, 8, 8, 2, 0.0, "float32")
    tensors, outputs = tensors_of(case), []

    def function(x, weight, lora_a, lora_b, scaling, dropout_p):
        y = decompositions.eager(x, weight, lora_a, lora_b, scaling, dropout_p)
        outputs.append(weakref.ref(y))
        return y

    stage = make_stage(_from_function(function)(case, tensors), tensors)
    stage.prepare()
    stage.forward()
    assert outputs[0]() is not None
    stage.backward()
    assert outputs[0]() is None


def test_a_backend_that_cannot_serve_a_case_is_listed():
    case = LayerCase(8, 8, 8, 2, 0.0, "float32")
    cuda = Peer("fastlora[cuda]", _fastlora_backend("cuda"), "backend", mask="fastlora")
    reference = Peer("fastlora[reference]", _fastlora_backend("reference"), "backend", mask="fastlora")
    built, missing = build_variants(case, [FROZEN, cuda, reference], tensors_of(case))
    assert list(built) == ["frozen", "fastlora[reference]"]
    assert "cannot serve this call" in missing["fastlora[cuda]"]


def test_rows_of_a_case_agree_with_each_other(monkeypatch):
    monkeypatch.setattr(layer, "CPU_CACHE_BYTES", 1)
    case = LayerCase(24, 16, 32, 4, 0.0, "float32")
    rows, missing = measure_layer(case, [FASTLORA, STORED_S], "cpu", PEAKS, seconds=0.0)
    assert missing == {}
    assert [(row["variant"], row["pass"]) for row in rows] == [
        (variant, which)
        for variant in ("frozen", "fastlora", "autograd.Function")
        for which in ("forward", "backward", "step")
    ]
    for row in rows:
        frozen = next(r for r in rows if (r["variant"], r["pass"]) == ("frozen", row["pass"]))
        assert row["ratio_to_frozen"] == row["median_us"] / frozen["median_us"]
        assert row["tflops"] > 0 and row["gbs"] > 0 and row["launches"] > 0
    saved = {row["variant"]: row["saved_bytes"] for row in rows if row["pass"] == "step"}
    assert saved["frozen"] == 0
    x_and_s = 4 * (24 * 32 + 24 * 4)
    assert saved["autograd.Function"] == x_and_s
    assert 0 < saved["fastlora"] <= x_and_s


def test_users_own_peers_are_found_by_module_and_function(monkeypatch, tmp_path):
    (tmp_path / "own_lora.py").write_text(
        "from torch.nn.functional import linear\n"
        "def build(weight, lora_a, lora_b, scaling, dropout_p):\n"
        "    return lambda x: linear(x, weight) + scaling * linear(linear(x, lora_a), lora_b)\n"
    )
    (tmp_path / "half_lora.py").write_text("def build(:\n")
    (tmp_path / "bare_lora.py").write_text("raise RuntimeError('needs a GPU')\n")
    (tmp_path / "no_lora.py").write_text("build = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    check(find_peer("own_lora:build"), LayerCase(9, 8, 7, 3, 0.0, "float32"))
    for name, message in [
        ("nobody", "unknown peer 'nobody'"),
        ("own_lora:other", "cannot be loaded"),
        ("no_such_module_at_all:build", "cannot be loaded"),
        ("half_lora:build", "cannot be loaded: SyntaxError"),
        ("bare_lora:build", "cannot be loaded: RuntimeError: needs a GPU"),
        ("no_lora:build", "cannot be called: it is of type int"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_peer(name)


@pytest.mark.parametrize("name", ["unsloth", "lorafusion", "runlora"])
def test_real_packages_are_measured_or_listed_as_missing(name):
    case = LayerCase(8, 8, 8, 2, 0.0, "float32")
    built, missing = build_variants(case, [FROZEN, find_peer(name)], tensors_of(case))
    assert (name in built) != (name in missing)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["fastlora nf4", "peft nf4", "dequantise order nf4"])
def test_variants_over_a_quantised_weight_are_right(name, dropout):
    """Against the values that are decoded, and for every set of inputs, whose weight is another."""
    peer, case = find_peer(name), LayerCase(37, 29, 44, 5, dropout, "float32")
    if peer.refuses(case):
        pytest.skip(peer.refuses(case))
    pytest.importorskip("bitsandbytes")
    tensors = tensors_of(case)
    built = peer.build(case, tensors)
    check_variant(peer, built, case, tensors)
    other = random_tensors(case, "cpu", torch.Generator().manual_seed(4))
    check_variant(peer, built, case, other)
    assert not torch.equal(built.seen(other).weight, other.weight), "the weight is quantised"
    with pytest.raises(WrongResult, match="y is off"):
        built.seen = lambda tensors: tensors
        check_variant(peer, built, case, other)


def test_a_quantised_weight_moves_its_packed_bytes():
    case = LayerCase(8, 64, 256, 4)
    dense, packed = (pass_cost(case, "step", True, size) for size in (None, NF4_BYTES))
    assert dense.flops == packed.flops
    assert dense.bytes - packed.bytes == 2 * (2 * 64 * 256 - round(NF4_BYTES * 64 * 256))
