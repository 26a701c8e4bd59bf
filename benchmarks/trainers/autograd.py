"""autograd: a gradient step of a linear classifier, against the loss as autograd's own examples write it."""

import numpy

from .case import FASTCE, Case

NAME = "autograd"
PACKAGES = ("autograd",)
BUILT_IN = "logsumexp by hand"
LINEAR = ((512, 64, 32000), (1024, 64, 1000), (32, 64, 10))
QUICK_LINEAR = ((16, 8, 300),)


def cases(quick, threads):
    for shape in QUICK_LINEAR if quick else LINEAR:
        rows, features, classes = shape
        yield Case(
            f"gradient step, {rows} rows of {features} features, {classes:,} classes",
            {name: step(loss, *shape) for name, loss in losses().items()},
            relative=1e-4,
        )


def losses():
    import autograd.numpy as np
    from autograd.scipy.special import logsumexp

    from fastce.integrations.autograd import cross_entropy

    def by_hand(logits, targets):
        return np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(targets)), targets])

    return {BUILT_IN: by_hand, FASTCE: cross_entropy}


def step(loss, rows, features, classes):
    import autograd.numpy as np
    from autograd import value_and_grad

    generator = numpy.random.default_rng(0)
    x = generator.standard_normal((rows, features), dtype=numpy.float32)
    w = numpy.float32(0.1) * generator.standard_normal((features, classes), dtype=numpy.float32)
    targets = generator.integers(0, classes, rows)
    gradient = value_and_grad(lambda w: loss(np.dot(x, w), targets))

    def run():
        value, by_w = gradient(w)
        return value, w - numpy.float32(0.1) * by_w

    return run
