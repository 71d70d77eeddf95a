"""What two gloo processes do in test_fsdp.py: every way to put FSDP around a patched PEFT model, beside stock PEFT.

Each scenario trains the model in one process with PEFT's own forwards, then sharded over two, fused, and compares
losses and weights.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)

import fastlora
from tests.support.distributed_worker import (
    BATCHES,
    CALLS,
    WHOLE,
    Block,
    fused_and_fallbacks,
    make,
    run_scenarios,
    train,
)

SLACK = 1e-5  # of the largest value: two halves of a batch are added in another order
BLOCKS = {"auto_wrap_policy": lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, Block)}


def fsdp1(**options):
    def wrap(model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)

    return wrap


def fsdp1_by_pefts_policy(use_orig_params, blocks):
    """lora_A and lora_B as units of their own, within blocks as PEFT's policy finds them or within the whole model."""

    def wrap(model):
        from peft.utils.other import fsdp_auto_wrap_policy

        model._no_split_modules = ["Block"] if blocks else []
        return fsdp1(auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=use_orig_params)(model)

    return wrap


def is_factor(module):
    """What PEFT's policy makes a unit: a leaf whose weight trains."""
    return isinstance(module, nn.Linear) and module.weight.requires_grad


def fsdp2(*kinds, **options):
    """Units of every module that one of the predicates accepts, inner ones first."""

    def wrap(model):
        for accepts in kinds:
            for module in list(model.modules()):
                if accepts(module):
                    fully_shard(module, **options)
        return fully_shard(model, **options)

    return wrap


def grouped(model):
    """lora_A and lora_B of a layer as one unit of two modules."""
    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            fully_shard([module.lora_A["default"], module.lora_B["default"]])
    return fully_shard(model)


def checkpointed(wrap):
    def wrap_checkpointed(model):
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
        return wrap(model)

    return wrap_checkpointed


def patched_last(wrap):
    """``patch`` reaches layers that are sharded already."""

    def wrap_and_patch(model):
        from fastlora.integrations.peft import patch, unpatch

        names = unpatch(model)
        sharded = wrap(model)
        assert list(patch(sharded)) == names
        fastlora.reset_dispatch_counts()
        return sharded

    return wrap_and_patch


def is_block(module):
    return isinstance(module, Block)


def is_lora_layer(module):
    return hasattr(module, "lora_A")


def is_linear(module):
    return isinstance(module, nn.Linear)


WRAPS = {
    "1, whole": fsdp1(use_orig_params=True),
    "1, blocks": fsdp1(use_orig_params=True, **BLOCKS),
    "1, blocks, gradients alone sharded": fsdp1(
        use_orig_params=True, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP, **BLOCKS
    ),
    "1, blocks, checkpointed": checkpointed(fsdp1(use_orig_params=True, **BLOCKS)),
    **{
        f"1, PEFT's policy, {'blocks' if blocks else 'whole'}, {'original' if original else 'flat'} parameters":
        fsdp1_by_pefts_policy(original, blocks)
        for blocks in (False, True)
        for original in (False, True)
    },
    "1, PEFT's policy, checkpointed": checkpointed(fsdp1_by_pefts_policy(True, True)),
    "2, factors": fsdp2(is_factor),
    "2, factors and blocks": fsdp2(is_factor, is_block),
    "2, factors and blocks, checkpointed": checkpointed(fsdp2(is_factor, is_block)),
    "2, factors together": grouped,
    "2, every linear layer": fsdp2(is_linear),
    "2, LoRA layers": fsdp2(is_lora_layer),
    "2, LoRA layers, patched last": patched_last(fsdp2(is_lora_layer)),
    "2, factors, patched last": patched_last(fsdp2(is_factor, is_block)),
    "2, gathered until backward": fsdp2(is_factor, is_block, reshard_after_forward=False),
}  # fmt: skip
MIXED = {
    "1": fsdp1(use_orig_params=True, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16), **BLOCKS),
    "2, factors": fsdp2(is_factor, is_block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
}


def stock(**options):
    from fastlora.integrations.peft import unpatch

    model = make("peft", **options)
    assert len(unpatch(model)) == 4
    return model


def assert_close(value, expected, slack):
    assert (value - expected).abs().max() <= slack * max(expected.abs().max(), 1), (value, expected)


def training(wrap):
    """Losses, weights and the output without gradients are those of one process with PEFT's own forwards."""

    def scenario(mesh):
        single = stock()
        expected = train(single, split=False)
        model = wrap(make("peft"))
        losses = train(model, split=True)
        fused, fallbacks = fused_and_fallbacks()
        recomputed = CALLS // 2 if any("checkpoint" in name for name, _ in model.named_modules()) else 0
        assert fused == CALLS + recomputed and not fallbacks, (fused, fallbacks)
        assert_close(losses, expected, SLACK)
        assert losses[-1] < 0.95 * losses[0]
        with torch.no_grad():
            assert_close(model(BATCHES[0]), single(BATCHES[0]), SLACK)
        assert fused_and_fallbacks() == (fused + 4, {})
        state = get_model_state_dict(model, options=WHOLE)
        if dist.get_rank() == 0:
            for name, value in single.state_dict().items():
                assert_close(state[name], value, SLACK)

    return scenario


def mixed(wrap):
    """In FSDP's own mixed precision, where the oracle is stock PEFT sharded in the same way."""

    def scenario(mesh):
        expected = train(wrap(stock()), split=True)
        assert fused_and_fallbacks()[0] == 0
        model = wrap(make("peft"))
        losses = train(model, split=True)
        assert fused_and_fallbacks() == (CALLS, {})
        assert_close(losses, expected, 8 * torch.finfo(torch.bfloat16).eps)

    return scenario


def a_base_weight_trains(wrap):
    """One layer's frozen weight does train: that layer is PEFT's, and the gradient is there."""

    def scenario(mesh):
        def thaw(model):
            model.base_model.model[0].up.base_layer.weight.requires_grad_(True)
            return model

        single, model = thaw(stock()), thaw(make("peft"))
        before = single.base_model.model[0].up.base_layer.weight.detach().clone()
        expected = train(single, split=False)
        model = wrap(model)
        assert_close(train(model, split=True), expected, SLACK)
        calls, reason = len(BATCHES), {"peft: the base weight trains": len(BATCHES)}
        assert fused_and_fallbacks() == (CALLS - 2 * calls, reason)
        state = get_model_state_dict(model, options=WHOLE)
        if dist.get_rank() == 0:
            (name,) = [name for name, p in single.named_parameters() if name.endswith("0.up.base_layer.weight")]
            assert_close(state[name], single.state_dict()[name], SLACK)
            assert not torch.equal(state[name], before)

    return scenario


SCENARIOS = {
    **{name: training(wrap) for name, wrap in WRAPS.items()},
    **{f"{name}, bfloat16": mixed(wrap) for name, wrap in MIXED.items()},
    "1, whole, a base weight trains": a_base_weight_trains(WRAPS["1, whole"]),
    "2, factors, a base weight trains": a_base_weight_trains(fsdp2(is_factor)),
}


def work(rank, directory):
    run_scenarios(rank, directory, SCENARIOS)
