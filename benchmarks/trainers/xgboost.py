"""XGBoost: multi:softprob, the objectives of its documents in NumPy, and fastce's; a whole training, and one call."""

from ._boosting import ROUNDS, data, looped_derivatives, numpy_derivatives, titled
from .case import FASTCE, Case

NAME = "XGBoost"
PACKAGES = ("xgboost", "scikit-learn")
LOOPED = "loop over rows, as in the documents"
NUMPY = "NumPy"
BUILT_IN = "multi:softprob"


def cases(quick, threads):
    import xgboost

    from fastce.integrations.xgboost import base_score, softmax_objective

    def in_numpy(scores, matrix):
        return numpy_derivatives(scores, matrix.get_label(), 2.0)

    def looped(scores, matrix):
        return looped_derivatives(scores, matrix.get_label(), 2.0)

    for name, (features, labels, classes) in data(quick).items():
        matrix = xgboost.DMatrix(features, label=labels)
        parameters = {
            "objective": BUILT_IN, "num_class": classes, "nthread": threads, "base_score": base_score(labels, classes)
        }  # fmt: skip
        rounds = 2 if quick else ROUNDS[name]

        def train(objective=None, matrix=matrix, parameters=parameters, rounds=rounds):
            model = xgboost.train(parameters, matrix, rounds, obj=objective)
            return model.predict(matrix)

        objective = softmax_objective(classes)
        ways = {
            BUILT_IN: train,
            FASTCE: lambda train=train, objective=objective: train(objective),
            NUMPY: lambda train=train: train(in_numpy),
        }
        aims = {BUILT_IN: 1 / 1.1}
        if name == "digits":
            ways[LOOPED] = lambda train=train: train(looped)
        yield Case(titled(name, features, classes, f"{rounds} rounds"), ways, absolute=1e-4, aims=aims)

        scores = xgboost.train(parameters, matrix, 1).predict(matrix, output_margin=True)
        calls = {
            NUMPY: lambda scores=scores, matrix=matrix: in_numpy(scores, matrix),
            FASTCE: lambda scores=scores, matrix=matrix, objective=objective: objective(scores, matrix),
            LOOPED: lambda scores=scores, matrix=matrix: looped(scores, matrix),
        }
        title = titled(name, features, classes, "the objective alone")
        yield Case(title, calls, relative=1e-4, absolute=2e-6, aims={LOOPED: 5.0})
