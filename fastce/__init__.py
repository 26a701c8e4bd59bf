"""fastce: cross-entropy and its gradient on the CPU, fast and exact, for people who train with NumPy."""

from fastce import reference
from fastce._engine import build_info
from fastce._version import __version__
from fastce.losses import cross_entropy, cross_entropy_with_grad

__all__ = ["__version__", "build_info", "cross_entropy", "cross_entropy_with_grad", "reference"]
