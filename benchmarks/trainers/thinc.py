"""thinc: a training step of a model that ends in Softmax with thinc's loss, or in Linear with fastce's."""

import numpy

from .case import FASTCE, Case

NAME = "thinc"
PACKAGES = ("thinc",)
BUILT_IN = "CategoricalCrossentropy"
# thinc makes an array of classes x classes of class ids, so for many classes it gets one-hot rows, and few of them.
LINEAR = ((64, 64, 32000), (1024, 64, 1000), (32, 64, 10))
QUICK_LINEAR = ((16, 8, 300),)
MANY_CLASSES = 10000


def cases(quick, threads):
    from thinc.api import CategoricalCrossentropy, Linear, Softmax

    from fastce.integrations.thinc import CrossEntropy

    for rows, features, classes in QUICK_LINEAR if quick else LINEAR:
        targets = "one-hot rows" if classes > MANY_CLASSES else "class ids"
        yield Case(
            f"SGD step, {rows} rows of {features} features, {classes:,} classes, {targets}",
            {
                BUILT_IN: step(CategoricalCrossentropy(), Softmax, rows, features, classes),
                FASTCE: step(CrossEntropy(), Linear, rows, features, classes),
            },
            relative=1e-4,
        )


def step(loss, layer, rows, features, classes):
    """Return a function that does one step, the same each time, and returns the weights after it."""
    from thinc.api import SGD

    generator = numpy.random.default_rng(0)
    x = generator.standard_normal((rows, features), dtype=numpy.float32)
    w = numpy.float32(0.1) * generator.standard_normal((classes, features), dtype=numpy.float32)
    truths = generator.integers(0, classes, rows)
    if classes > MANY_CLASSES:
        one_hot = numpy.zeros((rows, classes), numpy.float32)
        one_hot[numpy.arange(rows), truths] = 1
        truths = one_hot
    model = layer(classes, features)
    model.initialize()
    optimizer = SGD(0.1, grad_clip=0.0)

    def run():
        model.set_param("W", w.copy())
        model.set_param("b", numpy.zeros(classes, numpy.float32))
        guesses, backprop = model.begin_update(x)
        backprop(loss(guesses, truths)[0])
        model.finish_update(optimizer)
        return model.get_param("W")

    return run
