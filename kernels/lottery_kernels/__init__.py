"""Sparse layers that skip what a lottery ticket has pruned: drop-in `SparseLinear` and `SparseConv2d`, and `sparsify`,
which puts them into a whole model where they are faster."""

from .convert import choices, dense_state_dict, densify, sparsify
from .layers import SparseConv2d, SparseLinear
from .optimizer_state import dense_optimizer_state_dict, load_dense_optimizer_state_dict
from .pattern import Grid, Pattern
from .replay import Replayed

__all__ = [
    "Grid",
    "Pattern",
    "Replayed",
    "SparseConv2d",
    "SparseLinear",
    "choices",
    "dense_optimizer_state_dict",
    "dense_state_dict",
    "densify",
    "load_dense_optimizer_state_dict",
    "sparsify",
]
