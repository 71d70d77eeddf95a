"""FSDP of both versions around patched PEFT models, on two gloo processes: fused, with the training of stock PEFT."""

import copy
import warnings

import pytest
import torch

import fastlora

pytest.importorskip("peft")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

import peft
from torch.distributed.fsdp import fully_shard

from fastlora.integrations import peft_reasons
from fastlora.integrations.peft import patch
from tests.support.distributed_worker import assert_passed, outcomes_of
from tests.support.fsdp_worker import SCENARIOS, work


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of(work, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes(outcomes, scenario):
    assert_passed(outcomes, scenario)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def make_sharded(change):
    """(stock, fused): lora_A is an FSDP2 unit that ``change`` was applied to."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    stock = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 6)), config)
    models = stock, copy.deepcopy(stock)
    patch(models[1], strict=True)
    for model in models:
        fully_shard(change(model.base_model.model[0].lora_A["default"]))
        fully_shard(model)
    fastlora.reset_dispatch_counts()
    return models


def with_hook(module):
    module.register_forward_hook(lambda module, args, y: 2 * y)
    return module


def test_a_unit_that_is_not_fsdps_alone_is_pefts_and_warned_of_once(one_process):
    stock, fused = make_sharded(with_hook)
    x = torch.randn(3, 6)
    peft_reasons._warn_of_unit.cache_clear()
    with pytest.warns(UserWarning, match="lora_A is an FSDP unit with hooks of others.*wrap blocks"):
        y = fused(x)
    torch.testing.assert_close(y, stock(x), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(x)
    (reason,) = fastlora.dispatch_counts()["fallbacks"]
    assert reason.startswith("peft: lora_A is an FSDP unit with hooks of others")
    assert fastlora.dispatch_counts()["reference"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_its_units_a_layer_takes_the_dtypes_that_peft_takes(one_process, dtype):
    """A base that is wider than x cannot be fused; PEFT's own products run within the units."""
    stock, fused = make_sharded(lambda module: module)
    x = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    for model in (stock, fused):
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", enabled=False), pytest.raises(RuntimeError, match="dtype"):
                model(x)
        else:
            model(x).sum().backward()
    fallbacks = {"peft: torch.bfloat16 input, torch.float32 base, torch.float32 adapter": 1}
    assert fastlora.dispatch_counts()["fallbacks"] == ({} if dtype == torch.float32 else fallbacks)
    assert "forward" not in vars(fused.base_model.model[0].lora_A["default"])


def test_compiled_units_run_as_in_peft(one_process):
    stock, fused = make_sharded(lambda module: module)
    x = torch.randn(3, 6)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fused, backend="eager")(x), stock(x))
    fused(x).sum().backward()
    assert fastlora.dispatch_counts()["reference"] == 2
