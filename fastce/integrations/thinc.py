"""A thinc loss over logits, for models that end in Linear, that reports the true cross-entropy."""

import numpy as np

import fastce
from fastce.integrations._library import require

require("thinc", "thinc", "thinc", "8.2")

from thinc.config import registry  # noqa: E402 - only now is it known to be there
from thinc.loss import Loss  # noqa: E402 - only now is it known to be there

__all__ = ["CrossEntropy"]


class CrossEntropy(Loss):
    r"""Softmax cross-entropy over logits: the gradient of thinc's ``CategoricalCrossentropy``, without a Softmax layer.

    thinc's own loss takes probabilities, so the model ends in ``Softmax``, and what it reports is the sum of the
    squared gradient [1]_. This one takes what ``Linear`` puts out, and reports the mean of :math:`-\log p` in nats.
    In a configuration it is ``@losses = "fastce.CrossEntropy.v1"``.

    Parameters
    ----------
    normalize : bool, default True
        Divide loss and gradient by the number of rows, those with a missing value included, as thinc does.
    names : sequence of str, optional
        The classes, for truths that are given as strings.
    missing_value : int or str, optional
        Rows with this truth have loss and gradient 0.
    label_smoothing : float, default 0.0
        thinc's: the truth's probability is 1 - label_smoothing, the rest goes to the other classes evenly. Not for
        truths that are distributions.

    Raises
    ------
    TypeError
        Guesses or truths that do not lie on the CPU, or are of a kind that cannot be right.
    ValueError
        Shapes that do not fit; strings without `names`; label smoothing of distributions, or too much of it.
    KeyError
        A truth that is not among the `names`.
    IndexError
        A class id out of range.

    References
    ----------
    .. [1] https://thinc.ai/docs/api-loss

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.integrations.thinc import CrossEntropy
    >>> guesses = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype="f")
    >>> d_guesses, loss = CrossEntropy(names=["cat", "dog", "owl"])(guesses, ["cat", "owl"])
    >>> print(f"{loss:.6f}")
    0.669079
    >>> d_guesses.round(4)
    array([[-0.1065,  0.0533,  0.0533],
           [ 0.1667,  0.1667, -0.3333]], dtype=float32)
    """

    def __init__(self, *, normalize=True, names=None, missing_value=None, label_smoothing=0.0):
        self.normalize = normalize
        self.names = names
        self.missing_value = missing_value
        self.label_smoothing = label_smoothing
        self.ids = None if names is None else {name: number for number, name in enumerate(names)}

    def __call__(self, guesses, truths):
        """Return (gradient, loss) of guesses (N, C) and truths: class ids, names, or a distribution a row (N, C)."""
        loss, d_guesses = self.compute(fastce.cross_entropy_with_grad, guesses, truths)
        return d_guesses, loss

    def get_grad(self, guesses, truths):
        """Return the gradient alone."""
        return self(guesses, truths)[0]

    def get_loss(self, guesses, truths):
        """Return the loss alone."""
        return self.compute(fastce.cross_entropy, guesses, truths)

    def compute(self, function, guesses, truths):
        guesses, n_rows = on_cpu("guesses", guesses), len(guesses)
        options = {"reduction": "mean", "denominator": n_rows} if self.normalize and n_rows else {"reduction": "sum"}
        if is_distribution(truths):
            targets = on_cpu("truths", truths)
            if targets.dtype.kind in "iub":  # one-hot rows
                targets = targets.astype(np.float32)
            options["sample_weight"] = self.counts(targets)
            if self.label_smoothing:
                raise ValueError("label_smoothing goes only with class ids and names, got a distribution a row")
        else:
            targets, options["ignore_index"] = self.class_ids(truths)
            options["label_smoothing"] = spread_over_all(self.label_smoothing, guesses.shape[-1])
        return function(guesses, targets, **options)

    def counts(self, distributions):
        """Return which distributions count, as weights: those whose largest class is not the missing value."""
        if self.missing_value is None:
            return None
        return (distributions.argmax(axis=-1) != self.missing_value).astype(np.float32)

    def class_ids(self, truths):
        """Return (class ids (N,), the id of rows that are missing or None)."""
        if len(truths) and isinstance(truths[0], str):
            if self.ids is None:
                raise ValueError("truths are strings, so the classes are needed: CrossEntropy(names=['cat', 'dog'])")
            missing = -1
            return np.array([missing if name == self.missing_value else self.ids[name] for name in truths]), missing
        ids = np.asarray(on_cpu("truths", truths) if hasattr(truths, "dtype") else list(truths))
        return ids.astype(np.int64) if ids.size == 0 else ids, self.missing_value


def is_distribution(truths):
    return getattr(truths, "ndim", 1) == 2


def on_cpu(name, array):
    """Return `array` if it is NumPy's."""
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{name} must be a numpy array, got {type(array).__module__}.{type(array).__name__}; "
            "on a GPU use thinc.loss.CategoricalCrossentropy, or NumpyOps"
        )
    return array


def spread_over_all(smoothing, n_classes):
    """Return fastce's label_smoothing, which is spread over all classes, for thinc's, spread over the wrong ones."""
    if not smoothing:
        return 0.0
    most = (n_classes - 1) / n_classes
    if not 0 < smoothing < most:
        raise ValueError(f"label_smoothing must be >= 0 and < {most:.6g} for {n_classes} classes, got {smoothing}")
    return smoothing / most


@registry.losses("fastce.CrossEntropy.v1")
def configure_cross_entropy(
    *, normalize: bool = True, names: list[str] | None = None, missing_value: int | str | None = None,
    label_smoothing: float = 0.0,
):
    return CrossEntropy(
        normalize=normalize, names=names, missing_value=missing_value, label_smoothing=label_smoothing
    )
