"""Dense masked layers: `weight = weight_orig × weight_mask` before every forward, as `torch.nn.utils.prune` does it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import prune


def prune_hooks(module: nn.Module, name: str = "weight") -> list[int]:
    """Keys of the forward pre-hooks by which `torch.nn.utils.prune` masks the tensor `name` of `module`."""
    hooks = module._forward_pre_hooks.items()
    return [key for key, hook in hooks if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name]


def prune_mask(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The bool mask of a tensor that `torch.nn.utils.prune` masks, True where it remains; None if it masks it not."""
    return module.get_buffer(f"{name}_mask") != 0 if prune_hooks(module, name) else None


def leaf(module: nn.Module, name: str = "weight") -> nn.Parameter:
    """What trains: the parameter `name`, or its `_orig` where it is masked."""
    return getattr(module, f"{name}_orig" if prune_hooks(module, name) else name)


def in_force(module: nn.Module, name: str = "weight") -> Tensor:
    """The tensor that the next forward will use, zero where pruned; the attribute itself is that of the last one."""
    trained, mask = leaf(module, name).detach(), prune_mask(module, name)
    return trained if mask is None else zero_pruned(trained * module.get_buffer(f"{name}_mask"), mask)


def zero_pruned(dense: Tensor, mask: Tensor) -> Tensor:
    """`dense` with zeros outside the mask, where NaN and infinities vanish too."""
    return dense.where(mask.to(dense.device), dense.new_zeros(()))


def put_mask(module: nn.Module, mask: Tensor) -> None:
    """Makes a dense layer a dense masked one. Its parameters keep their order."""
    weight = leaf(module)
    prune.custom_from_mask(module, "weight", mask.to(weight.device, weight.dtype))  # type: ignore[arg-type]
    _bias_last(module)


def remove_mask(module: nn.Module) -> None:
    """Makes a dense masked layer a plain one with zeros where it is pruned; the `Parameter` stays the same."""
    leaf(module).data = in_force(module)
    prune.remove(module, "weight")
    _bias_last(module)


def _bias_last(module: nn.Module) -> None:
    """Optimizers and their checkpoints count parameters: `weight` comes before `bias`, whatever its name just now."""
    if "bias" in module._parameters:
        module._parameters["bias"] = module._parameters.pop("bias")
