"""LightGBM grows the trees of its own objective with fastce's, and is told of mistakes as it tells of them itself."""

import copy
import pickle

import numpy as np
import pytest
from boosted import CLASSES, FACTORS, GAMMA, OPTIONS, WEIGHT, derivatives, digits, focal_gradient, sample_weights
from sklearn.base import clone
from sklearn.metrics import log_loss

import fastce

lgb = pytest.importorskip("lightgbm")

from fastce.integrations import lightgbm as ours  # noqa: E402

ROUNDS = 8
PARAMETERS = {
    "objective": "multiclass", "num_class": CLASSES, "num_leaves": 15, "num_threads": 1, "verbose": -1,
    "deterministic": True, "force_row_wise": True,
}  # fmt: skip


def train(data, objective="multiclass", **how):
    return lgb.train(PARAMETERS | {"objective": objective} | how.pop("parameters", {}), data, ROUNDS, **how)


def assert_same_trees(one, other):
    """Structure to the bit; leaves too, but for those of the first trees, into which LightGBM adds its init score."""
    shape = ["tree_index", "node_depth", "node_index", "split_feature", "split_gain", "threshold", "count"]
    one, other = one.trees_to_dataframe(), other.trees_to_dataframe()
    assert one[shape].equals(other[shape])
    later = one.tree_index >= CLASSES
    np.testing.assert_array_equal(one.value[later], other.value[later])
    assert later.sum() > 100


@pytest.fixture
def scores(rng):
    return np.asfortranarray(rng.normal(0, 3, (200, CLASSES)))


@pytest.fixture
def labels(rng):
    return rng.integers(0, CLASSES, 200)


@pytest.mark.parametrize("leaves", [7, 31])
def test_digits_grow_the_trees_of_the_built_in_objective(leaves):
    images, labels = digits(1797)
    start, shape = ours.init_score(labels, CLASSES), {"num_leaves": leaves}
    built_in = train(lgb.Dataset(images, label=labels), parameters=shape)
    data = lgb.Dataset(images, label=labels, init_score=start)
    fastce_s = train(data, ours.softmax_objective(CLASSES), parameters=shape)
    assert_same_trees(built_in, fastce_s)
    proba = fastce.softmax(fastce_s.predict(images, raw_score=True) + start[0])
    np.testing.assert_allclose(proba, built_in.predict(images), rtol=1e-12)


@pytest.mark.parametrize("classes", [range(CLASSES), range(CLASSES - 2)])
def test_weights_of_samples_and_of_classes_grow_the_trees_of_the_built_in_objective(classes):
    images, labels = digits()
    chosen = np.isin(labels, classes)
    images, labels = images[chosen], labels[chosen]
    # Powers of two, so that float32 holds the products that the built-in objective is given.
    weight, weights = np.exp2(np.arange(CLASSES) % 3), sample_weights(len(labels))
    both = weights * weight[labels].astype(np.float32)
    built_in = train(lgb.Dataset(images, label=labels, weight=both))
    start = ours.init_score(labels, CLASSES, both)
    data = lgb.Dataset(images, label=labels, weight=weights, init_score=start)
    fastce_s = train(data, ours.softmax_objective(CLASSES, weight=weight))
    assert_same_trees(built_in, fastce_s)
    expected = built_in.predict(images, raw_score=True)
    np.testing.assert_allclose(fastce_s.predict(images, raw_score=True) + start[0], expected, rtol=1e-12)


def test_the_scikit_learn_api_grows_the_same_trees():
    images, labels = digits()
    weights = sample_weights(len(labels))
    start = ours.init_score(labels, CLASSES, weights)
    options = {"n_estimators": ROUNDS, "num_leaves": 15, "n_jobs": 1, "verbose": -1, "deterministic": True}
    model = lgb.LGBMClassifier(objective=ours.softmax_objective(CLASSES), force_row_wise=True, **options)
    clone(model).fit(images, labels, sample_weight=weights, init_score=start)  # as a grid search does
    model = pickle.loads(pickle.dumps(model.fit(images, labels, sample_weight=weights, init_score=start)))
    built_in = lgb.LGBMClassifier(force_row_wise=True, **options).fit(images, labels, sample_weight=weights)
    assert_same_trees(built_in.booster_, model.booster_)


def one_hot(labels):
    return np.eye(CLASSES)[labels]


def one_class(labels):
    return fastce.SparseTargets(labels[:, None], np.ones((len(labels), 1)))


@pytest.mark.parametrize("make", [one_hot, one_class])
def test_targets_that_are_certain_grow_the_trees_of_labels(make):
    images, labels = digits()
    built_in = train(lgb.Dataset(images, label=labels), parameters={"boost_from_average": False})
    unlabelled = lgb.Dataset(images, label=np.zeros(len(labels)))
    soft = train(unlabelled, ours.softmax_objective(CLASSES, targets=make(labels)))
    assert_same_trees(built_in, soft)


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
    data = lgb.Dataset(np.zeros((len(labels), 1)), label=labels, weight=weights, params={"verbose": -1}).construct()
    for got in (objective(labels.astype(np.float32), scores, weights), objective(scores, data)):
        for array, exact in zip(got, expected, strict=True):
            assert array.dtype == np.float32 and array.flags.f_contiguous
            np.testing.assert_allclose(array, exact, rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 2), (5000, 3), (700, 96), (300, 97), (40, 1000)])
def test_derivatives_of_any_number_of_samples_and_classes(shape, rng):
    scores, labels = np.asfortranarray(rng.normal(0, 5, shape)), rng.integers(0, shape[1], shape[0])
    got = ours.softmax_objective(shape[1])(labels, scores)
    expected = derivatives(scores, np.eye(shape[1])[labels], shape[1] / (shape[1] - 1))
    for array, exact in zip(got, expected, strict=True):
        np.testing.assert_allclose(array, exact, rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("hessian", FACTORS)
def test_a_focal_objective_has_the_gradient_of_the_focal_loss(hessian, scores, labels):
    weights = sample_weights(len(labels))
    objective = ours.softmax_objective(CLASSES, hessian=hessian, focal_gamma=GAMMA, weight=WEIGHT)
    grad, hess = objective(labels, scores, weights)
    factor = (weights * WEIGHT[labels])[:, None]
    np.testing.assert_allclose(grad, factor * focal_gradient(scores, labels), rtol=1e-4, atol=1e-8)
    # Both are those of cross-entropy times the same number for each sample.
    plain_grad, plain_hess = derivatives(scores, np.eye(CLASSES)[labels], FACTORS[hessian])
    np.testing.assert_allclose(hess * plain_grad, grad * plain_hess, rtol=1e-6, atol=1e-12)
    assert (hess > 0).all()


def test_the_metric_is_the_built_in_one_and_scikit_learn_s():
    images, labels = digits()
    weights = sample_weights(len(labels))
    start = ours.init_score(labels[:400], CLASSES, weights[:400])
    valid = slice(400, 600)

    def history(objective, initial):
        first = lgb.Dataset(images[:400], label=labels[:400], weight=weights[:400], init_score=initial)
        second = lgb.Dataset(
            images[valid], label=labels[valid], weight=weights[valid],
            init_score=None if initial is None else initial[:200], reference=first,
        )  # fmt: skip
        kept = {}
        model = train(
            first, objective, feval=None if initial is None else ours.log_loss_metric, valid_sets=[first, second],
            valid_names=["train", "valid"], callbacks=[lgb.record_evaluation(kept)],
        )
        return model, kept

    model, kept = history(ours.softmax_objective(CLASSES), start)
    _, expected = history("multiclass", None)
    for name in ("train", "valid"):
        np.testing.assert_allclose(kept[name]["log_loss"], expected[name]["multi_logloss"], rtol=1e-9)
    scores = model.predict(images[valid], raw_score=True) + start[0]
    truth = log_loss(labels[valid], fastce.softmax(scores), sample_weight=weights[valid], labels=range(CLASSES))
    assert kept["valid"]["log_loss"][-1] == pytest.approx(truth, rel=1e-9)
    assert ours.log_loss_metric(labels[valid], scores, weights[valid]) == (
        "log_loss", pytest.approx(truth, rel=1e-9), False,
    )  # fmt: skip

    classifier = lgb.LGBMClassifier(
        objective=ours.softmax_objective(CLASSES), n_estimators=3, n_jobs=1, verbose=-1, metric="None"
    )
    evaluated = {"eval_X": (images[valid],), "eval_y": (labels[valid],)}
    if "eval_X" not in lgb.LGBMClassifier.fit.__code__.co_varnames:
        evaluated = {"eval_set": [(images[valid], labels[valid])]}
    classifier.fit(images[:400], labels[:400], eval_metric=ours.log_loss_metric, **evaluated)
    scores = classifier.predict(images[valid], raw_score=True)
    truth = log_loss(labels[valid], fastce.softmax(scores), labels=range(CLASSES))
    (values,) = classifier.evals_result_.values()
    assert list(values) == ["log_loss"] and values["log_loss"][-1] == pytest.approx(truth, rel=1e-9)


def test_init_score_of_a_class_without_samples_and_its_shape():
    got = ours.init_score([0, 0, 1], 3)
    assert got.shape == (3, 3) and got.dtype == np.float64
    np.testing.assert_allclose(got, np.tile(np.log([2 / 3, 1 / 3, 1e-15]), (3, 1)), rtol=1e-7)


def test_scores_of_any_layout_are_read_and_nothing_is_written_to_them(scores, labels):
    objective = ours.softmax_objective(CLASSES)
    expected = objective(labels, scores)
    kept = scores.copy()
    scores.flags.writeable = False
    wide = np.zeros((len(labels), 2 * CLASSES))
    wide[:, ::2] = scores
    for given in (scores, np.ascontiguousarray(scores), wide[:, ::2], scores.astype(">f8")):
        for got, exact in zip(objective(labels, given), expected, strict=True):
            np.testing.assert_array_equal(got, exact)
    np.testing.assert_array_equal(scores, kept)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_an_objective_survives_pickles_and_copies(again, scores, labels):
    objective = ours.softmax_objective(CLASSES, weight=WEIGHT, hessian="exact")
    for got, exact in zip(again(objective)(labels, scores), objective(labels, scores), strict=True):
        np.testing.assert_array_equal(got, exact)
    assert repr(objective) == "fastce.integrations.lightgbm.softmax_objective(10, hessian='exact')"


MISTAKES = {
    "labels from 1 on": (lambda labels: labels + 1, r"label.* = 10 is out of range for 10 classes.*pass label - 1"),
    "a negative label": (lambda labels: labels - 1, r"label\[0\] = -1.0; encode them with LabelEncoder"),
    "the ignored id of fastce": (lambda labels: np.where(labels == 3, -100, labels), r"label\[\d\] = -100.0"),
    "labels between classes": (lambda labels: labels + 0.5, r"label\[0\] = \d.5; encode them with LabelEncoder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_labels_that_are_no_class_ids(mistake):
    change, message = MISTAKES[mistake]
    images, labels = digits(100)
    with pytest.raises(lgb.basic.LightGBMError, match=message):
        train(lgb.Dataset(images, label=change(labels)), ours.softmax_objective(CLASSES))
    with pytest.raises(lgb.basic.LightGBMError, match=message):
        ours.log_loss_metric(change(labels).astype(np.float32), np.zeros((100, CLASSES)))


@pytest.mark.parametrize(("n_classes", "num_class"), [(CLASSES, 1), (CLASSES - 1, CLASSES), (CLASSES, CLASSES + 1)])
def test_another_number_of_classes_than_lightgbm_was_told(n_classes, num_class):
    images, labels = digits(50)
    with pytest.raises(lgb.basic.LightGBMError, match=f"set num_class={n_classes} in the parameters"):
        train(
            lgb.Dataset(images, label=labels), ours.softmax_objective(n_classes), parameters={"num_class": num_class}
        )


def test_init_score_of_labels_that_are_no_class_ids():
    for labels in ([0, 3], [0, -1], [0.5], []):
        with pytest.raises(lgb.basic.LightGBMError, match="label must"):
            ours.init_score(labels, 3)


def test_options_out_of_range_are_refused_at_once():
    with pytest.raises(ValueError, match="hessian must be one of"):
        ours.softmax_objective(3, hessian="catboost")
    with pytest.raises(ValueError, match="focal_gamma goes only with class ids"):
        ours.softmax_objective(3, focal_gamma=1, label_smoothing=0.1)
    with pytest.raises(lgb.basic.LightGBMError, match=r"targets .* are of 5 samples, the data set has 4"):
        ours.softmax_objective(3, targets=np.full((5, 3), 1 / 3))(np.zeros(4), np.zeros((4, 3)))


def test_a_missing_library_is_named_with_the_extra_that_brings_it(run_python):
    code = 'import sys; sys.modules["lightgbm"] = None; import fastce.integrations.lightgbm'
    done = run_python("-c", code, check=False)
    assert 'needs lightgbm>=4.5, which is not installed: pip install "fastce[lightgbm]"' in done.stderr


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_weights_of_samples_that_cannot_be_are_refused(label_smoothing):
    objective = ours.softmax_objective(3, label_smoothing=label_smoothing)
    labels, scores = np.array([0.0, 1.0, 2.0]), np.zeros((3, 3), order="F")
    for weights in ([1.0], [1.0, 2.0], [1.0, np.nan, 1.0]):
        with pytest.raises(ValueError, match="sample_weight must"):
            objective(labels, scores, weights)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0]])
def test_no_frequencies_are_made_of_weights_that_have_none(weights):
    with pytest.raises(lgb.basic.LightGBMError, match="sample_weight must be >= 0"):
        ours.init_score([0, 1], 2, weights)
