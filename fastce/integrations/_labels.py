"""Labels as other libraries keep them, which is mostly as floats, made into class ids."""

import numpy as np


def as_class_ids(name, labels, n_samples, error):
    """Return `labels`, of shape (n,) or (n, 1), as integers (n,) that are not negative, or raise an `error`.

    That none is too large is left to the loss. A negative one must not get there: it might be one that is ignored.
    """
    labels = np.asarray(labels)
    if labels.shape == (n_samples, 1):
        labels = labels[:, 0]
    if labels.shape != (n_samples,):
        raise error(f"{name} must have one class id a sample, {n_samples}, got shape {labels.shape}")
    ids = labels
    if labels.dtype.kind not in "iu":
        if labels.dtype.kind != "f":
            raise error(f"{name} must be class ids, got {labels.dtype}; encode them with LabelEncoder")
        with np.errstate(invalid="ignore"):
            ids = labels.astype(np.int64)
    if ids.size and (ids.min() < 0 or (ids is not labels and (ids != labels).any())):
        first = int(((ids < 0) | (ids != labels)).argmax())
        raise error(
            f"{name} must be class ids, whole numbers from 0 on, got {name}[{first}] = {labels[first]}; "
            "encode them with LabelEncoder"
        )
    return ids
