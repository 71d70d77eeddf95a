"""The CUDA backend without a device: what it refuses, which tiles it chooses, how it fails, how it is built."""

import functools
import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cuda_resources import toolkit
from fastlora.backends.cuda import extension, tiles
from fastlora.backends.cuda import launch as cuda
from fastlora.problem import Aligned, LaunchSpec, Sizes

needs_extension = pytest.mark.skipif(extension.load()[0] is None, reason=f"{extension.load()[1]}")


def spec(m=128, n=64, k=64, r=8, dtype=torch.bfloat16, direction="forward", **changes) -> LaunchSpec:
    return LaunchSpec(direction, Sizes(m, n, k, r), dtype, (dtype, dtype), torch.device("cuda", 0), **changes)


@needs_extension
@pytest.mark.parametrize(
    "changes, reason",
    (
        ({"dtype": torch.float32}, "dtype torch.float32 is not float16 or bfloat16"),
        ({"r": 264}, "rank 264 is above 256"),
        ({"r": 72, "base_format": "transposed"}, "rank 72 is above 64 over a transposed base weight"),
        ({"base_format": "nf4"}, "no kernel for a nf4 base weight with a single branch"),
        ({"branch": "segments"}, "no kernel for a dense base weight with a segments branch"),
        ({"r": 1}, "rank 1 must be multiples of 8"),
        ({"n": 33}, "out_features 33"),
        ({"k": 100}, "in_features 100"),
        ({"aligned": Aligned(True, True, True, False, True)}, "does not start on 16 bytes"),
        ({"m": 2**31}, "does not fit 32 bits"),
    ),
)
def test_refusals_name_their_reason(changes, reason):
    assert reason in cuda.why_not_compiled(spec(**changes))


@needs_extension
def test_tensors_elsewhere_are_refused(monkeypatch):
    """Where there is a GPU: a launch would take a CPU tensor's address for one of the GPU's."""
    monkeypatch.setattr(cuda, "unusable", lambda device=None: None)
    assert cuda.why_unsupported(spec()) is None
    on_cpu = spec()._replace(device=torch.device("cpu"))
    assert cuda.why_unsupported(on_cpu) == "the tensors are on cpu"


@needs_extension
def test_each_device_has_its_own_capability(monkeypatch):
    """Two GPUs of a machine need not be alike."""
    capabilities = {torch.device("cuda", 0): (8, 0), torch.device("cuda", 1): (9, 0)}
    extension.variants()  # remembered before the extension's place is taken
    monkeypatch.setattr(extension, "load", lambda: (SimpleNamespace(device_count=lambda: 2), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    monkeypatch.setattr(cuda, "_capability", functools.lru_cache(cuda._capability.__wrapped__))
    assert "this device has 8.0" in cuda.why_unsupported(spec())
    assert cuda.why_unsupported(spec()._replace(device=torch.device("cuda", 1))) is None
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert "this device has 8.0" in cuda.unusable()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert cuda.unusable() is None, "of the device that is current now"


@needs_extension
def test_that_there_is_no_device_is_not_remembered(monkeypatch):
    """Nor is an error. Each has its own reason, and none is an exception: then the next backend serves the call."""
    runtime = SimpleNamespace(device_count=lambda: 0, device_error=lambda: "cudaErrorSystemNotReady: not yet")
    state = {"available": False, "capability": RuntimeError("CUDA error: initialization\nhint")}

    def capability(device):
        if isinstance(state["capability"], Exception):
            raise state["capability"]
        return state["capability"]

    extension.variants()  # remembered before the extension's place is taken
    monkeypatch.setattr(extension, "load", lambda: (runtime, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state["available"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(cuda, "_capability", functools.lru_cache(cuda._capability.__wrapped__))
    assert cuda.why_unsupported(spec()) == "no CUDA device"
    state["available"] = True
    assert cuda.why_unsupported(spec()) == (
        "the extension's CUDA runtime finds no device (cudaErrorSystemNotReady: not yet)"
    )
    runtime.device_count = lambda: 1
    assert cuda.why_unsupported(spec()) == "the device cannot be used: CUDA error: initialization"
    state["capability"] = (9, 0)
    assert cuda.why_unsupported(spec()) is None


@needs_extension
def test_nothing_is_refused_without_a_reason():
    assert cuda.why_not_compiled(spec()) is None
    assert cuda.why_not_compiled(spec(dtype=torch.float16, r=256, m=1)) is None
    assert cuda.why_not_compiled(spec(base_format="transposed", r=64)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_the_backend_says_so():
    assert cuda.why_unsupported(spec())


@needs_extension
@pytest.mark.parametrize("dropout", (False, True))
@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("n, k", ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8, 8)))
@pytest.mark.parametrize("r, transposed", (*((r, False) for r in (8, 24, 64, 72, 256)), (8, True), (24, True)))
def test_every_choice_of_tile_can_be_launched(n, k, r, transposed, backward, dropout):
    """By a plan, which refuses what no kernel can do: a tile without a kernel, splits, a fused S."""
    for m in (1, 64, 128, 512, 2048, 16384):
        for n_sms in (1, 132):
            kernel = {"transposed": transposed, "dropout": dropout, "backward": backward}
            tile = tiles.choose_tile(m, n, k, r, n_sms, **kernel)
            extension.loaded().Plan(fp16=False, m=m, n=n, k=k, r=r, ctas=n_sms, **kernel, **vars(tile))


@needs_extension
def test_s_is_fused_only_where_the_kernel_can():
    """Beyond rank 64 no kernel has registers for both accumulators."""
    sizes = (16384, 14336, 4096)
    for dropout in (False, True):
        assert tiles.choose_tile(*sizes, 64, 132, dropout=dropout).fused
        assert not tiles.choose_tile(*sizes, 72, 132, dropout=dropout).fused
    assert tiles.choose_tile(*sizes, 64, 132, dropout=True, backward=True).fused


@needs_extension
def test_with_dropout_s_is_fused_unless_idle_multiprocessors_make_it():
    """Separate tiles of S take half as long as the product's; the kernels draw the mask beneath products."""
    assert not tiles.choose_tile(8192, 4096, 4096, 16, 132).fused
    assert tiles.choose_tile(8192, 4096, 4096, 16, 132, dropout=True).fused
    assert not tiles.choose_tile(8192, 4096, 4096, 16, 132, dropout=True, backward=True).fused
    # 896 tiles leave 28 of 7 waves' places empty, enough for 16 row blocks; 3080 leave 88 for 55, 1024 leave 32 for 64.
    assert not tiles.choose_tile(2048, 14336, 4096, 16, 132, dropout=True).fused
    assert [tiles.fuses_drawn(*each, 132) for each in ((16, 896), (28, 896), (29, 896), (64, 1024))] == [
        False, False, True, True
    ]  # fmt: skip


@needs_extension
def test_gradients_come_last_where_a_tile_takes_long():
    assert tiles.choose_tile(8192, 1024, 4096, 16, 132, backward=True).gradients_last
    assert not tiles.choose_tile(8192, 4096, 1024, 16, 132, backward=True).gradients_last
    assert not tiles.choose_tile(8192, 1024, 4096, 16, 132, backward=True, dropout=True).gradients_last
    assert not tiles.choose_tile(8192, 1024, 4096, 16, 132).gradients_last, "a forward has none"


@needs_extension
def test_choices_of_tile():
    """Large problems take the large tile; few rows take a small one, enough of them to busy the chip's memory."""
    large, short = tiles.CudaTile(128, 256, group_m=16), tiles.CudaTile(128, 256, group_m=8)
    for layer in ((16384, 4096, 4096, 16), (16384, 14336, 4096, 64)):
        assert tiles.choose_tile(*layer, 132) == replace(large, fused=True)
    # In few waves a wait for S would be felt.
    assert tiles.choose_tile(8192, 4096, 4096, 16, 132) == large
    assert tiles.choose_tile(2048, 4096, 4096, 16, 132) == short
    assert tiles.choose_tile(64, 4096, 4096, 72, 132) == short, "only the large tile is compiled beyond rank 64"
    few = tiles.choose_tile(16, 4096, 4096, 16, 132)
    assert few.block_m == 64 and (4096 // few.block_n) * few.splits > 100
    assert tiles.choose_tile(128, 4096, 4096, 16, 132).splits > 1
    with pytest.raises(ValueError, match="no CUDA kernel is compiled for rank 264"):
        tiles.choose_tile(128, 4096, 4096, 264, 132)
    assert tiles.choose_tile(8192, 3072, 768, 16, 132, transposed=True).block_n == 256
    assert tiles.choose_tile(16, 3072, 768, 16, 132, transposed=True).block_m == 64
    with pytest.raises(ValueError, match="no CUDA kernel over a transposed base weight is compiled for rank 72"):
        tiles.choose_tile(128, 4096, 4096, 72, 132, transposed=True)


@needs_extension
def test_what_is_compiled_is_what_the_list_says():
    """csrc/variants.def, for both directions and types, with and without dropout; in the loop of few rows' products,
    a forward without."""
    setup = toolkit.load_setup()
    text = (setup.CSRC / "variants.def").read_text()
    lines = re.findall(r"^FASTLORA_SM90(_SEGMENTS|_SHARED)?\((\d+), (\d+), (\d+), (\w+)Weight\)$", text, re.M)
    listed = {
        (
            call == "_SEGMENTS",
            call == "_SHARED",
            *map(int, sizes),
            weight == "Transposed",
            weight == "Decoded",
            backward,
            dtype,
            dropout,
        )
        for call, *sizes, weight in lines
        for backward in (False, True)
        for dtype in ("bfloat16", "float16")
        for dropout in ((False,) if call == "_SEGMENTS" else (False, True))
    }
    keys = ("segments", "shared", "block_m", "block_n", "rank", "transposed", "decodes", "backward", "dtype", "dropout")
    others = [variant for variant in extension.variants() if not variant["in_loop"]]
    assert {tuple(variant[key] for key in keys) for variant in others} == listed
    assert len(others) == len(listed)
    in_loop = {
        (False, False, *map(int, sizes), False, False, False, dtype, False)
        for sizes in re.findall(r"^FASTLORA_SM90_IN_LOOP\((\d+), (\d+), (\d+)\)$", text, re.M)
        for dtype in ("bfloat16", "float16")
    }
    found = [tuple(variant[key] for key in keys) for variant in extension.variants() if variant["in_loop"]]
    assert set(found) == in_loop and len(found) == len(in_loop) == 2


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_the_extension_loads_without_a_driver_and_a_launch_says_what_is_missing():
    module = extension.loaded()
    assert module.device_count() == 0
    plan = module.Plan(
        backward=False, fp16=False, dropout=False, block_m=64, block_n=128, group_m=4, splits=1, fused=False, ctas=4,
        m=64, n=64, k=64, r=8,
    )  # fmt: skip
    reason = r"no CUDA device \(cudaError\w+: .+\): cannot launch .*_bf16_64x128_r16 M=64 N=64 K=64 R=8"
    with pytest.raises(RuntimeError, match=reason):
        plan.bind((), scale_in_s=1.0)(0, 0)


@needs_extension
def test_the_extension_needs_neither_torch_nor_the_driver_library():
    path = extension.loaded().__file__
    code = (
        "import importlib.util as util\n"
        f"spec = util.spec_from_file_location('_C', {path!r})\n"
        "module = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(len(module.variants()))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(extension.variants())
    needed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed and "libtorch" not in needed


@needs_extension
def test_one_build_serves_every_python():
    """What it takes of Python is in the limited API, since Python 3.10 or before."""
    abi3info = pytest.importorskip("abi3info")
    path = Path(extension.loaded().__file__)
    assert path.name == "_C.abi3.so"
    symbols = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    used = [abi3info.models.Symbol(name) for name in re.findall(r"\bU (_?Py\w+)", symbols)]
    assert abi3info.models.Symbol("PyType_FromSpec") in used
    for symbol in used:
        found = abi3info.FUNCTIONS.get(symbol) or abi3info.DATAS.get(symbol)
        assert found and (found.added.major, found.added.minor) <= (3, 10), symbol


def test_the_build_takes_ninja_from_the_path_where_there_is_no_package(monkeypatch):
    setup = toolkit.load_setup()
    installed = importlib.util.find_spec
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name == "ninja" else installed(name))
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert setup.ninja_command() == ["/usr/bin/ninja"]
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install ninja"):
        setup.ninja_command()
