"""What every LoRA layer has besides its products: hyperparameters, the start of its branch, entries in state dicts."""

import math
import warnings

import torch
from torch import nn

from fastlora.dora import weight_norm
from fastlora.merging import Merging
from fastlora.save_pretrained import NOT_IN_CHECKPOINT, plain_saver, resumed, warn_unmerged
from fastlora.sharding import is_dtensor

MERGED_MARK = "merged"  # key in the state dict of a merged layer
PLAIN_UNDER_BRANCH = (
    "a state dict without lora_A and lora_B was loaded into layers whose branch is not zero, and the branch stays: "
    "where the state dict is of a merged model, the branch now counts twice"
)


class Branch(Merging):
    """The part of a LoRA layer that does not depend on what it multiplies by.

    Attributes:
        r, alpha, scaling: rank, alpha, and the factor that multiplies the branch; ``scaling`` is read at every call.
        dropout: probability with which the branch drops an element of its input while training.
        rslora: whether the scaling is alpha / sqrt(r) instead of alpha / r.
        init: how A starts.
        num_experts: how many matrices the layer has, of which each has a part of rank r in A and B.
    """

    lora_magnitude_vector: nn.Parameter
    copy_input = False
    num_experts = 1

    def _configure(self, r: int, alpha: float, dropout: float, rslora: bool, init: str) -> None:
        """Takes over hyperparameters that have been checked."""
        self.r = int(r)
        self.alpha = alpha if isinstance(alpha, int | float) else float(alpha)  # a Fraction, a numpy scalar
        self.dropout = float(dropout)
        self.rslora = rslora
        self.init = init
        self.scaling = self.alpha / (math.sqrt(self.r) if rslora else self.r)
        self.merged = False

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Draws A and zeroes B; a magnitude becomes the weight's norm.

        The draws are those of PEFT, so that the same seed gives the same start: on the default device, in the default
        dtype, one ``nn.Linear`` start for A and one for B, then A again; rounded to the weight's dtype.
        """
        if self.lora_A.is_meta:
            return
        device = torch.get_default_device()
        if device.type == "meta":
            device = torch.device("cpu")
        a = torch.empty(self.lora_A.shape, device=device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.kaiming_uniform_(torch.empty(self.lora_B.shape, device=device), a=math.sqrt(5))
        if self.init == "gaussian":
            nn.init.normal_(a, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_A.copy_(a.to(self._start_dtype()))
        self.lora_B.zero_()
        if self.dora and not self.weight.is_meta:
            self.lora_magnitude_vector.copy_(weight_norm(self.weight_rows, self.lora_A, self.lora_B, self.scaling))

    def _start_dtype(self) -> torch.dtype:
        """What the draws of A are rounded to, whatever dtype A has."""
        return self.weight.dtype

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """A merged layer's entries are marked, or those of a plain layer where they are written for from_pretrained."""
        first = not any(key.endswith("lora_A") for key in destination)  # one warning a state dict is enough
        super()._save_to_state_dict(destination, prefix, keep_vars)
        saver = plain_saver()
        if self.merged and saver is None:
            destination[prefix + MERGED_MARK] = torch.ones((), dtype=torch.bool)
        elif self.merged:
            for name in self.adapter_parameters():
                destination.pop(prefix + name, None)
        elif saver is not None and first:
            warn_unmerged(saver)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        layer = prefix.rstrip(".") or "the layer"
        given = {name for name in (*self._parameters, MERGED_MARK) if prefix + name in state_dict}
        if self.merged and given:
            errors.append(f"{layer} is merged; call unmerge() before loading parameters")
            return
        if MERGED_MARK in given:
            errors.append(
                f"{layer}: the state dict is of a merged layer, whose weight holds the branch already, and lora_A and "
                "lora_B would add it again; take the state dict after unmerge(), or load an adapter file"
            )
            return
        lacking = {name: p for name, p in self.adapter_parameters().items() if name not in given}
        if lacking and (checkpoint := resumed()) is not None:
            for name, parameter in lacking.items():
                saved = checkpoint.name_of(prefix + name, parameter)
                if saved not in checkpoint.names:
                    errors.append(f"{layer}: {NOT_IN_CHECKPOINT}")
                    return
                if saved in checkpoint.entries:  # of several files, another may have it
                    state_dict[prefix + name] = checkpoint.entries[saved]
                    given.add(name)
        if "weight" in given and not given & {"lora_A", "lora_B"} and self.branch_is_trained():
            warnings.warn(PLAIN_UNDER_BRANCH, stacklevel=2)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def branch_is_trained(self) -> bool:
        """Whether B is not zero on a weight that has values; without reading what is sharded."""
        b = self.lora_B
        return not (self.weight.is_meta or b.is_meta or is_dtensor(b)) and bool(b.detach().any())

    def extra_repr(self) -> str:
        """Rank, alpha and whatever differs from the defaults."""
        text = f"r={self.r}, alpha={self.alpha}, scaling={self.scaling:g}"
        if self.dropout:
            text += f", dropout={self.dropout}"
        if self.rslora:
            text += ", rslora=True"
        if self.dora:
            text += ", dora=True"
        if self.copy_input:
            text += ", copy_input=True"
        return text + (", merged=True" if self.merged else "")
