"""LightGBM: multiclass, the objective of its tests in NumPy, and fastce's; a whole training, and one call."""

from ._boosting import ROUNDS, data, numpy_derivatives, titled
from .case import FASTCE, Case

NAME = "LightGBM"
PACKAGES = ("lightgbm", "scikit-learn")
NUMPY = "NumPy"
BUILT_IN = "multiclass"


def cases(quick, threads):
    import lightgbm
    import numpy as np

    from fastce.integrations.lightgbm import init_score, softmax_objective

    def in_numpy(scores, dataset):
        classes = scores.shape[1]
        return numpy_derivatives(scores, dataset.get_label(), classes / (classes - 1))

    for name, (features, labels, classes) in data(quick).items():
        start = init_score(labels, classes)
        # Constructed once: the bins of the features are no part of the training.
        own, ours = (
            lightgbm.Dataset(features, label=labels, init_score=given, free_raw_data=False).construct()
            for given in (None, start)
        )
        parameters = {"num_class": classes, "num_threads": threads, "verbose": -1, "deterministic": True}
        rounds = 2 if quick else ROUNDS[name]

        def train(objective, dataset, first, features=features, parameters=parameters, rounds=rounds):
            model = lightgbm.train(parameters | {"objective": objective, "force_row_wise": True}, dataset, rounds)
            return model.predict(features[:1000], raw_score=True) + first

        objective, prior = softmax_objective(classes), start[:1]
        ways = {
            BUILT_IN: lambda train=train, own=own: train(BUILT_IN, own, 0.0),
            FASTCE: lambda train=train, ours=ours, o=objective, prior=prior: train(o, ours, prior),
            NUMPY: lambda train=train, ours=ours, prior=prior: train(in_numpy, ours, prior),
        }
        yield Case(titled(name, features, classes, f"{rounds} rounds"), ways, relative=1e-9, aims={BUILT_IN: 1 / 1.1})

        scores = np.asfortranarray(np.random.default_rng(0).normal(0, 2, (len(features), classes)))
        calls = {
            NUMPY: lambda scores=scores, ours=ours: _as_lightgbm_takes_them(in_numpy(scores, ours)),
            FASTCE: lambda scores=scores, ours=ours, o=objective: _as_lightgbm_takes_them(o(scores, ours)),
        }
        title = titled(name, features, classes, "the objective alone")
        yield Case(title, calls, relative=1e-6, absolute=1e-7, aims={NUMPY: 5.0})


def _as_lightgbm_takes_them(derivatives):
    """Flat float32, class by class: for an array in C order a copy that is part of the price."""
    return tuple(array.ravel(order="F").astype("f4", copy=False) for array in derivatives)
