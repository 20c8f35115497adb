"""Swapping a model's modules for fasttx's, in place, and back."""

from .explain import Explanation, Row, explain
from .swap import optimize, restore

__all__ = ["Explanation", "Row", "explain", "optimize", "restore"]
