"""What two gloo processes do in test_integrations_distributed.py: each scenario compares itself with one process."""

import datetime
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora.adapters.io import load_adapter, save_adapter
from fastlora.model import inject, merge
from fastlora.module import LoRALinear
from fastlora.sharding import lora_linear_sharded

WORLD = 2
BATCHES = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(3)).expand(4, 8, 12)
WHOLE = StateDictOptions(full_state_dict=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def make_base(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(12, 5)).to(dtype)


def make(kind, dtype=torch.float32, adapter_dtype=None):
    model = make_base(dtype)
    if kind == "inject":
        inject(model, ["up", "down"], r=3, adapter_dtype=adapter_dtype)
    else:
        import peft

        from fastlora.integrations.peft import patch

        config = peft.LoraConfig(r=3, target_modules=["up", "down"])
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=adapter_dtype is not None)
        patch(model, strict=True)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    fastlora.reset_dispatch_counts()
    return model


def train(model, split, dtype=torch.float32):
    """Losses of a few steps on the mean over the whole batch, of which each process may see its share."""
    rank, world = (dist.get_rank(), WORLD) if split else (0, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for batch in BATCHES.to(dtype):
        loss = model(batch.chunk(world)[rank]).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if split:
            dist.all_reduce(mean, op=dist.ReduceOp.SUM)
        losses.append(mean / world)
    return torch.stack(losses)


def fused_and_fallbacks():
    counts = fastlora.dispatch_counts()
    return counts["cuda"] + counts["triton"] + counts["reference"], counts["fallbacks"]


def shard(model, mesh, units):
    for module in list(model.modules()):
        if units(module):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


UNITS = {
    "blocks": lambda module: isinstance(module, Block),
    "lora layers": lambda module: hasattr(module, "lora_A"),
    "leaves": lambda module: isinstance(module, nn.Linear),
}
CALLS = 2 * 4 * len(BATCHES)  # forward and backward of four layers


def check_training(kind, wrap, dtype=torch.float32, adapter_dtype=None):
    slack = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    single = make(kind, dtype, adapter_dtype)
    expected = train(single, split=False, dtype=dtype)
    model = make(kind, dtype, adapter_dtype)
    losses = train(wrap(model), split=True, dtype=dtype)
    fused, fallbacks = fused_and_fallbacks()
    assert fused == CALLS and not fallbacks, (fused, fallbacks)
    assert (losses - expected).abs().max() <= slack * expected.abs().max(), (losses, expected)
    assert losses[-1] < 0.95 * losses[0]
    state = get_model_state_dict(model, options=WHOLE)
    if dist.get_rank() == 0:
        assert state.keys() == single.state_dict().keys()
        for name, value in single.state_dict().items():
            assert state[name].dtype == value.dtype
            assert (state[name] - value).abs().max() <= slack, name


def ddp(kind):
    return lambda mesh: check_training(kind, DistributedDataParallel)


def fsdp(kind, units):
    return lambda mesh: check_training(kind, lambda model: shard(model, mesh, UNITS[units]))


def fsdp_mixed(kind):
    return lambda mesh: check_training(
        kind, lambda model: shard(model, mesh, UNITS["blocks"]), torch.bfloat16, torch.float32
    )


def checkpoint(kind):
    """Saved by processes that hold shards, loaded into whole models, and back."""

    def scenario(mesh):
        directory = shared_directory()
        sharded = shard(make(kind), mesh, UNITS["blocks"])
        train(sharded, split=True)
        dcp.save(get_model_state_dict(sharded), checkpoint_id=directory / "sharded")
        whole = make(kind)
        state = whole.state_dict()
        dcp.load(state, checkpoint_id=directory / "sharded")
        whole.load_state_dict(state)
        x = BATCHES[0]
        assert torch.equal(whole(x), sharded(x)) and not torch.equal(whole(x), make(kind)(x))

        train(whole, split=False)
        dcp.save(whole.state_dict(), checkpoint_id=directory / "whole")
        state = get_model_state_dict(sharded)
        dcp.load(state, checkpoint_id=directory / "whole")
        set_model_state_dict(sharded, state)
        assert torch.equal(whole(x), sharded(x))

    return scenario


def adapter_files(mesh):
    """save_adapter of a sharded model is one whole file; load_adapter puts it into sharded and whole models."""
    directory = shared_directory()
    sharded = shard(make("inject"), mesh, UNITS["blocks"])
    train(sharded, split=True)
    save_adapter(sharded, directory / "adapter")
    dist.barrier()
    whole, again = make_base(), shard(make("inject"), mesh, UNITS["blocks"])
    load_adapter(whole, directory / "adapter")
    load_adapter(again, directory / "adapter")
    x = BATCHES[0]
    assert torch.equal(whole(x), sharded(x)) and torch.equal(again(x), sharded(x))
    assert not torch.equal(whole(x), make("inject")(x))


def refuse_to_merge_shards(mesh):
    sharded = shard(make("inject"), mesh, UNITS["blocks"])
    try:
        merge(sharded)
    except ValueError as error:
        assert "the weight is sharded" in str(error)
    else:
        raise AssertionError("merged a shard")


REPLICATE = Replicate()
LAYOUTS = {  # placements of x, weight, lora_a, lora_b, bias; of y; collectives forward
    "column": ((REPLICATE, Shard(0), REPLICATE, Shard(0), Shard(0)), Shard(2), 0),
    "row": ((Shard(2), Shard(1), Shard(1), REPLICATE, None), Partial(), 0),
    "data": ((Shard(0), REPLICATE, REPLICATE, REPLICATE, REPLICATE), Shard(0), 0),
    "none": ((REPLICATE,) * 5, REPLICATE, 0),
    "column, torch's own placement of A": ((REPLICATE, Shard(0), Shard(0), Shard(0), Shard(0)), Shard(2), 1),
    "column, plain adapters": ((REPLICATE, Shard(0), None, None, None), Shard(2), 0),
    "row, plain adapters": ((Shard(2), Shard(1), None, None, None), Partial(), 0),
    "sequence": ((Shard(1), Shard(0), REPLICATE, Shard(0), None), Shard(2), 1),
}


def layout(name):
    """One call on shards: values, gradients, placements, and no collective that the placements do not need."""

    def scenario(mesh):
        placements, of_y, collectives = LAYOUTS[name]
        torch.manual_seed(0)
        sizes = ((3, 5, 12), (20, 12), (3, 12), (20, 3), (20,))
        # Integers: sums are exact in any order, so shards and the whole agree in every bit.
        plain = [torch.randint(-4, 5, size).double() for size in sizes]
        with_bias = placements[4] is not None
        dy = torch.randint(-4, 5, (3, 5, 20)).double()

        def leaves(place):
            return [
                place(value, placement).requires_grad_(index != 1)
                for index, (value, placement) in enumerate(zip(plain, placements, strict=True))
            ]

        def call(function, x, weight, a, b, bias):
            return function(x, weight, a, b, 0.5, bias if with_bias else None)

        whole = leaves(lambda value, placement: value.clone())
        expected = call(fastlora.lora_linear, *whole)
        expected.backward(dy)
        parts = leaves(
            lambda value, placement: distribute_tensor(value, mesh, [placement]) if placement else value.clone()
        )
        with CommDebugMode() as communication:
            y = call(lora_linear_sharded, *parts)
        assert communication.get_total_counts() == collectives, communication.get_comm_counts()
        assert y.placements == (of_y,) and y.shape == expected.shape
        y.backward(distribute_tensor(dy, mesh, [REPLICATE if of_y.is_partial() else of_y]))
        assert torch.equal(y.full_tensor(), expected)
        for index, (part, value) in enumerate(zip(parts, whole, strict=True)):
            if index != 1 and (index != 4 or with_bias):
                grad = part.grad
                assert torch.equal(grad.full_tensor() if isinstance(grad, DTensor) else grad, value.grad), index

    return scenario


def row_with_bias(mesh):
    torch.manual_seed(0)
    x, weight, a, b, bias = (torch.randn(size) for size in ((4, 12), (20, 12), (3, 12), (20, 3), (20,)))
    parts = [distribute_tensor(value, mesh, [p]) for value, p in ((x, Shard(1)), (weight, Shard(1)), (bias, REPLICATE))]
    y = lora_linear_sharded(parts[0], parts[1], a, b, 0.5, parts[2])
    torch.testing.assert_close(y.full_tensor(), fastlora.lora_linear(x, weight, a, b, 0.5, bias))


def parallel_styles(mesh):
    """torch's tensor parallelism over LoRALinear: column- then row-parallel, losses of one process."""
    expected = train(make("inject"), split=False)
    model = make("inject")
    for block in model[:2]:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in make("inject").named_parameters() if p.requires_grad
    }
    fastlora.reset_dispatch_counts()
    losses = train(model, split=False)  # every process sees the whole batch
    fused, fallbacks = fused_and_fallbacks()
    assert fused == CALLS and not fallbacks
    assert (losses - expected).abs().max() <= 1e-5
    for name, value in make("inject").named_parameters():
        got = dict(model.named_parameters())[name]
        assert got.shape == value.shape and got.requires_grad == value.requires_grad


def parallel_styles_with_dropout(mesh):
    layer = LoRALinear(12, 20, r=3, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = BATCHES[0]
    eager = layer.eval()(x)
    parallelize_module(layer, mesh, ColwiseParallel(output_layouts=Replicate()))
    torch.testing.assert_close(layer(x), eager)
    fastlora.reset_dispatch_counts()
    layer.train()
    assert not torch.allclose(layer(x), eager)
    assert fused_and_fallbacks() == (0, {"dropout over DTensors": 1})


def peft_tensor_parallel(mesh):
    """PEFT over parallel styles: their hooks need PEFT's own calls; DTensors without hooks are fused."""
    expected = make("peft")
    x = BATCHES[0]
    model = make("peft")
    for block in model.base_model.model[:2]:
        parallelize_module(
            block.up,
            mesh,
            {"base_layer": ColwiseParallel(output_layouts=Replicate()), "lora_B.default": ColwiseParallel(
                output_layouts=Replicate()
            )},
        )  # fmt: skip
    fastlora.reset_dispatch_counts()
    torch.testing.assert_close(model(x), expected(x))
    assert fastlora.dispatch_counts()["fallbacks"] == {"peft: hooks on base_layer": 2}

    model = make("peft")
    layer, stock = model.base_model.model[0].up, expected.base_model.model[0].up
    base = layer.base_layer
    for name, parameter in list(base.named_parameters()):
        setattr(base, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]), requires_grad=False))
    fastlora.reset_dispatch_counts()
    y = layer(distribute_tensor(x, mesh, [REPLICATE]))
    assert y.placements == (Shard(1),) and fused_and_fallbacks() == (1, {})
    torch.testing.assert_close(y.full_tensor(), stock(x))
    y.sum().full_tensor().backward()
    stock(x).sum().backward()
    for factor in ("lora_A", "lora_B"):
        got, wanted = (getattr(m, factor)["default"].weight.grad for m in (layer, stock))
        torch.testing.assert_close(got, wanted)


def experts_ddp(kind):
    """Each process has a sample of its own, whose tokens choose experts of their own; some experts have none."""

    def made():
        from tests.support import injected_experts

        if kind == "inject":
            return injected_experts.make_injected()
        from fastlora.integrations.peft import patch

        model = injected_experts.make_stock()
        patch(model, strict=True)
        return model

    def scenario(mesh):
        ids = torch.stack([torch.arange(12) * 7 % 31, torch.full((12,), 5)])
        single, model = made(), made()
        wrapped = DistributedDataParallel(model)
        fastlora.reset_dispatch_counts()
        for _ in range(2):
            losses = [run(input_ids=part, labels=part).loss for run, part in (
                (single, ids), (wrapped, ids[dist.get_rank()][None]),
            )]  # fmt: skip
            for loss in losses:
                loss.backward()
            for (name, p), q in zip(single.named_parameters(), model.parameters(), strict=True):
                if p.requires_grad:
                    assert (q.grad - p.grad).abs().max() <= 1e-5 * p.grad.abs().max(), name
                    for each in (p, q):
                        each.data -= 0.1 * each.grad
                        each.grad = None
        fused, fallbacks = fused_and_fallbacks()
        assert fused == 2 * 2 * 2 * 4 and not fallbacks, (fused, fallbacks)

    return scenario


class Gated(nn.Module):
    """Two layers that share an input, of which the last process in a lopsided run does not use the second."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(12, 20)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.lopsided = False

    def forward(self, x):
        gate, up = self.gate(x), self.up(x)
        return x + self.down(torch.tanh(gate) if self.lopsided else torch.tanh(gate) * up)


GROUPS = 2 * len(BATCHES)  # of two blocks, in every forward


def make_gated(kind, grouped):
    torch.manual_seed(0)
    model = nn.Sequential(Gated(), Gated(), nn.Linear(12, 5))
    names, example = ["gate", "up", "down"], BATCHES[0] if grouped else False
    if kind == "inject":
        inject(model, names, r=3, group=example)
    else:
        import peft

        from fastlora.integrations.peft import patch

        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=names))
        patch(model, strict=True, group=example)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    fastlora.reset_dispatch_counts()
    return model


def shared_input(kind, wrap, groups=GROUPS):
    """A model of groups in two processes has the losses and weights of one process without groups."""

    def scenario(mesh):
        single = make_gated(kind, False)
        expected = train(single, split=False)
        model = make_gated(kind, True)
        losses = train(wrap(model, mesh), split=True)
        counts = fastlora.dispatch_counts()
        assert counts.get("groups", 0) == groups, counts
        assert (losses - expected).abs().max() <= 1e-5 * expected.abs().max(), (losses, expected)
        assert losses[-1] < 0.95 * losses[0]
        state = get_model_state_dict(model, options=WHOLE)
        if dist.get_rank() == 0:
            for name, value in single.state_dict().items():
                assert (state[name] - value).abs().max() <= 1e-5, name

    return scenario


def shared_input_unused(mesh):
    """What differs under DDP: a sibling whose output nothing uses counts as used, with a gradient of zero."""
    for grouped in (False, True):
        model = make_gated("inject", grouped)
        for block in model[:2]:
            block.lopsided = True
        wrapped = DistributedDataParallel(model)
        wrapped(BATCHES[0]).sum().backward()
        if grouped:
            wrapped(BATCHES[0]).sum().backward()
            assert not model[0].up.lora_A.grad.any() and model[0].gate.lora_A.grad.any()
            continue
        try:
            wrapped(BATCHES[0])
        except RuntimeError as error:
            assert "did not receive grad" in str(error) or "find_unused_parameters" in str(error)
        else:
            raise AssertionError("an unused parameter was no error")


def _fsdp(units):
    return lambda model, mesh: shard(model, mesh, units)


SCENARIOS = {
    **{f"{kind} experts ddp": experts_ddp(kind) for kind in ("inject", "peft")},
    **{
        f"{kind} shared input ddp": shared_input(kind, lambda m, mesh: DistributedDataParallel(m))
        for kind in ("inject", "peft")
    },
    **{
        f"{kind} shared input fsdp": shared_input(kind, _fsdp(lambda m: isinstance(m, Gated)))
        for kind in ("inject", "peft")
    },
    # Units of single layers gather their weights as they are called: each layer is a call of its own.
    "shared input in units": shared_input("inject", _fsdp(UNITS["lora layers"]), groups=0),
    "shared input unused": shared_input_unused,
    **{f"{kind} ddp": ddp(kind) for kind in ("inject", "peft")},
    **{f"{kind} fsdp {units}": fsdp(kind, units) for kind in ("inject", "peft") for units in UNITS},
    **{f"{kind} fsdp mixed": fsdp_mixed(kind) for kind in ("inject", "peft")},
    **{f"{kind} checkpoint": checkpoint(kind) for kind in ("inject", "peft")},
    **{f"layout {name}": layout(name) for name in LAYOUTS},
    "layout row with bias": row_with_bias,
    "adapter files": adapter_files,
    "merge": refuse_to_merge_shards,
    "parallel styles": parallel_styles,
    "parallel styles with dropout": parallel_styles_with_dropout,
    "peft tensor parallel": peft_tensor_parallel,
}


def shared_directory():
    """A new directory that both processes know."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names, src=0)
    return Path(names[0])


def work(rank, directory):
    run_scenarios(rank, directory, SCENARIOS)


def outcomes_of(worker, directory):
    """Tracebacks by scenario and rank: one pair of processes runs all, for starting it takes longest."""
    torch.multiprocessing.spawn(worker, (str(directory),), nprocs=WORLD)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(WORLD)]


def assert_passed(outcomes, scenario):
    failures = [f"rank {rank}:\n{outcome[scenario]}" for rank, outcome in enumerate(outcomes) if outcome[scenario]]
    assert not failures, "\n".join(failures)


def run_scenarios(rank, directory, scenarios):
    """Runs every scenario and leaves each one's traceback, or nothing, in ``directory``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    outcomes = {}
    for name, scenario in scenarios.items():
        try:
            scenario(mesh)
            outcomes[name] = ""
        except Exception:  # the test of this scenario fails with the text; the others go on
            outcomes[name] = traceback.format_exc()
    torch.save(outcomes, Path(directory) / f"rank{rank}.pt")
    dist.destroy_process_group()
