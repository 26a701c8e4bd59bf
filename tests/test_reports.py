"""report: its numbers are those of scikit-learn, SciPy and torchmetrics, its tables say them, its errors help."""

import json
import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from sklearn.datasets import load_digits
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, d2_log_loss_score, log_loss, recall_score, top_k_accuracy_score
from truth import LOSS_BOUND

import fastce
from fastce import SparseTargets, _row_sample
from fastce.loss_report import LOSS_EDGES

SPECIFIED = [
    "n_rows", "n_classes", "n_ignored", "loss", "bits", "perplexity", "uniform_loss", "prior_loss",
    "majority_accuracy", "skill", "kl", "accuracy", "top5_accuracy", "mean_confidence", "calibration_error",
    "worst_share", "loss_correct", "loss_wrong", "temperature", "loss_at_temperature", "per_class", "worst_rows",
    "n_nonfinite", "findings",
]  # fmt: skip


def random_rows(rng, rows=400, classes=12):
    """Logits that are right more often than not, with ids of unequal frequency and weights of rows."""
    ids = rng.choice(classes, rows, p=rng.dirichlet(np.full(classes, 3.0)))
    ids[:classes] = np.arange(classes)
    logits = rng.normal(0, 1.5, (rows, classes))
    logits[np.arange(rows), ids] += 2
    return logits, ids, rng.random(rows) + 0.1


@pytest.fixture(scope="module")
def digits():
    """Logits of a classifier of handwritten digits on rows that it has not seen, and their ids."""
    x, y = load_digits(return_X_y=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(max_iter=25).fit(x[::2] / 16, y[::2])
    return 3 * model.decision_function(x[1::2] / 16), y[1::2]


def assert_like_scikit_learn(logits, ids, weights):
    report = fastce.report(logits, ids, sample_weight=weights)
    probs, labels = scipy.special.softmax(logits, axis=1), np.arange(logits.shape[1])
    predicted = logits.argmax(axis=1)
    options = {"sample_weight": weights, "labels": labels}
    assert report.loss == pytest.approx(log_loss(ids, probs, **options), rel=1e-9)
    assert report.skill == pytest.approx(d2_log_loss_score(ids, probs, **options), rel=1e-9)
    assert report.accuracy == pytest.approx(accuracy_score(ids, predicted, sample_weight=weights), rel=1e-14)
    assert report.top5_accuracy == pytest.approx(top_k_accuracy_score(ids, logits, k=5, **options), rel=1e-14)
    recalls = recall_score(ids, predicted, average=None, **options)
    np.testing.assert_allclose([c.recall for c in report.per_class], recalls, rtol=1e-14)
    majority = DummyClassifier(strategy="most_frequent").fit(logits, ids, weights)
    assert report.majority_accuracy == pytest.approx(majority.score(logits, ids, weights), rel=1e-14)
    prior = DummyClassifier(strategy="prior").fit(logits, ids, weights).predict_proba(logits)
    assert report.prior_loss == pytest.approx(log_loss(ids, prior, **options), rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_numbers_agree_with_scikit_learn_on_random_rows(weighted, rng):
    logits, ids, weights = random_rows(rng)
    assert_like_scikit_learn(logits, ids, weights if weighted else None)


def test_numbers_agree_with_scikit_learn_on_digits(digits):
    assert_like_scikit_learn(*digits, None)


def test_calibration_and_perplexity_agree_with_torchmetrics(digits, rng):
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("torchmetrics")
    random, targets, _ = random_rows(rng, 3000)
    for logits, ids in ((random, targets), digits, (10 * random, targets)):
        logits = torch.from_numpy(logits.astype(np.float32))
        for n_bins in (15, 7):
            report = fastce.report(logits.numpy(), ids, n_bins=n_bins)
            theirs = metrics.functional.classification.multiclass_calibration_error(
                logits.softmax(1), torch.from_numpy(ids), logits.shape[1], n_bins
            )
            assert report.calibration_error == pytest.approx(float(theirs), abs=2e-6)
        perplexity = metrics.functional.text.perplexity(logits[None], torch.from_numpy(ids)[None])
        assert report.perplexity == pytest.approx(float(perplexity), rel=1e-5)


def test_calibration_bins_are_their_rows(rng):
    logits, ids, weights = random_rows(rng)
    report = fastce.report(logits, ids, sample_weight=weights, n_bins=10)
    confidence, right = scipy.special.softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1) == ids
    gaps = 0.0
    for b in report.calibration_bins:
        inside = (confidence >= b.low) & (confidence < b.high)
        assert b.n_rows == inside.sum()
        if b.n_rows:
            assert b.confidence == pytest.approx(np.average(confidence[inside], weights=weights[inside]), rel=1e-9)
            assert b.accuracy == pytest.approx(np.average(right[inside], weights=weights[inside]), rel=1e-12)
            gaps += weights[inside].sum() * abs(b.confidence - b.accuracy)
    assert report.calibration_error == pytest.approx(gaps / weights.sum(), rel=1e-9)
    assert report.mean_confidence == pytest.approx(np.average(confidence, weights=weights), rel=1e-9)


def targets_of_every_kind(rng, rows, classes):
    """Yield targets with the distributions (rows, classes) that they are."""
    ids = rng.integers(0, classes, rows)
    yield ids, np.eye(classes)[ids]
    soft = rng.random((rows, classes)) ** 4
    yield soft, soft
    indices, values = rng.integers(0, classes, (rows, 3)), rng.random((rows, 3))
    dense = np.zeros((rows, classes))
    np.add.at(dense, (np.arange(rows)[:, None], indices), values)
    yield SparseTargets(indices, values), dense


def test_the_loss_is_that_of_cross_entropy_with_every_kind_of_targets_and_weights(rng, dtype):
    logits = rng.normal(0, 3, (300, 9)).astype(dtype)
    for targets, _ in targets_of_every_kind(rng, 300, 9):
        for weight in (None, rng.random(9)):
            for sample_weight in (None, rng.random(300) * (rng.random(300) < 0.8)):
                options = {"weight": weight, "sample_weight": sample_weight}
                report = fastce.report(logits, targets, **options)
                loss = fastce.cross_entropy(logits, targets, **options)
                assert report.loss == pytest.approx(loss, rel=LOSS_BOUND[dtype.name], abs=0)
                assert report.bits == report.loss / math.log(2)
                assert report.perplexity == pytest.approx(math.exp(report.loss), rel=1e-15)


def test_baselines_are_the_losses_of_constant_predictions(rng):
    weight, sample_weight = rng.random(9) + 0.1, rng.random(300)
    for targets, dense in targets_of_every_kind(rng, 300, 9):
        report = fastce.report(rng.normal(size=(300, 9)), targets, weight=weight, sample_weight=sample_weight)
        zeros = np.zeros((300, 9))
        uniform = fastce.cross_entropy(zeros, targets, weight=weight, sample_weight=sample_weight)
        assert report.uniform_loss == pytest.approx(uniform, rel=1e-13)
        best = np.log(sample_weight @ (dense * weight))
        prior = fastce.cross_entropy(zeros + best, targets, weight=weight, sample_weight=sample_weight)
        assert report.prior_loss == pytest.approx(prior, rel=1e-13)
        for step in rng.normal(0, 0.1, (5, 9)):
            worse = fastce.cross_entropy(zeros + best + step, targets, weight=weight, sample_weight=sample_weight)
            assert worse > report.prior_loss


def test_the_divergence_is_the_loss_without_the_entropy_of_the_targets(rng):
    logits, soft = rng.normal(0, 2, (200, 6)), rng.dirichlet(np.ones(6), 200)
    report = fastce.report(logits, soft)
    truth = scipy.special.rel_entr(soft, scipy.special.softmax(logits, axis=1)).sum(axis=1).mean()
    assert report.kl == pytest.approx(truth, rel=1e-12)
    ids = rng.integers(0, 6, 200)
    assert fastce.report(logits, ids).kl == fastce.report(logits, ids).loss


def test_soft_targets_that_are_one_hot_give_the_report_of_their_ids(rng):
    logits, ids, weights = random_rows(rng, classes=8)
    expected = fastce.report(logits, ids, sample_weight=weights)
    rows = np.eye(8)[ids]
    for targets in (rows, SparseTargets(ids[:, None], np.ones((len(ids), 1)))):
        report = fastce.report(logits, targets, sample_weight=weights)
        for name in SPECIFIED[:-4]:
            assert getattr(report, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
        assert [c.support for c in report.per_class] == [c.support for c in expected.per_class]


def test_right_wrong_and_worst_rows_are_those_of_the_sorted_losses(rng):
    logits, ids, _ = random_rows(rng, 1234)
    report = fastce.report(logits, ids)
    losses = fastce.cross_entropy(logits, ids, reduction="none")
    right = logits.argmax(axis=1) == ids
    assert report.loss_correct == pytest.approx(losses[right].mean(), rel=1e-13)
    assert report.loss_wrong == pytest.approx(losses[~right].mean(), rel=1e-13)
    order = np.argsort(-losses)
    assert report.worst_share == pytest.approx(losses[order[:13]].sum() / losses.sum(), rel=1e-13)
    assert [row.row for row in report.worst_rows] == order[:10].tolist()
    for row in report.worst_rows:
        assert row.loss == pytest.approx(losses[row.row], rel=LOSS_BOUND["float64"])
        assert (row.target, row.predicted) == (ids[row.row], logits[row.row].argmax())
        assert row.confidence == pytest.approx(scipy.special.softmax(logits[row.row]).max(), rel=1e-12)
    counts = np.histogram(np.clip(losses, LOSS_EDGES[0], LOSS_EDGES[-1]), LOSS_EDGES)[0]
    assert report.loss_histogram == counts.tolist()
    for number, c in enumerate(report.per_class):
        assert c.support == np.count_nonzero(ids == number)
        assert c.predicted == np.count_nonzero(logits.argmax(axis=1) == number)
        assert c.loss == pytest.approx(losses[ids == number].mean(), rel=1e-13)


@pytest.mark.parametrize("scale", [0.2, 0.9, 1.0, 7.0])
def test_the_temperature_minimises_the_loss(scale, rng, dtype):
    logits, ids, weights = random_rows(rng, 1000)
    weight = rng.random(12) + 0.2
    logits = (scale * logits).astype(dtype)

    def loss(log_temperature):
        log_p = scipy.special.log_softmax(logits.astype(np.float64) / math.exp(log_temperature), axis=1)
        return np.average(-log_p[np.arange(1000), ids], weights=weights * weight[ids])

    report = fastce.report(logits, ids, weight=weight, sample_weight=weights)
    best = scipy.optimize.minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
    assert report.temperature == pytest.approx(math.exp(best.x), rel=1e-4)
    assert report.loss_at_temperature == pytest.approx(best.fun, rel=1e-6)
    assert report.loss_at_temperature <= report.loss


def test_the_temperature_of_a_sample_is_near_that_of_all_rows(monkeypatch, rng):
    logits, ids, _ = random_rows(rng, 20_000)
    exact = fastce.report(3 * logits, ids)
    monkeypatch.setattr(_row_sample, "MOST", 4000)
    sampled = fastce.report(3 * logits, ids)
    assert sampled.temperature != exact.temperature
    assert sampled.temperature == pytest.approx(exact.temperature, rel=0.05)
    assert sampled.loss_at_temperature == pytest.approx(exact.loss_at_temperature, rel=0.05)


def test_temperatures_without_a_best_one_end_at_the_bounds(rng):
    logits = rng.normal(0, 1, (50, 4))
    assert fastce.report(logits, logits.argmax(axis=1)).temperature == pytest.approx(0.01)
    assert fastce.report(logits, logits.argmin(axis=1)).temperature == pytest.approx(100)
    assert fastce.report(np.zeros((50, 4)), logits.argmin(axis=1)).temperature == 1


@pytest.mark.parametrize("classes", [3, 5, 6, 31, 32, 33, 700])
def test_the_first_five_are_counted_as_by_sorting_and_lower_classes_win_ties(classes, rng):
    logits = np.round(rng.normal(0, 2, (500, classes)), 1 if classes < 100 else 0).astype(np.float32)
    ids = rng.integers(0, classes, 500)
    order = np.argsort(-logits, axis=1, kind="stable")
    report = fastce.report(logits, ids)
    assert report.accuracy == np.mean(order[:, 0] == ids)
    assert report.top5_accuracy == np.mean((order[:, :5] == ids[:, None]).any(axis=1))


def test_layouts_dtypes_and_axes_of_rows_do_not_matter(rng):
    logits, ids, weights = random_rows(rng, 240)
    logits = logits.astype(np.float16).astype(np.float64)
    expected = fastce.report(logits.astype(np.float32), ids, sample_weight=weights).to_json()
    single = logits.astype(np.float32)
    strided = np.repeat(single, 2, axis=1)[:, ::2]
    for same in (single.astype(np.float16), single.astype(">f4"), np.asfortranarray(single), strided):
        assert fastce.report(same, ids, sample_weight=weights).to_json() == expected
    cube = single.reshape(4, 60, 12), ids.reshape(4, 60)
    assert fastce.report(*cube, sample_weight=weights.reshape(4, 60)).to_json() == expected
    assert fastce.report(single[0], ids[0]).to_json() == fastce.report(single[:1], ids[:1]).to_json()


def test_rows_that_do_not_count_change_nothing_but_their_number(rng):
    logits, ids, weights = random_rows(rng)
    live = rng.random(len(ids)) < 0.7
    expected = fastce.report(logits[live], ids[live], sample_weight=weights[live])
    logits[~live] = np.nan
    ignored = fastce.report(logits, np.where(live, ids, 255), sample_weight=weights, ignore_index=255)
    unweighted = fastce.report(logits, ids, sample_weight=np.where(live, weights, 0))
    for report in (ignored, unweighted):
        assert (report.n_rows, report.n_ignored) == (len(ids), np.count_nonzero(~live))
        for name in set(SPECIFIED) - {"n_rows", "n_ignored", "worst_rows"}:
            assert getattr(report, name) == getattr(expected, name), name
        assert [row[1:] for row in report.worst_rows] == [row[1:] for row in expected.worst_rows]


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.filterwarnings("error")
def test_a_report_on_nothing_is_nan_and_can_be_shown(rows):
    with np.errstate(all="raise"):
        report = fastce.report(np.full((rows, 7), np.nan), np.full(rows, -100))
    assert report.n_ignored == rows
    for name in ("loss", "skill", "kl", "accuracy", "calibration_error", "temperature", "worst_share", "prior_loss"):
        assert math.isnan(getattr(report, name)), name
    assert report.findings == [] and report.worst_rows == []
    assert "nan" in str(report) and report._repr_html_()
    assert json.loads(report.to_json())["loss"] is None


@pytest.mark.parametrize("m", [0, 2])
def test_sparse_targets_of_which_nothing_counts_are_a_report_on_nothing(m, rng):
    targets = SparseTargets(rng.integers(0, 7, (5, m)), rng.random((5, m)))
    report = fastce.report(rng.normal(size=(5, 7)), targets, sample_weight=np.zeros(5))
    assert report.n_ignored == 5 and math.isnan(report.loss) and report.findings == []
    assert fastce.report(rng.normal(size=(5, 7)), SparseTargets(np.zeros((5, 0), int), np.zeros((5, 0)))).loss == 0.0


def test_a_name_of_two_lines_takes_one_line_of_a_table(rng):
    logits, ids, _ = random_rows(rng, 40)
    names = [str(k) for k in range(12)]
    plain = fastce.report(logits, ids, class_names=[*names[:3], "a b", *names[4:]])
    report = fastce.report(logits, ids, class_names=[*names[:3], "a\nb", *names[4:]])
    assert str(report) == str(plain) and report.per_class[3].name == "a\nb"


def test_losses_of_any_size_fit_a_line():
    report = fastce.report(np.tile(np.array([[3e38, 0.0]], np.float32), (10, 1)), np.ones(10, int))
    assert "3.000e+38" in str(report) and max(map(len, str(report).splitlines())) <= 110


@pytest.mark.filterwarnings("error")
def test_sums_beyond_float64_are_infinite_as_in_cross_entropy():
    logits, ids = np.tile([[1e308, 0.0]], (10, 1)), np.ones(10, int)
    report = fastce.report(logits, ids)
    assert report.loss == fastce.cross_entropy(logits, ids) == math.inf and report.n_nonfinite == 0
    assert str(report) and json.loads(report.to_json())["loss"] is None
    assert math.isnan(fastce.report(logits, ids, sample_weight=np.full(10, 1e308)).loss)


@pytest.mark.filterwarnings("error")
def test_rows_with_nan_or_an_infinite_loss_are_counted_and_lead_the_worst(rng):
    logits, ids, _ = random_rows(rng)
    clean = fastce.report(np.delete(logits, 7, 0), np.delete(ids, 7))
    logits[7, 2] = np.nan
    with np.errstate(all="raise"):
        report = fastce.report(logits, ids)
    assert report.n_nonfinite == 1 and math.isnan(report.loss) and report.worst_rows[0].row == 7
    assert report.worst_rows[0].predicted == -1
    assert report.mean_confidence == clean.mean_confidence and report.temperature == clean.temperature
    assert report.accuracy == pytest.approx(clean.accuracy * (len(ids) - 1) / len(ids))
    logits[7] = np.where(np.arange(12) == ids[7], -np.inf, 0.0)
    report = fastce.report(logits, ids)
    assert report.n_nonfinite == 1 and report.loss == math.inf and report.worst_rows[0].row == 7
    logits[7] = np.where(np.arange(12) == ids[7], 0.0, -np.inf)
    assert fastce.report(logits, ids).n_nonfinite == 0


def test_attributes_are_the_keys_and_json_is_strict(rng):
    logits, ids, _ = random_rows(rng, 30)
    report = fastce.report(logits, ids, class_names=[f"<{k}>" for k in range(12)])
    numbers = report.to_dict()
    assert numbers.keys() >= set(SPECIFIED)
    assert all(numbers[name] == getattr(report, name) for name in SPECIFIED if not isinstance(numbers[name], list))
    assert numbers["per_class"][3]["name"] == "<3>"

    def check(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                check(part)
        else:
            assert type(value) in (int, float, str, type(None))

    check(numbers)
    text = report.to_json(indent=1)
    assert json.loads(text)["loss"] == report.loss and "NaN" not in text


def test_tables_show_the_numbers_and_escape_the_names(rng):
    logits, ids, _ = random_rows(rng, 300, 30)
    report = fastce.report(logits, ids, class_names=[f"<b>{k}&</b>" for k in range(30)])
    text, page = str(report), report._repr_html_()
    for shown in (f"{report.loss:.4f}", f"{100 * report.accuracy:.1f} %", "log 30", "top-5", "temperature"):
        assert shown in text and shown in page
    assert str(report.worst_rows[0].row) in text and "<b>" in text
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert max(map(len, text.splitlines())) <= 120
    assert repr(report).startswith("LossReport(n_rows=300")


def test_wrong_arguments_are_refused(rng):
    logits, ids, weights = random_rows(rng, 20)
    for error, words, options in [
        (ValueError, "n_bins must be >= 1", {"n_bins": 0}),
        (TypeError, "n_bins must be an integer", {"n_bins": 1.5}),
        (ValueError, "class_names must name each of the 12 classes, got 2", {"class_names": ["a", "b"]}),
        (TypeError, "class_names must be a sequence", {"class_names": "abcdefghijkl"}),
        (ValueError, "sample_weight must be >= 0", {"sample_weight": -weights}),
        (ValueError, "weight must have the shape", {"weight": np.ones(3)}),
    ]:
        with pytest.raises(error, match=words):
            fastce.report(logits, ids, **options)
    with pytest.raises(IndexError, match="out of range for 12 classes"):
        fastce.report(logits, ids + 12)
    with pytest.raises(TypeError, match="logits"):
        fastce.report(ids[:, None], ids)


def test_the_initial_bias_gives_the_entropy_of_the_class_frequencies(rng):
    _, ids, weights = random_rows(rng)
    bias = fastce.init_bias(ids, 12, weights)
    frequencies = np.bincount(ids, weights) / weights.sum()
    np.testing.assert_allclose(bias, np.log(frequencies), rtol=1e-13)
    zeros = np.zeros((len(ids), 12))
    expected = fastce.report(zeros, ids, sample_weight=weights)
    loss = fastce.cross_entropy(zeros + bias, ids, sample_weight=weights)
    assert loss == pytest.approx(scipy.stats.entropy(frequencies), rel=1e-12)
    assert loss == pytest.approx(expected.prior_loss, rel=1e-12)
    for targets, dense in targets_of_every_kind(rng, 50, 4):
        np.testing.assert_allclose(fastce.init_bias(targets, 4), np.log(dense.sum(0) / dense.sum()), rtol=1e-12)


def test_the_initial_bias_is_finite_for_classes_that_are_never_seen():
    bias = fastce.init_bias([[0, 0], [1, -100]], 3)
    np.testing.assert_allclose(np.exp(bias), [2 / 3, 1 / 3, 1 / 6], rtol=1e-14)
    for error, targets, options in [
        (ValueError, [], {}),
        (ValueError, [-100], {}),
        (ValueError, [0, 1], {"sample_weight": [1, -1]}),
        (IndexError, [0, 3], {}),
        (TypeError, [0.0, 1.0], {}),
    ]:
        with pytest.raises(error):
            fastce.init_bias(targets, 3, **options)
    with pytest.raises(ValueError, match="n_classes"):
        fastce.init_bias([0], 0)


def test_reports_of_the_same_rows_are_equal_whatever_does_not_exist(rng):
    logits, ids = rng.normal(size=(40, 5)), rng.integers(0, 4, 40)  # no row of the last class
    for spoiled in (logits, np.where(np.arange(40)[:, None] == 3, np.nan, logits)):
        assert fastce.report(spoiled, ids) == fastce.report(spoiled, ids)
        assert fastce.report(spoiled, ids) != fastce.report(spoiled, (ids + 1) % 4)
    assert fastce.report(logits, ids) != 1
