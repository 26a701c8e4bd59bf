"""XGBoost grows the trees of its own objective with fastce's, and is told of mistakes as it tells of them itself."""

import copy
import json
import pickle

import numpy as np
import pytest
from boosted import (
    CLASSES,
    FACTORS,
    GAMMA,
    OPTIONS,
    WEIGHT,
    derivatives,
    digits,
    distributions,
    focal_gradient,
    sample_weights,
)
from sklearn.base import clone
from sklearn.metrics import log_loss

xgb = pytest.importorskip("xgboost")

from fastce.integrations import _library  # noqa: E402
from fastce.integrations import xgboost as ours  # noqa: E402

ROUNDS = 8
PARAMETERS = {"objective": "multi:softprob", "num_class": CLASSES, "max_depth": 5, "nthread": 1}


def train(data, **how):
    return xgb.train(PARAMETERS | how.pop("parameters", {}), data, ROUNDS, **how)


def assert_same_trees(one, other):
    shape = ["Tree", "Node", "Feature", "Split", "Yes", "No", "Missing"]
    one, other = one.trees_to_dataframe(), other.trees_to_dataframe()
    assert one[shape].equals(other[shape])
    leaves = one.Feature == "Leaf"  # of a leaf, this is its value
    np.testing.assert_allclose(one.Gain[leaves], other.Gain[leaves], rtol=1e-4, atol=1e-6)
    assert leaves.sum() > 10 * one.Tree.nunique() / 2


@pytest.fixture
def scores(rng):
    return rng.normal(0, 3, (200, CLASSES)).astype(np.float32)


@pytest.fixture
def labels(rng):
    return rng.integers(0, CLASSES, 200)


@pytest.mark.parametrize("depth", [3, 6])
def test_digits_grow_the_trees_of_the_built_in_objective(depth):
    images, labels = digits(1797)
    data, shape = xgb.DMatrix(images, label=labels), {"max_depth": depth}
    start = {"base_score": ours.base_score(labels, CLASSES)}
    built_in = train(data, parameters=shape)
    fastce_s = train(data, parameters=shape | start, obj=ours.softmax_objective(CLASSES))
    assert_same_trees(built_in, fastce_s)
    np.testing.assert_allclose(fastce_s.predict(data), built_in.predict(data), atol=1e-5)


def test_weights_of_samples_and_of_classes_grow_the_trees_of_the_built_in_objective():
    images, labels = digits()
    weights = sample_weights(len(labels))
    start = {"base_score": 0.5}
    built_in = train(xgb.DMatrix(images, label=labels, weight=weights * WEIGHT[labels]), parameters=start)
    data = xgb.DMatrix(images, label=labels, weight=weights)
    fastce_s = train(data, parameters=start, obj=ours.softmax_objective(CLASSES, weight=WEIGHT))
    assert_same_trees(built_in, fastce_s)


def test_the_scikit_learn_api_grows_the_same_trees():
    images, labels = digits()
    weights = sample_weights(len(labels))
    start = ours.base_score(labels, CLASSES, weights)
    model = xgb.XGBClassifier(
        objective=ours.softmax_objective(CLASSES), n_estimators=ROUNDS, max_depth=5, n_jobs=1, base_score=start
    )
    clone(model).fit(images, labels, sample_weight=weights)  # as a grid search does
    model = pickle.loads(pickle.dumps(model.fit(images, labels, sample_weight=weights)))
    built_in = xgb.XGBClassifier(n_estimators=ROUNDS, max_depth=5, n_jobs=1)
    built_in.fit(images, labels, sample_weight=weights)
    assert_same_trees(built_in.get_booster(), model.get_booster())
    np.testing.assert_allclose(model.predict_proba(images), built_in.predict_proba(images), atol=1e-5)


def test_distributions_may_be_labels_or_targets():
    images, labels = digits()
    start = {"base_score": 0.5}
    objective = ours.softmax_objective(CLASSES)
    soft = xgb.DMatrix(images, label=distributions(labels))
    as_labels = xgb.train({"max_depth": 5, "nthread": 1, **start}, soft, ROUNDS, obj=objective)
    objective = ours.softmax_objective(CLASSES, targets=soft.get_label())
    as_targets = train(xgb.DMatrix(images, label=labels), parameters=start, obj=objective)
    assert_same_trees(as_labels, as_targets)
    # Every sample twice, once a class, with the class's share as its weight, is the same loss.
    twice = xgb.DMatrix(
        np.repeat(images, 2, axis=0), label=np.stack([labels, (labels + 1) % CLASSES], axis=1).ravel(),
        weight=np.tile([0.8, 0.2], len(labels)),
    )  # fmt: skip
    built_in = train(twice, parameters=start)
    # Candidate splits are quantiles of the samples: the same for both, as digits have 17 shades.
    np.testing.assert_allclose(
        as_targets.predict(soft, output_margin=True), built_in.predict(soft, output_margin=True), atol=1e-4
    )


@pytest.mark.parametrize("hessian", FACTORS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives_are_those_of_the_formula(hessian, options, weighted, scores, labels):
    options, mass = OPTIONS[options](labels)
    weights = sample_weights(len(labels)) if weighted else None
    if weighted:
        mass = mass * weights[:, None]
    objective = ours.softmax_objective(CLASSES, hessian=hessian, **options)
    expected = derivatives(scores, mass, FACTORS[hessian])
    for got in (
        objective(labels.astype(np.float32), scores, weights),
        objective(scores, xgb.DMatrix(np.zeros((len(labels), 1)), label=labels, weight=weights)),
    ):
        for array, exact in zip(got, expected, strict=True):
            assert array.dtype == np.float32 and array.flags.c_contiguous
            np.testing.assert_allclose(array, exact, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("hessian", FACTORS)
def test_a_focal_objective_has_the_gradient_of_the_focal_loss(hessian, scores, labels):
    weights = sample_weights(len(labels))
    objective = ours.softmax_objective(CLASSES, hessian=hessian, focal_gamma=GAMMA, weight=WEIGHT)
    grad, hess = objective(labels, scores, weights)
    factor = (weights * WEIGHT[labels])[:, None]
    np.testing.assert_allclose(grad, factor * focal_gradient(scores, labels), rtol=1e-4, atol=1e-6)
    # Both are those of cross-entropy times the same number for each sample.
    plain_grad, plain_hess = derivatives(scores, np.eye(CLASSES)[labels], FACTORS[hessian])
    np.testing.assert_allclose(hess * plain_grad, grad * plain_hess, rtol=2e-5, atol=1e-9)
    assert (hess > 0).all()


def test_a_focal_exponent_of_zero_is_cross_entropy(scores, labels):
    for one, other in zip(
        ours.softmax_objective(CLASSES, focal_gamma=0)(labels, scores),
        ours.softmax_objective(CLASSES, focal_gamma=1e-9)(labels, scores),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_no_hessian_is_below_the_least_that_the_built_in_objective_gives():
    scores = np.array([[200, 0, 0]], np.float32)
    assert ours.softmax_objective(3)(np.array([0.0]), scores)[1].tolist() == [[np.float32(1e-16)] * 3]


def test_samples_are_learned_from_however_low_their_scores():
    def learned_from(margin, **how):
        margins = np.full((4, 3), margin)
        data = xgb.DMatrix(np.arange(4.0).reshape(-1, 1), label=[0, 1, 0, 1], base_margin=margins)
        parameters = {"num_class": 3, "base_score": 0.0, "max_depth": 1}
        return train(data, parameters=parameters, **how).predict(data, output_margin=True) - margins

    expected = learned_from(0.0)
    assert np.abs(expected).min() > 0.1
    np.testing.assert_allclose(learned_from(-200.0, obj=ours.softmax_objective(3)), expected, atol=1e-4)


def test_the_metric_is_the_built_in_one_and_scikit_learn_s():
    images, labels = digits()
    weights = sample_weights(len(labels))
    parts = slice(400), slice(400, 600)
    sets = [xgb.DMatrix(images[part], label=labels[part], weight=weights[part]) for part in parts]
    history = {}
    model = train(
        sets[0], obj=ours.softmax_objective(CLASSES), custom_metric=ours.log_loss_metric, evals_result=history,
        evals=[(sets[0], "train"), (sets[1], "valid")], verbose_eval=False, parameters={"eval_metric": "mlogloss"},
    )  # fmt: skip
    for values in history.values():
        np.testing.assert_allclose(values["log_loss"], values["mlogloss"], rtol=1e-5)
    expected = log_loss(labels[400:], model.predict(sets[1]), sample_weight=weights[400:], labels=range(CLASSES))
    assert history["valid"]["log_loss"][-1] == pytest.approx(expected, rel=1e-5)
    scores = model.predict(sets[1], output_margin=True)
    assert ours.log_loss_metric(labels[400:], scores, weights[400:]) == pytest.approx(expected, rel=1e-5)

    classifier = xgb.XGBClassifier(
        objective=ours.softmax_objective(CLASSES), n_estimators=3, n_jobs=1, eval_metric=ours.log_loss_metric
    )
    classifier.fit(images[:400], labels[:400], eval_set=[(images[400:], labels[400:])], verbose=False)
    expected = log_loss(labels[400:], classifier.predict_proba(images[400:]), labels=range(CLASSES))
    assert classifier.evals_result()["validation_0"]["log_loss_metric"][-1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("classes", [range(CLASSES), range(CLASSES - 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_base_score_is_what_the_built_in_objective_estimates(classes, weighted):
    images, labels = digits()
    chosen = np.isin(labels, classes)
    weights = sample_weights(int(chosen.sum())) if weighted else None
    model = xgb.train(PARAMETERS, xgb.DMatrix(images[chosen], label=labels[chosen], weight=weights), 1)
    estimated = json.loads(model.save_config())["learner"]["learner_model_param"]["base_score"]
    got = ours.base_score(labels[chosen], CLASSES, weights)
    assert type(got) is list and {type(score) for score in got} == {float}
    np.testing.assert_allclose(got, json.loads(estimated), rtol=2e-6, atol=2e-6)  # estimated in float32


def test_scores_of_any_layout_are_read_and_nothing_is_written_to_them(scores, labels):
    objective = ours.softmax_objective(CLASSES)
    expected = objective(labels, scores)
    kept = scores.copy()
    scores.flags.writeable = False
    wide = np.zeros((len(labels), 2 * CLASSES), np.float32)
    wide[:, ::2] = scores
    for given in (scores, np.asfortranarray(scores), wide[:, ::2], scores.astype(">f4")):
        for got, exact in zip(objective(labels, given), expected, strict=True):
            np.testing.assert_array_equal(got, exact)
    np.testing.assert_array_equal(scores, kept)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_an_objective_survives_pickles_and_copies(again, scores, labels):
    objective = ours.softmax_objective(CLASSES, weight=WEIGHT, label_smoothing=0.1, hessian="exact")
    for got, exact in zip(again(objective)(labels, scores), objective(labels, scores), strict=True):
        np.testing.assert_array_equal(got, exact)
    assert repr(objective) == "fastce.integrations.xgboost.softmax_objective(10, hessian='exact')"


LABELS = {
    "labels from 1 on": (lambda labels: labels + 1, "label.* = 10 is out of range for 10 classes.*pass label - 1"),
    "a negative label": (lambda labels: labels - 1, r"label\[0\] = -1.0; encode them with LabelEncoder"),
    "the ignored id of fastce": (lambda labels: np.where(labels == 3, -100, labels), r"label\[3\] = -100.0"),
    "labels between classes": (lambda labels: labels + 0.5, r"label\[0\] = 0.5; encode them with LabelEncoder"),
    "several labels a sample": (lambda labels: np.eye(4)[labels % 4], r"one class id a sample, 20, got shape"),
}


@pytest.mark.parametrize("mistake", LABELS)
def test_labels_that_are_no_class_ids(mistake):
    change, message = LABELS[mistake]
    labels = np.arange(20) % CLASSES
    objective = ours.softmax_objective(CLASSES)
    scores = np.zeros((20, CLASSES), np.float32)
    with pytest.raises(xgb.core.XGBoostError, match=message):
        objective(scores, xgb.DMatrix(np.zeros((20, 1)), label=change(labels)))
    with pytest.raises(xgb.core.XGBoostError, match=message):
        ours.log_loss_metric(scores, xgb.DMatrix(np.zeros((20, 1)), label=change(labels)))


def test_labels_that_no_float_is():
    with pytest.raises(xgb.core.XGBoostError, match=r"label\[1\] = nan"):
        ours.softmax_objective(3)(np.array([0.0, np.nan]), np.zeros((2, 3), np.float32))
    with pytest.raises(xgb.core.XGBoostError, match="label must be class ids, got <U3; encode them with LabelEncoder"):
        ours.softmax_objective(3)(np.array(["cat", "dog"]), np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(("n_classes", "num_class"), [(CLASSES, None), (CLASSES - 1, CLASSES), (CLASSES, CLASSES + 1)])
def test_another_number_of_classes_than_xgboost_was_told(n_classes, num_class):
    images, labels = digits(50)
    parameters = {"nthread": 1} if num_class is None else PARAMETERS | {"num_class": num_class}
    with pytest.raises(xgb.core.XGBoostError, match=f"set num_class={n_classes} in the parameters"):
        xgb.train(parameters, xgb.DMatrix(images, label=labels), 1, obj=ours.softmax_objective(n_classes))


def test_base_score_of_labels_that_are_no_class_ids():
    for labels in ([0, 3], [0, -1], [0.5], []):
        with pytest.raises(xgb.core.XGBoostError, match="label must"):
            ours.base_score(labels, 3)


WRONG = [
    ({"n_classes": 1}, ValueError, "n_classes must be at least 2, got 1"),
    ({"n_classes": 2.5}, TypeError, "n_classes must be an integer, got 2.5"),
    ({"hessian": "catboost"}, ValueError, "hessian must be one of .'exact', 'xgboost', 'lightgbm'., got 'catboost'"),
    ({"label_smoothing": 2}, ValueError, r"label_smoothing must be in \[0, 1\], got 2"),
    ({"weight": [1, 2]}, ValueError, r"weight must have the shape of the classes, \(3,\), got \(2,\)"),
    ({"weight": [1, 2, -3]}, ValueError, "weight must be finite and >= 0"),
    ({"focal_gamma": -1}, ValueError, "focal_gamma must be finite and >= 0, got -1"),
    ({"focal_gamma": 1, "label_smoothing": 0.1}, ValueError, "focal_gamma goes only with class ids"),
    ({"focal_gamma": 1, "targets": np.eye(3)}, ValueError, "focal_gamma goes only with class ids"),
    ({"targets": np.ones((5, 4))}, ValueError, r"targets must be distributions of shape \(n, 3\), got shape \(5, 4\)"),
    ({"targets": [0, 1, 2]}, ValueError, r"targets must be distributions of shape \(n, 3\), got shape \(3,\)"),
    ({"num_threads": 0}, ValueError, "num_threads must be >= 1 or None, got 0"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_options_out_of_range_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        ours.softmax_objective(**{"n_classes": 3} | options)


def test_targets_of_another_data_set_are_refused():
    objective = ours.softmax_objective(3, targets=np.full((5, 3), 1 / 3))
    with pytest.raises(xgb.core.XGBoostError, match=r"targets .* are of 5 samples, the data set has 4"):
        objective(np.zeros(4), np.zeros((4, 3), np.float32))


def test_integer_scores_are_refused():
    with pytest.raises(TypeError, match=r"logits must be a .* array, got int64"):
        ours.softmax_objective(3)(np.zeros(4), np.zeros((4, 3), np.int64))


def test_a_missing_library_is_named_with_the_extra_that_brings_it(run_python):
    code = 'import sys; sys.modules["xgboost"] = None; import fastce.integrations.xgboost'
    done = run_python("-c", code, check=False)
    assert 'needs xgboost>=2.1, which is not installed: pip install "fastce[xgboost]"' in done.stderr


def test_an_old_library_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr(_library, "version", lambda package: "1.7.6")
    with pytest.raises(ImportError, match=r'needs xgboost>=2.1, got 1.7.6: pip install "fastce\[xgboost\]"'):
        _library.require("xgboost", "xgboost", "xgboost", "2.1")
    monkeypatch.setattr(_library, "version", lambda package: "2.10.0rc1")
    _library.require("xgboost", "xgboost", "xgboost", "2.1")


def test_fastce_alone_imports_no_library(run_python):
    code = "import sys, fastce, fastce.integrations.xgboost; assert not {'xgboost', 'scipy', 'pandas'} & {*sys.modules}"
    run_python("-c", code)
