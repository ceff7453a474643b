"""Small nets for tests of conversion, and their masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


def small_net(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Sequential:
    """A convolution, BatchNorm, dropout and two linear layers, for images `[N, 3, 6, 6]`.

    Dropout draws in the order of memory, another one behind a sparse layer: it is off where nets are compared.
    """
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 20),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(20, 5, bias=False),
    ).to(dtype)


def images(batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 6, 6, dtype=dtype)


def random_masks(model: nn.Module, density: float = 0.3) -> dict[str, Tensor]:
    """A mask for every linear and convolution layer, shared ones once."""
    named = model.named_modules()
    return {
        name: torch.rand_like(layer.weight) < density for name, layer in named if type(layer) in (nn.Linear, nn.Conv2d)
    }


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Masks the layers with `torch.nn.utils.prune`."""
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", mask)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 5) -> nn.Module:
    """Steps on random images and labels, the same for the same seed."""
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        x, target = images(8, dtype), torch.randint(5, (8,))
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model


def snapshot(model: nn.Module) -> dict:
    """Everything of a model that a failed conversion might have changed, identities included."""
    return {
        "modules": list(model.named_modules(remove_duplicate=False)),
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)],
        "state": {key: value.tolist() for key, value in model.state_dict().items()},
        "hooks": [[*module._forward_pre_hooks] for module in model.modules()],
    }
