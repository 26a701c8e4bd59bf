"""scikit-learn: the loss inside LogisticRegression, alone and in a whole fit by SciPy's L-BFGS."""

from .case import FASTCE, Case

NAME = "scikit-learn"
PACKAGES = ("scikit-learn", "scipy")
# Samples, features and classes: digits, and a vocabulary.
SIZES = {"digits": (1797, 64, 10), "wide": (3000, 40, 1000)}
QUICK_SIZES = {"digits": (300, 64, 10), "wide": (300, 10, 50)}
REGULARISATION = 1e-3
ITERATIONS = {"digits": 100, "wide": 15}


def cases(quick, threads):
    import numpy as np
    from scipy.optimize import minimize
    from sklearn._loss import HalfMultinomialLoss
    from sklearn.datasets import load_digits
    from sklearn.linear_model._linear_loss import LinearModelLoss

    from fastce.integrations.sklearn import MultinomialLoss

    rng = np.random.default_rng(0)
    for name, (samples, features, classes) in (QUICK_SIZES if quick else SIZES).items():
        if name == "digits":
            x, y = load_digits(return_X_y=True)
            x, y = x[:samples] / 16, y[:samples].astype(float)
        else:
            x = rng.standard_normal((samples, features))
            y = (x @ rng.standard_normal((features, classes))).argmax(axis=1).astype(float)
        iterations = 5 if quick else ITERATIONS[name]

        def fit(loss, n_threads, x=x, y=y, classes=classes, iterations=iterations):
            model = LinearModelLoss(base_loss=loss, fit_intercept=True)
            start = np.zeros(classes * (x.shape[1] + 1))
            found = minimize(
                model.loss_gradient, start, jac=True, args=(x, y, None, REGULARISATION, n_threads), method="L-BFGS-B",
                options={"maxiter": iterations},
            )  # fmt: skip
            return found.fun

        own, ours = HalfMultinomialLoss(n_classes=classes), MultinomialLoss(classes)
        built_in = "HalfMultinomialLoss, 1 thread (as LogisticRegression)"
        ways = {
            built_in: lambda fit=fit, own=own: fit(own, 1),
            FASTCE: lambda fit=fit, ours=ours: fit(ours, threads),
            "all threads": lambda fit=fit, own=own: fit(own, threads),
        }
        title = f"{name} ({samples:,} samples, {features} features, {classes} classes)"
        yield Case(f"{title}, {iterations} steps of L-BFGS", ways, relative=1e-6, aims={built_in: 1.0})

        raw = rng.normal(0, 2, (samples, classes))
        ways = {
            built_in: lambda own=own, y=y, raw=raw: own.loss_gradient(y, raw, n_threads=1),
            FASTCE: lambda ours=ours, y=y, raw=raw: ours.loss_gradient(y, raw, n_threads=threads),
            "all threads": lambda own=own, y=y, raw=raw: own.loss_gradient(y, raw, n_threads=threads),
        }
        yield Case(f"{title}, loss and gradient alone", ways, relative=1e-9, absolute=1e-12, aims={built_in: 1.0})
