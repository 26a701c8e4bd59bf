"""MultinomialLoss stands in for scikit-learn's own loss: the same numbers, and the same fitted coefficients."""

import inspect

import numpy as np
import pytest
from sklearn._loss import HalfMultinomialLoss
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from fastce.integrations import sklearn as ours

CLASSES = 7
METHODS = {
    "loss": ["loss_out"],
    "loss_gradient": ["loss_out", "gradient_out"],
    "gradient": ["gradient_out"],
    "gradient_hessian": ["gradient_out", "hessian_out"],
    "gradient_proba": ["gradient_out", "proba_out"],
}
LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "strided": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
}


@pytest.fixture
def y_true(rng):
    return rng.integers(0, CLASSES, 150)


@pytest.fixture
def raw_prediction(rng, dtype):
    return rng.normal(0, 4, (150, CLASSES)).astype(dtype)


def call(loss, method, *arguments, **buffers):
    result = getattr(loss, method)(*arguments, **buffers)
    return result if isinstance(result, tuple) else (result,)


def tolerance(dtype):
    """Of scikit-learn's results, whose p - 1 and log-sum-exp cancel."""
    return {"rtol": 1e-4, "atol": 2e-6} if dtype == np.float32 else {"rtol": 1e-10, "atol": 1e-13}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_method_gives_the_numbers_of_scikit_learn(method, layout, weighted, y_true, raw_prediction, dtype, rng):
    weights = rng.uniform(0.5, 2, len(y_true)).astype(dtype) if weighted else None
    arguments = y_true.astype(dtype), LAYOUTS[layout](raw_prediction), weights
    expected = call(HalfMultinomialLoss(n_classes=CLASSES), method, *arguments)
    got = call(ours.MultinomialLoss(CLASSES), method, *arguments)
    for array, exact in zip(got, expected, strict=True):
        assert array.dtype == dtype and array.shape == exact.shape
        np.testing.assert_allclose(array, exact, **tolerance(dtype))
    shapes = {"loss_out": (len(y_true),)}
    for out_dtype in (np.float32, np.float64):
        buffers = {name: np.full(shapes.get(name, raw_prediction.shape), 7, out_dtype) for name in METHODS[method]}
        got = call(ours.MultinomialLoss(CLASSES), method, *arguments, **buffers)
        for array, buffer, exact in zip(got, buffers.values(), expected, strict=True):
            assert array is buffer
            np.testing.assert_allclose(array, exact, **tolerance(np.float32))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_call_gives_the_mean_of_scikit_learn(weighted, y_true, raw_prediction, dtype, rng):
    weights = rng.uniform(0.5, 2, len(y_true)).astype(dtype) if weighted else None
    arguments = y_true.astype(dtype), raw_prediction, weights
    expected = HalfMultinomialLoss(n_classes=CLASSES)(*arguments)
    got = ours.MultinomialLoss(CLASSES)(*arguments)
    assert type(got) is float and got == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(
        ours.MultinomialLoss(CLASSES).predict_proba(raw_prediction),
        HalfMultinomialLoss(n_classes=CLASSES).predict_proba(raw_prediction), rtol=1e-5, atol=1e-30,
    )  # fmt: skip


def test_signatures_are_those_of_scikit_learn():
    for method in [*METHODS, "__call__", "predict_proba"]:
        theirs, mine = (getattr(one, method) for one in (HalfMultinomialLoss, ours.MultinomialLoss))
        assert [*inspect.signature(mine).parameters.items()][1:] == [*inspect.signature(theirs).parameters.items()][1:]


def test_gradients_may_take_the_place_of_the_raw_predictions(y_true, raw_prediction):
    loss = ours.MultinomialLoss(CLASSES)
    expected = loss.loss_gradient(y_true, raw_prediction)
    given = raw_prediction.copy()
    got = loss.loss_gradient(y_true, given, gradient_out=given)
    assert got[1] is given
    for array, exact in zip(got, expected, strict=True):
        np.testing.assert_array_equal(array, exact)
    with pytest.raises(ValueError, match="gradient_out must not overlap raw_prediction"):
        loss.gradient_proba(y_true, given, gradient_out=given)
    with pytest.raises(ValueError, match="loss_out overlaps raw_prediction"):
        loss.loss(y_true, given, loss_out=given.reshape(-1)[: len(y_true)])


@pytest.mark.parametrize("method", METHODS)
def test_raw_predictions_may_be_lists(method, y_true, raw_prediction):
    loss = ours.MultinomialLoss(CLASSES)
    expected = call(loss, method, y_true, raw_prediction.astype(np.float64))
    for array, exact in zip(call(loss, method, y_true, raw_prediction.tolist()), expected, strict=True):
        np.testing.assert_array_equal(array, exact)


@pytest.mark.parametrize("method", METHODS)
def test_no_number_of_threads_changes_a_bit(method, y_true, raw_prediction):
    loss = ours.MultinomialLoss(CLASSES)
    expected = call(loss, method, y_true, raw_prediction, n_threads=1)
    for n_threads in (2, None):
        for array, exact in zip(
            call(loss, method, y_true, raw_prediction, n_threads=n_threads), expected, strict=True
        ):
            np.testing.assert_array_equal(array, exact)


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg", "newton-cholesky"])
@pytest.mark.parametrize("weighted", [False, True])
def test_logistic_regression_fits_the_same_coefficients_with_it(solver, weighted, monkeypatch, rng):
    images, labels = load_digits(return_X_y=True)
    images = images[:500, 20:44] / 16
    weights = rng.uniform(0.5, 2, 500) if weighted else None

    def fitted():
        model = LogisticRegression(solver=solver, C=0.1, tol=1e-8, max_iter=5000)
        return model.fit(images, labels[:500], sample_weight=weights)

    expected = fitted()
    made = []

    def loss(**arguments):
        made.append(ours.MultinomialLoss(**arguments))
        return made[-1]

    monkeypatch.setattr("sklearn.linear_model._logistic.HalfMultinomialLoss", loss)
    got = fitted()
    assert made
    # Solvers stop where the gradient is below `tol`, which leaves the coefficients, up to 4 here, some room.
    np.testing.assert_allclose(got.coef_, expected.coef_, atol=1e-5)
    np.testing.assert_allclose(got.intercept_, expected.intercept_, atol=1e-5)
    assert np.abs(expected.coef_).max() > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_wrong_input_is_refused_before_anything_is_written(method, raw_prediction, dtype):
    loss = ours.MultinomialLoss(CLASSES)
    ids = np.zeros(len(raw_prediction), dtype)

    def with_first(value):
        return np.r_[value, ids[1:]].astype(dtype)

    wrong = [
        (with_first(CLASSES), raw_prediction, ValueError, r"y_true\[0\] = 7 is out of range for 7 classes"),
        (with_first(-1), raw_prediction, ValueError, r"y_true\[0\] = -1.0; encode"),
        (with_first(-100), raw_prediction, ValueError, r"y_true\[0\] = -100.0; encode"),
        (with_first(0.5), raw_prediction, ValueError, r"y_true\[0\] = 0.5; encode"),
        (with_first(np.nan), raw_prediction, ValueError, r"y_true\[0\] = nan; encode"),
        (ids[1:], raw_prediction, ValueError, r"y_true must have one class id a sample, 150, got shape \(149,\)"),
        (ids, raw_prediction[:, 1:], ValueError, r"must have the shape \(n_samples, 7\), got \(150, 6\)"),
        (ids, raw_prediction[:, 0], ValueError, r"raw_prediction must have the shape"),
        (ids, raw_prediction.astype(int), TypeError, r"must be a float16.* array, got int64"),
    ]
    for labels, predictions, error, message in wrong:
        shapes = {"loss_out": (150,)}
        buffers = {name: np.full(shapes.get(name, predictions.shape), 7, dtype) for name in METHODS[method]}
        with pytest.raises(error, match=message):
            call(loss, method, labels, predictions, **buffers)
        assert all((buffer == 7).all() for buffer in buffers.values())


@pytest.mark.parametrize("method", METHODS)
def test_wrong_buffers_are_refused_before_anything_is_written(method, y_true, raw_prediction):
    loss, shapes = ours.MultinomialLoss(CLASSES), {"loss_out": (150,)}
    sevens = np.full_like(raw_prediction, 7)
    good = {name: np.full(shapes.get(name, sevens.shape), 7, sevens.dtype) for name in METHODS[method]}
    for name, buffer in good.items():
        read_only = buffer.view()
        read_only.flags.writeable = False
        for wrong in (buffer[1:], np.stack([buffer, buffer]), buffer.astype(int), read_only):
            with pytest.raises((TypeError, ValueError)):
                call(loss, method, y_true, raw_prediction, **good | {name: wrong})
            assert (wrong == 7).all() and all((other == 7).all() for other in good.values())


@pytest.mark.parametrize("method", ["gradient_hessian", "gradient_proba"])
def test_one_buffer_cannot_take_two_results(method, y_true, raw_prediction):
    buffer = np.full_like(raw_prediction, 7)
    with pytest.raises(ValueError, match="overlaps"):
        call(ours.MultinomialLoss(CLASSES), method, y_true, raw_prediction, **dict.fromkeys(METHODS[method], buffer))
    assert (buffer == 7).all()


def test_a_number_of_classes_that_cannot_be():
    with pytest.raises(ValueError, match="n_classes must be at least 2, got 1"):
        ours.MultinomialLoss(1)
    with pytest.raises(TypeError, match=r"n_classes must be an integer, got 2\.5"):
        ours.MultinomialLoss(2.5)


def test_a_missing_library_is_named_with_the_extra_that_brings_it(run_python):
    code = 'import sys; sys.modules["sklearn"] = None; import fastce.integrations.sklearn'
    done = run_python("-c", code, check=False)
    assert 'needs scikit-learn>=1.4, which is not installed: pip install "fastce[sklearn]"' in done.stderr
