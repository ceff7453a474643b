"""Sparse layers that skip what a lottery ticket has pruned: drop-in `SparseLinear` and `SparseConv2d`."""

from .layers import SparseConv2d, SparseLinear
from .pattern import Pattern

__all__ = ["Pattern", "SparseConv2d", "SparseLinear"]
