"""Values that are elsewhere: models that accelerate has offloaded, and parameters that are placeholders."""

import copy
import re

import pytest
import torch
from torch import nn

import fastlora
from fastlora.integrations.state_dicts import adapter_state_dict, load_adapter_state_dict
from fastlora.model import inject, lora_layers, merge, merge_and_unload, unmerge
from fastlora.module import LoRALinear
from tests.support import numerics

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")
CPU = torch.device("cpu")
TARGETS = ["0", "2", "4.1"]
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


TERMS = 6 + 9 + 9 + 9 + 7  # of the sums that an output passes through


def make_base():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 7, bias=False))
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), inner, nn.Linear(7, 3)).double()


def make_model(seed=1):
    """The base with trained branches, and what it gives for X."""
    model = make_base()
    inject(model, r"0|2|4\.1", r=2, alpha=6)
    torch.manual_seed(seed)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        return model.eval(), model(X)


def offload_disk(model, path):
    return accelerate.disk_offload(model, str(path / "offload"), execution_device=CPU)


def offload_map(model, path, **kwargs):
    devices = {"0": "cpu", "1": "disk", "2": "disk", "3": "cpu", "4": "disk", "5": "cpu"}
    return accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=str(path / "offload"), **kwargs)


def offload_chained(model, path):
    """Two hooks in one on every layer, as where a device map comes on top of another hook."""
    model = accelerate.cpu_offload(model, execution_device=CPU)
    for _, layer in lora_layers(model):
        layer._hf_hook = hooks.SequentialHook(hooks.ModelHook(), layer._hf_hook)
    return model


WAYS = {
    "cpu": lambda model, path: accelerate.cpu_offload(model, execution_device=CPU),
    "cpu, buffers": lambda model, path: accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True),
    "cpu, own state dict": lambda model, path: accelerate.cpu_offload(model, CPU, state_dict=dict(model.state_dict())),
    "disk": offload_disk,
    "device map": offload_map,
    "device map, buffers": lambda model, path: offload_map(model, path, offload_buffers=True),
    "chained": offload_chained,
}


@pytest.fixture(params=WAYS)
def offload(request, tmp_path):
    return lambda model: WAYS[request.param](model, tmp_path)


def close(actual, expected):
    numerics.assert_reordered([actual], [expected], TERMS)


@torch.no_grad()
def test_the_ways_offload(offload):
    model, expected = make_model()
    model = offload(model)
    assert any(layer.weight.is_meta for _, layer in lora_layers(model))
    assert torch.equal(model(X), expected)


@torch.no_grad()
@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(offload, safe, keep_base):
    model, expected = make_model()
    plain = make_base()
    whole = copy.deepcopy(model)
    model = offload(model)
    merge(model, safe=safe, keep_base=keep_base)
    merge(whole)
    for _ in range(2):  # the second call reads what the first one's hooks left
        close(model(X), expected)
        assert torch.equal(model(X), whole(X))
    with pytest.raises(AssertionError):
        close(model(X), plain(X))
    merge(model)  # once
    assert torch.equal(model(X), whole(X))
    unmerge(model)
    close(model(X), expected)
    if keep_base:
        assert torch.equal(model(X), expected)
    hooks.remove_hook_from_module(model, recurse=True)
    close(model(X), expected)


@torch.no_grad()
def test_offloading_a_merged_model(offload):
    model, expected = make_model()
    merge(model)
    model = offload(model)
    close(model(X), expected)
    unmerge(model)
    close(model(X), expected)
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(X), expected)


@torch.no_grad()
def test_hooks_taken_off_a_merged_model(offload):
    model, expected = make_model()
    model = offload(model)
    merge(model)
    hooks.remove_hook_from_module(model, recurse=True)
    close(model(X), expected)
    unmerge(model)
    assert torch.equal(model(X), expected)


@torch.no_grad()
def test_a_layer_that_is_loaded_for_the_moment(offload):
    model, expected = make_model()
    model = offload(model)
    for _, layer in lora_layers(model):
        hook = getattr(layer._hf_hook, "hooks", [layer._hf_hook])[-1]
        hook.pre_forward(layer)
        layer.merge()
        hook.post_forward(layer, None)
    close(model(X), expected)


@torch.no_grad()
def test_unloading(offload):
    model, expected = make_model()
    model = offload(model)
    assert merge_and_unload(model) is model
    assert not list(lora_layers(model)) and model.state_dict().keys() == make_base().state_dict().keys()
    for _ in range(2):
        close(model(X), expected)
    hooks.remove_hook_from_module(model, recurse=True)
    close(model(X), expected)
    plain = make_base()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(X), model(X))


@torch.no_grad()
def test_safe_merge_of_what_is_not_finite_changes_nothing(offload):
    model, _ = make_model()
    model[4][1].lora_A[0, 0] = float("inf")
    expected = model(X)
    model = offload(model)
    with pytest.raises(ValueError, match=r"not finite in 4\.1; nothing was merged"):
        merge(model, safe=True)
    assert torch.equal(model(X).nan_to_num(), expected.nan_to_num())


@torch.no_grad()
def test_adapters_are_saved_and_loaded(offload, tmp_path):
    model, expected = make_model()
    fastlora.save_adapter(model, tmp_path / "whole")
    state = adapter_state_dict(model)
    model = offload(model)
    fastlora.save_adapter(model, tmp_path / "offloaded")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "offloaded" / name).read_bytes()
    assert all(torch.equal(value, state[name]) for name, value in adapter_state_dict(model).items())
    other, before = make_model(seed=2)
    assert not torch.allclose(before, expected)
    (tmp_path / "again").mkdir()
    other = WAYS["device map"](other, tmp_path / "again")
    fastlora.load_adapter(other, tmp_path / "offloaded")
    for _ in range(2):
        assert torch.equal(other(X), expected)
    load_adapter_state_dict(other, {name: 2 * value if "lora_B" in name else value for name, value in state.items()})
    assert not torch.allclose(other(X), expected)
    load_adapter_state_dict(other, state)
    assert torch.equal(other(X), expected)


@torch.no_grad()
def test_others_tensors_are_left_alone(tmp_path):
    """accelerate's files and a state dict of the caller's may serve another model."""
    model, expected = make_model()
    given = {name: value.clone() for name, value in model.state_dict().items()}
    before = copy.deepcopy(given)
    first = accelerate.cpu_offload(copy.deepcopy(model), CPU, state_dict=given)
    second = offload_disk(copy.deepcopy(model), tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "offload").iterdir()}
    for offloaded in (first, second):
        merge(offloaded)
        unmerge(offloaded)
        merge(offloaded, keep_base=False)
        fastlora.save_adapter(offloaded, tmp_path / "adapter")
    assert all(torch.equal(value, before[name]) for name, value in given.items())
    assert files == {path: path.read_bytes() for path in (tmp_path / "offload").iterdir()}


@torch.no_grad()
def test_a_single_offloaded_layer():
    torch.manual_seed(0)
    layer = LoRALinear(6, 4, r=2).double()
    nn.init.normal_(layer.lora_B)
    expected = layer(X)
    layer = accelerate.cpu_offload(layer, execution_device=CPU)
    weight = layer.merged_weight()
    layer.merge(safe=True)
    close(layer(X), expected)
    close(nn.functional.linear(X, weight, layer._hf_hook.hooks[-1].weights_map["bias"]), expected)


@torch.no_grad()
def test_hooks_that_only_move_inputs():
    """A layer that has its values and a hook: merging and unloading keep the hook."""
    model, expected = make_model()
    for _, layer in lora_layers(model):
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(CPU, io_same_device=True))
    merge_and_unload(model)
    close(model(X), expected)
    assert all(hasattr(model.get_submodule(name), "_hf_hook") for name in TARGETS)
    hooks.remove_hook_from_module(model, recurse=True)
    close(model(X), expected)
    inject(model, r"0|2|4\.1", r=2)  # plain layers again
    close(model(X), expected)


def everything(model, tmp_path):
    """Every call that reads or replaces a layer's values, by the verb of its message."""
    return {
        "merge": lambda: merge(model),
        "merge safe": lambda: merge(model, safe=True),
        "merge and unload": lambda: merge_and_unload(model),
        "save": lambda: fastlora.save_adapter(model, tmp_path / "refused"),
        "read": lambda: adapter_state_dict(model),
    }


def assert_all_refused(model, tmp_path, match):
    for verb, call in everything(model, tmp_path).items():
        with pytest.raises(ValueError, match=rf"cannot {verb.split()[0]} .*{match}"):
            call()
    assert not (tmp_path / "refused").exists()
    assert not any(layer.merged for _, layer in lora_layers(model))


def test_a_hook_of_the_parent_is_refused(tmp_path):
    """Nothing at the layer says where its values are, and the parent's hook would undo what is written there."""
    trained, _ = make_model()
    fastlora.save_adapter(trained, tmp_path / "adapter")
    model, expected = make_model(seed=2)
    hooks.add_hook_to_module(model[4], hooks.AlignDevicesHook(CPU, offload=True, place_submodules=True))
    assert_all_refused(model, tmp_path, r"4\.1: .* on the meta device.*remove_hook_from_module")
    state = adapter_state_dict(trained)
    with pytest.raises(ValueError, match=r"cannot load into 4\.1: .*meta device"):
        fastlora.load_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"cannot load into 4\.1: .*meta device"):
        load_adapter_state_dict(model, state)
    hooks.remove_hook_from_module(model, recurse=True)  # the remedy
    assert torch.equal(model(X), expected)
    merge(model)
    close(model(X), expected)


def test_an_adapter_for_an_offloaded_base_is_refused_with_the_remedy(tmp_path):
    model, expected = make_model()
    fastlora.save_adapter(model, tmp_path / "adapter")
    base = WAYS["disk"](make_base(), tmp_path)
    with pytest.raises(ValueError, match="carries hooks.*remove them first.*device maps"):
        fastlora.load_adapter(base, tmp_path / "adapter")
    hooks.remove_hook_from_module(base, recurse=True)  # the remedy
    fastlora.load_adapter(base, tmp_path / "adapter")
    (tmp_path / "again").mkdir()  # accelerate would take the files in the old place for this model's
    with torch.no_grad():
        assert torch.equal(base.eval()(X), expected)
        assert torch.equal(WAYS["disk"](base, tmp_path / "again")(X), expected)


def test_parameters_on_meta_are_refused(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    inject(model, ["0", "2"], r=2)
    assert_all_refused(
        model, tmp_path, r"0, 2: (weight|lora_A) is on the meta device, which holds no values: load them"
    )
    with pytest.raises(ValueError, match="is on the meta device"):
        model[0].merge()
    with pytest.raises(ValueError, match="cannot load into"):
        shapes = {name: p.shape for name, p in model.named_parameters() if "lora" in name}
        load_adapter_state_dict(model, {name: torch.zeros(shape) for name, shape in shapes.items()})


def test_meta_adapters_over_real_weights_are_refused(tmp_path):
    model, _ = make_model()
    model[2].lora_B = nn.Parameter(model[2].lora_B.to("meta"))
    assert_all_refused(model, tmp_path, "2: lora_B is on the meta device")
    assert torch.equal(model[0].weight, make_base()[0].weight)  # the layers before it, too


def partition(parameter):
    """What DeepSpeed makes of a parameter in stage 3: a tensor without elements, and these attributes."""
    parameter.ds_id, parameter.ds_shape, parameter.ds_tensor = 3, parameter.shape, parameter.detach().flatten()
    parameter.data = torch.empty(0, dtype=parameter.dtype)


def test_zero_3_is_refused(tmp_path):
    model, _ = make_model()
    fastlora.save_adapter(model, tmp_path / "adapter")
    whole = {name: (p, p.data) for name, p in model.named_parameters()}
    for p in model.parameters():
        partition(p)
    assert_all_refused(model, tmp_path, r"0, 2, 4\.1: DeepSpeed ZeRO-3 partitions")
    with pytest.raises(ValueError, match="cannot load into.*GatheredParameters"):
        fastlora.load_adapter(model, tmp_path / "adapter")
    for p, data in whole.values():
        p.data = data
    fastlora.save_adapter(model, tmp_path / "gathered")
    weights = [(tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("adapter", "gathered")]
    assert weights[0] == weights[1]
    with pytest.raises(ValueError, match="ZeRO-3 partitions weight"):  # gathered, but the shards would stay as they are
        merge(model)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(tmp_path, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, _ = make_model()
        fastlora.save_adapter(model, tmp_path / "adapter")
        for parameter in model.parameters():  # FSDP1 without original parameters wants one requires_grad for all
            parameter.requires_grad_(True)
        model = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=CPU)
        for call in (lambda: merge(model), lambda: merge_and_unload(model), lambda: merge(model, safe=True)):
            with pytest.raises(ValueError, match=r"cannot merge 0, 2, 4\.1: .*FSDP1.*gather"):
                call()
        with FullyShardedDataParallel.summon_full_params(model):
            fastlora.save_adapter(model.module, tmp_path / "summoned")
            with pytest.raises(ValueError, match="cannot merge .*FSDP1"):
                merge(model)
        weights = [(tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("adapter", "summoned")]
        assert weights[0] == weights[1]
    finally:
        torch.distributed.destroy_process_group()


def test_freed_storage_and_foreign_shapes_are_refused(tmp_path):
    model, _ = make_model()
    model[0].weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"cannot merge 0: FSDP1 holds the value of weight"):
        merge(model)
    model, _ = make_model()
    model[2].lora_A.data = model[2].lora_A.data.flatten()
    assert_all_refused(model, tmp_path, r"2: lora_A is a placeholder of shape \[18\], not")


def test_a_weight_that_is_computed_is_refused(tmp_path):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    model, _ = make_model()
    torch.nn.utils.parametrize.register_parametrization(model[2], "weight", Halved(), unsafe=True)
    expected = model(X)
    with pytest.raises(ValueError, match="cannot merge 2: weight is no parameter .* remove the parametrization"):
        merge(model)
    assert torch.equal(model(X), expected)
    fastlora.save_adapter(model, tmp_path)  # A and B are their own


def test_tied_weights_are_refused():
    """A parameter that another module holds as well would change there."""
    model, expected = make_model()
    model.append(nn.Linear(9, 9))
    model[-1].weight = model[2].weight
    with pytest.raises(ValueError, match=re.escape("tied: 2.weight and 6.weight; give the layer a weight of its own")):
        merge(model)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())  # the remedy
    merge(model)
    with torch.no_grad():
        close(model[:6](X), expected)
    assert torch.equal(model[-1].weight, make_base()[2].weight)


def test_a_shared_weight_sharded_after_merging_is_not_unmerged():
    model, _ = make_model()
    merge(model)
    model[0].weight.data = torch.empty(0, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot unmerge 0: weight is a placeholder"):
        unmerge(model)
    assert model[2].merged and model[4][1].merged
