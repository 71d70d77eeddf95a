"""A LoRA layer's branch folded into its weight and out again."""

import torch
from torch import Tensor, nn

from fastlora.dora import weight_norm
from fastlora.placement import forget, store, stored, unusable

MAGNITUDE = "lora_magnitude_vector"
MERGE_READS = ("weight", "lora_A", "lora_B", MAGNITUDE)  # the last of a DoRA layer alone


class Merging(nn.Module):
    """The part of a LoRA layer that merges. A subclass whose weight lies in another way, or elsewhere, says how."""

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    dora = False
    merged: bool

    def place(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a tensor of the layer, and the tensor's name there."""
        return self, name

    @property
    def weight_rows(self) -> Tensor:
        """The weight as [out_features, in_features], however it lies in memory."""
        return self._rows(self.weight)

    @staticmethod
    def _rows(weight: Tensor) -> Tensor:
        return weight

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What trains and is saved, by name: lora_A, lora_B and a DoRA layer's magnitude."""
        names = ("lora_A", "lora_B", MAGNITUDE) if self.dora else ("lora_A", "lora_B")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scaling·B·A in the weight's shape, and with a magnitude its rows scaled, computed in float32 at least and
        rounded once to W's dtype."""
        weight = stored(*self.place("weight"))
        merged = self._add_branch(weight, self.scaling)
        return (self._scale_rows(merged, self._magnitude_over(self._norm())) if self.dora else merged).to(weight.dtype)

    def _add_branch(self, weight: Tensor, factor: float) -> Tensor:
        """The weight as it lies, widened to float32 at least, and factor·B·A."""
        a, b = stored(self, "lora_A"), stored(self, "lora_B")
        compute = torch.promote_types(weight.dtype, torch.float32)
        return torch.addmm(weight.to(compute), b.to(compute), a.to(compute), alpha=factor)

    def _scale_rows(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Each output's numbers of a weight, as it lies, times one of scale [out_features]."""
        return weight * scale[:, None]

    def _norm(self) -> Tensor:
        """The norms [out_features] of the rows of the frozen weight and its branch."""
        return weight_norm(
            self._rows(stored(*self.place("weight"))), stored(self, "lora_A"), stored(self, "lora_B"), self.scaling
        )

    def _magnitude_over(self, norm: Tensor) -> Tensor:
        return stored(self, MAGNITUDE).to(norm.dtype) / norm

    @torch.no_grad()
    def merge(self, safe: bool = False, keep_base: bool = True) -> None:
        """Adds the branch to the weight, so that the forward is one ``F.linear``. A merged layer is left as it is.

        The merged weight is a new tensor: a weight shared with another layer keeps its value there. A layer that
        accelerate has offloaded is merged in accelerate's map, in CPU memory; its files on disk stay as they are.

        Args:
            safe: refuse a result that is not finite, and leave the layer as it was.
            keep_base: hold the frozen weight, so that ``unmerge`` restores it bit by bit. Otherwise its memory is
                released (to serve only, say), and ``unmerge`` subtracts the branch, which is exact to rounding.

        Raises:
            ValueError: ``safe`` and the merged weight has elements that are not finite; or the weight is sharded,
                computed, or a placeholder.
        """
        if self.merged:
            return
        if reason := unusable(self, MERGE_READS, writes="weight"):
            raise ValueError(reason)
        merged = self.merged_weight()
        if safe and not torch.isfinite(merged).all():
            count = int((~torch.isfinite(merged)).sum())
            raise ValueError(
                f"merging gives {count} elements of the {list(merged.shape)} weight that are not finite; "
                "the layer is left unmerged: look for NaN or overflow in lora_A and lora_B"
            )
        if keep_base:
            # What unmerge() puts back. A buffer follows .to(); one that is not persistent is in no checkpoint.
            self.register_buffer("_base_weight", stored(*self.place("weight")).detach(), persistent=False)
        elif self.dora:
            self.register_buffer("_merged_norm", self._norm(), persistent=False)
        store(*self.place("weight"), merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the frozen weight. A layer that is not merged is left as it is.

        Raises:
            ValueError: the weight has been sharded or became a placeholder since it was merged; or a DoRA layer of
            which the frozen weight is not held has a magnitude of 0.
        """
        if not self.merged:
            return
        if reason := unusable(self, MERGE_READS, writes="weight"):
            raise ValueError(reason)
        base = self._buffers.get("_base_weight")
        store(*self.place("weight"), self._without_branch() if base is None else base)
        self._drop_base()
        self.merged = False

    def _without_branch(self) -> Tensor:
        weight = stored(*self.place("weight"))
        plain = weight
        if self.dora:
            scale = self._magnitude_over(self._buffers["_merged_norm"])  # type: ignore[arg-type]
            if not scale.all():
                raise ValueError("a magnitude is 0, and the frozen weights behind it are gone: load them again")
            plain = self._scale_rows(weight.to(scale.dtype), 1 / scale)
        return self._add_branch(plain, -self.scaling).to(weight.dtype)

    def _drop_base(self) -> None:
        for name in ("_base_weight", "_merged_norm"):
            if name in self._buffers:
                delattr(self, name)
                forget(self, name)
