"""What inject refuses to put on experts, and that a refusal changes nothing."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastlora
from fastlora.experts_module import LoRAExperts
from tests.support.injected_experts import (
    EXPERTS,
    logits,
    make_injected,
    run,
    unchanged,
)
from tests.support.tiny_moe import PARAMETERS, make_moe, peft

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")


def give_nothing(model):
    return {}


def give_second_branch(model):
    fastlora.inject(model, None, target_parameters=["down_proj"])
    return {"target_parameters": ["gate_up_proj"]}


def give_peft(model):
    peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=PARAMETERS))
    return {"target_parameters": ["gate_up_proj"]}


def give_parametrization(model):
    parametrize.register_parametrization(model.get_submodule(EXPERTS), "down_proj", nn.Identity())


def give_subclass(model):
    class Packed(nn.Parameter):
        pass

    experts = model.get_submodule(EXPERTS)
    experts.down_proj = Packed(experts.down_proj.detach())


def give_integers(model):
    experts = model.get_submodule(EXPERTS)
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)


def give_tie(model):
    model.model.layers[1].mlp.experts.down_proj = model.get_submodule(EXPERTS).down_proj


def give_share(model):
    experts = model.get_submodule(EXPERTS)
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:2].detach())


def give_forward(model):
    experts = model.get_submodule(EXPERTS)
    experts.forward = lambda *args: type(experts).forward(experts, *args)


def give_kernel(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x)


def give_other_class(model):
    """As models have them that do not go by the interface."""

    class Experts(nn.Module):
        def __init__(self, old):
            super().__init__()
            self.gate_up_proj, self.down_proj = old.gate_up_proj, old.down_proj

    model.model.layers[0].mlp.experts = Experts(model.get_submodule(EXPERTS))


def give_one_expert(model):
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.num_experts = 1
        for name in ("gate_up_proj", "down_proj"):
            setattr(experts, name, nn.Parameter(getattr(experts, name)[:1].detach()))


def give_whole(model):
    return {"modules_to_save": ["experts"]}


@pytest.mark.parametrize(
    "options, prepare, message",
    [
        (
            {"target_parameters": ["experts.up_proj"]},
            give_nothing,
            "'experts.up_proj' match.*mlp.experts.down_proj, mlp",
        ),
        ({"target_parameters": ["own_proj"]}, give_nothing, "match no parameter"),
        ({"target_parameters": ["q_proj.weight"]}, give_nothing, "belongs to a torch.nn.modules.linear.Linear"),
        ({"dropout": 0.1}, give_nothing, "dropout with target_parameters"),
        ({"dora": True}, give_nothing, "dora with target_parameters"),
        ({"r": 0}, give_nothing, "r must be"),
        ({"rank_pattern": {"experts": 2}}, give_nothing, "rank_pattern: 'experts' match none"),
        ({"rank_pattern": {"experts.down_proj": 0}}, give_nothing, "r must be"),
        ({"exclude_modules": ["experts"]}, give_nothing, "exclude_modules: as in PEFT, this narrows target_modules"),
        ({}, give_second_branch, "carries branches already"),
        ({}, give_peft, "ParamWrapper has a branch on it already"),
        ({}, give_parametrization, "down_proj: it is no parameter"),
        ({}, give_subclass, "down_proj: it is a Packed"),
        ({}, give_integers, "down_proj: it is torch.int8"),
        ({}, give_tie, "tied to model.layers.1.mlp.experts.down_proj"),
        ({}, give_share, "something has shared its experts out"),
        ({}, give_forward, "hooks have replaced its module's forward"),
        ({}, give_kernel, "a kernel has replaced the forward of the MixtralSparseMoeBlock"),
        ({}, give_other_class, "Experts, which transformers does not call by its ExpertsInterface"),
        ({}, give_one_expert, "1 expert"),
        ({}, give_whole, "modules_to_save has the whole of it trained"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:40]),
)
def test_refusals_change_nothing(options, prepare, message):
    model = make_moe(num_hidden_layers=2)
    options = {"target_parameters": PARAMETERS, **options, **(prepare(model) or {})}
    with unchanged(model), pytest.raises(ValueError, match=message):
        fastlora.inject(model, None, **options)


def test_a_bias_is_refused():
    model = make_moe("GptOss")
    with unchanged(model), pytest.raises(ValueError, match="multiplies by gate_up_proj and down_proj alone"):
        fastlora.inject(model, None, target_parameters=["gate_up_proj_bias"])


@pytest.mark.parametrize("targets", ["experts.down_proj", [1], None])
def test_targets_of_the_wrong_type(targets):
    model = make_moe()
    with unchanged(model), pytest.raises(TypeError, match="must be a .*list of strings"):
        fastlora.inject(model, None, target_parameters=targets)


def test_an_adapter_dtype_that_does_not_go_with_the_weights():
    model = make_moe()
    with unchanged(model), pytest.raises(TypeError, match="adapter_dtype"):
        fastlora.inject(model, ["q_proj"], target_parameters=PARAMETERS, adapter_dtype=torch.bfloat16)


def test_a_base_weight_that_trains_is_refused_by_the_call():
    model = make_injected()
    model.get_submodule(EXPERTS).down_proj.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen|requires"):
        run(model)


def test_hooks_on_the_experts_stay():
    model, seen = make_moe(), []
    experts = model.get_submodule(EXPERTS)
    experts.register_forward_hook(lambda module, args, output: seen.append(output))
    fastlora.inject(model, None, target_parameters=PARAMETERS)
    assert isinstance(experts, LoRAExperts) and isinstance(experts, type(make_moe().get_submodule(EXPERTS)))
    logits(model)
    assert len(seen) == 1


def without_experts(self, x):
    """As a kernel of the Hub has it: the weights are read, the module is not called."""
    return x @ self.experts.gate_up_proj[0] @ self.experts.gate_up_proj[0].T, None


@pytest.mark.parametrize("clone", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_forward_that_is_replaced_after_inject_is_refused_while_it_would_skip_branches(clone):
    model = clone(make_injected("GptOss"))
    block = model.model.layers[0].mlp
    for module, forward in ((block, without_experts), (block.experts, type(block.experts).plain_class.forward)):
        module.forward = types.MethodType(forward, module)
        with pytest.raises(
            ValueError, match=f"replaced the forward of the {type(module).__name__} at experts with LoRA"
        ):
            run(model)
        del module.forward
    run(model)
    fastlora.merge(model)
    block.forward = types.MethodType(without_experts, block)
    logits(model)
    fastlora.merge_and_unload(model.eval())
    assert not block._forward_pre_hooks


def test_a_forward_that_is_wrapped_after_inject_is_not():
    """As autocast and accelerate's hooks do it."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = make_injected("GptOss")
    expected = logits(model)
    block = model.model.layers[0].mlp
    block.forward = types.MethodType(torch.autocast("cpu", enabled=False)(type(block).forward), block)
    for module in (block, block.experts):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
    assert torch.equal(logits(model), expected)
