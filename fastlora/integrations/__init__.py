"""Ways into existing training code. Each page below runs as it stands; a test runs it.

**PEFT and transformers' Trainer: one line.** Everything else of PEFT (several adapters, switching, merging, saving)
stays what it was. ``patch`` returns the layers that are fused as things stand; printed, its result says what becomes of
the others ("14 of 16 LoRA layers fused; 2 by PEFT's forward: ..."). Each call of a LoRA layer that PEFT serves itself,
of whatever class (embeddings, convolutions), is counted by reason, except within a graph of ``torch.compile`` and
within ``torch.nn.TransformerEncoderLayer``, whose fast path no hook may stop. ``strict=True`` refuses a model in which
some layer would not be fused. Bases that bitsandbytes has quantised to nf4 or fp4 and torchao to int8 or float8
weights are served alike (``fastlora.quantised``), where a 4-bit layer's compute dtype is that of its input or of
autocast; LLM.int8 and dynamic activations, which quantise the input as well, are PEFT's. Trainer is also the way to
datasets by name (``datasets.load_dataset``), to logging services (``report_to`` of its arguments) and to schedules and
optimisers that ``fastlora finetune`` does not have.

```python
import fastlora
from peft import LoraConfig, get_peft_model
from transformers import Trainer

model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
fastlora.integrations.peft.patch(model)  # the one line

trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
trainer.train()
model.save_pretrained(directory)
print(fastlora.dispatch_counts())  # calls served by each backend, and what fell back to PEFT's forward, by reason
```

**Mixtures of experts.** LoRA on the experts of a transformers model (Mixtral, Qwen3-MoE, gpt-oss, OLMoE, DeepSeek and
whatever else takes an ``experts_implementation``) needs the same line. PEFT adds ΔW to a copy of all experts' weights
at every call; patched, each expert's rows go through its factors, and nothing of the weights' size is made or saved.

```python
import fastlora
from peft import LoraConfig, get_peft_model

config = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)
model = get_peft_model(model, config)
print(fastlora.integrations.peft.patch(model))  # "4 of 4 LoRA layers fused"

model(input_ids=batches[0], labels=batches[0]).loss.backward()
print(fastlora.dispatch_counts())
```

**Several adapters in one batch.** A patched PEFT model takes ``adapter_names``, one for each sample, in training as
well: several jobs share one base model and one base product a layer. Each adapter's gradients are those of its own
rows, so that it ends where it would have ended alone, given the loss that it would have had alone. ``"__base__"``
stands for no adapter; at inference the same call serves a batch of several users. On a GPU
``fastlora.warmup(model, adapter_names=names)`` compiles for such batches before the first.

```python
import fastlora
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), adapter_name="first")
model.add_adapter("second", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
fastlora.integrations.peft.patch(model)
model.set_requires_grad(["first", "second"])  # PEFT lets the active adapter alone train

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for first, second in zip(batches, other_batches):
    names = ["first"] * len(first) + ["second"] * len(second)
    logits = model(input_ids=torch.cat([first, second]), adapter_names=names).logits
    parts = zip(logits.split([len(first), len(second)]), (first, second))
    loss = sum(F.cross_entropy(part[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for part, ids in parts)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(directory)  # each adapter in a folder of its name
```

Several active adapters without dropout are one fused call, their ranks stacked; with dropout each has a mask of its
own, and PEFT's forward serves them. DoRA is one launch each way on a GPU, and elsewhere a fused layer and a pass that
scales its columns; where its magnitude trains it keeps one tensor of the output's size. The norms of its weights are
kept until a weight, a factor or the scaling changes, or a backward has trained the factors. A write through ``.data``
between two calls without a backward is not seen. With dropout in training DoRA drops the base product's input, too:
PEFT's forward, counted, as is aLoRA. ``benchmarks/results/recipes.md`` in the repository lists 22 recipes, what serves
each, and why not.

Embeddings (``lora.Embedding``, tied to a head or not) stay PEFT's own forward, counted. There is no base product whose
reads a fused kernel could share: both terms are gathers, one of N and one of r numbers a token, and what is left is one
product of M x r by r x N; A's gradient, a scatter over the vocabulary, would need a sort to be the same in every run,
which torch's embedding does where deterministic algorithms are asked for. ``trainable_token_indices`` and
``modules_to_save`` are no LoRA layers: ``patch`` does not touch them.

**TRL's SFTTrainer.** It puts the adapters in itself, so ``patch`` comes after it. The dataset has the rows that
``fastlora finetune`` takes, too: ``messages``, or ``prompt`` and ``completion``, or ``text``.

```python
import fastlora
from peft import LoraConfig
from trl import SFTTrainer

trainer = SFTTrainer(
    model=model,
    args=arguments,
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
print(fastlora.integrations.peft.patch(trainer.model))  # the one line

trainer.train()
trainer.save_model(directory)
print(fastlora.dispatch_counts())
```

Whatever else builds a PEFT model and trains it, from a YAML file say, as axolotl does, takes the same line between the
two.

**Plain PyTorch.** No PEFT needed; the adapter file is in PEFT's format all the same. Experts of a transformers model
are named as in PEFT: ``inject(model, ["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])``, with
``target_modules=None`` for experts alone. Such a call has no dropout.

```python
import fastlora
import torch

names = fastlora.inject(model, ["q_proj", "v_proj"], r=8, alpha=16, dropout=0.05)
print(fastlora.trainable_parameters(model))

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for batch in batches:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
fastlora.save_adapter(model, directory)
```

**Layers that share an input.** q, k and v of attention receive one tensor, as do gate and up of an MLP. With ``group=``
such layers of one parent are computed together, as one node of autograd that saves the input once and adds up one dX in
place (``fastlora.lora_linears``). One forward of the model says which they are, before training: ``True`` runs it on
the model's own ``dummy_inputs``, anything else is a batch. ``inject`` takes ``group=`` as well.

```python
import fastlora
from peft import LoraConfig, get_peft_model

model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
print(fastlora.integrations.peft.patch(model, group=True))  # "...self_attn: q_proj, k_proj, v_proj (2); ..."

model(input_ids=batches[0], labels=batches[0]).loss.backward()
print(fastlora.dispatch_counts())  # "groups": how many were computed
```

The first of a group that is called computes all of it. The others get their results if they are called within the same
forward of their parent with the very same tensor, unchanged, and their weights, factors and whatever surrounds the call
are as they were; else each computes on its own, the same values, counted by reason. So it is under ``torch.compile``
(not counted there), transforms of ``torch.func`` and ``inference_mode``, in a region that is checkpointed apart from
its parent, for quantised layers, DoRA, several active adapters, and layers with hooks in front of their calls or in
FSDP units of their own. The results have the bits of single layers; dX is the same sum in another order. Three things
differ. Two backward passes through different layers of a group need ``retain_graph=True`` in the first, even where the
input requires no gradient. A layer whose result nothing uses gets a gradient of zero under DDP, for which it counts as
used. Seeds of a group are drawn together: where a model draws random numbers between the layers' calls, or does not
call one of them after all, the masks are not those of single layers, though they are as random, and the same in a
recomputation. On a GPU one launch each way serves a group; where none can, each layer is a launch of its own, counted.

**FSDP2.** Put LoRA in first, then shard: blocks, LoRA layers or leaves. Under ``torchrun`` this is one of several
processes. A patched PEFT model stays fused in whatever way FSDP wraps it: FSDP2 over blocks, whole models, LoRA layers
or single ``lora_A`` and ``lora_B``; FSDP1 over blocks or whole models with ``use_orig_params=True``; both with PEFT's
own ``fsdp_auto_wrap_policy``. PEFT's forward serves, counted and with one warning, a unit that holds more than a plain
``nn.Linear`` or has hooks besides FSDP's; and, counted nowhere, units of single layers within a graph of
``torch.compile``.

```python
import fastlora
import torch
from torch.distributed.fsdp import fully_shard

fastlora.inject(model, ["q_proj", "v_proj"], r=8, alpha=16)
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for batch in batches:
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
fastlora.save_adapter(model, directory)  # every process calls it; the first writes whole tensors
```

**Merge and serve.** A merged layer is one ``F.linear``. ``keep_base=True`` (the default) would keep the frozen weights
beside, so that ``fastlora.unmerge`` restores them bit by bit.

```python
import fastlora
import torch

fastlora.load_adapter(model, directory)  # puts the layers in, too
fastlora.merge(model.eval(), safe=True, keep_base=False)
with torch.no_grad():
    logits = model(input_ids=batches[0]).logits
```
**Selective checkpointing.** Under a dispatch mode a layer's forward is one op. A policy that saves products does not
know it, and the layer's forward runs twice; this one saves it, too.

```python
from functools import partial

import fastlora
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

SAVED = {torch.ops.fastlora.lora_forward.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

def policy(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE

context = partial(create_selective_checkpoint_contexts, policy)
output = checkpoint(block, x, use_reentrant=False, context_fn=context)
```

**Export.** An exported program holds the op, as does a package that AOTInductor makes of it, and so loads only where
fastlora is imported. One of plain ATen, without fused kernels, loads anywhere: export after ``unpatch`` or ``merge``,
or decompose the program. ``torch.jit.trace`` always gives plain ATen.

```python
import fastlora
import torch

program = torch.export.export(block, (x,))  # trains, too
table = torch.export.default_decompositions()
table.update(fastlora.decompositions())
program = program.run_decompositions(table)
```

**Inputs that change.** A layer saves its input itself. Where a model then changes that input in place
(``x += layer(x)``), the backward raises an error; ``patch(model, copy_input=True)``, ``inject(..., copy_input=True)``
and ``LoRALinear(..., copy_input=True)`` save a copy.
"""

import importlib
from types import ModuleType

_MODULES = ("peft", "state_dicts")


def __getattr__(name: str) -> ModuleType:
    """Imports an integration at its first use, since each needs the library that it serves."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
