"""fastce: cross-entropy and its gradient on the CPU, fast and exact, for people who train with NumPy."""

from fastce import reference
from fastce._engine import build_info
from fastce._version import __version__
from fastce.activations import log_softmax, logsumexp, softmax
from fastce.binary import binary_cross_entropy, binary_cross_entropy_with_grad
from fastce.divergence import kl_divergence, kl_divergence_with_grad
from fastce.focal import focal_loss, focal_loss_with_grad
from fastce.loss_report import LossReport
from fastce.losses import cross_entropy, cross_entropy_with_grad, cross_entropy_with_grad_hess
from fastce.meter import LossMeter, report
from fastce.poly import poly_loss, poly_loss_with_grad
from fastce.prior import init_bias
from fastce.probabilities import binary_cross_entropy_from_probs, cross_entropy_from_probs
from fastce.statistics import CrossEntropyStats, cross_entropy_stats
from fastce.targets import SparseTargets

__all__ = [
    "CrossEntropyStats",
    "LossMeter",
    "LossReport",
    "SparseTargets",
    "__version__",
    "binary_cross_entropy",
    "binary_cross_entropy_from_probs",
    "binary_cross_entropy_with_grad",
    "build_info",
    "cross_entropy",
    "cross_entropy_from_probs",
    "cross_entropy_stats",
    "cross_entropy_with_grad",
    "cross_entropy_with_grad_hess",
    "focal_loss",
    "focal_loss_with_grad",
    "init_bias",
    "kl_divergence",
    "kl_divergence_with_grad",
    "log_softmax",
    "logsumexp",
    "poly_loss",
    "poly_loss_with_grad",
    "reference",
    "report",
    "softmax",
]
