"""Swapping a model's modules for fasttx's, in place, and back."""

from .explain import Explanation, Row, explain
from .parity import Parity, parity
from .swap import optimize, restore

__all__ = ["Explanation", "Parity", "Row", "explain", "optimize", "parity", "restore"]
