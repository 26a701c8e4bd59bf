"""Calls whose arguments are used as they lie: the bits and the errors of calls that check them one by one."""

import sys
import threading

import numpy as np
import pytest

import fastce
from fastce import SparseTargets

DTYPES = [np.float32, np.float64]
ROW_SHAPES = [(), (7,), (2, 3), (2, 1, 4)]
KINDS = ["ids", "int32 ids", "distributions", "sparse", "float64 sparse"]
# What makes a call go through the checks, without another result: a number that only equals an int.
CHECKED = {"num_threads": np.int64(1)}


def targets_of(kind, rng, row_shape, n_classes, dtype):
    """Return targets of a kind, as plain arrays."""
    ids = rng.integers(0, n_classes, row_shape)
    if kind == "ids":
        return np.asarray(ids)
    if kind == "int32 ids":
        return np.asarray(ids, np.int32)
    if kind == "distributions":
        return (rng.random((*row_shape, n_classes)) * (rng.random((*row_shape, n_classes)) < 0.5)).astype(dtype)
    values = rng.random((*row_shape, 3)).astype(np.float64 if kind == "float64 sparse" else np.float32)
    return SparseTargets(rng.integers(0, n_classes, (*row_shape, 3)), values)


def option_sets(rng, row_shape, n_classes):
    """Yield options, alone and together, as plain arrays and floats."""
    mask = rng.random((*row_shape, n_classes)) < 0.7
    mask[..., 0] = True
    common = rng.random(n_classes) < 0.7
    common[0] = True
    options = {
        "weight": rng.random(n_classes),
        "sample_weight": np.asarray(rng.normal(size=row_shape) * (rng.random(row_shape) < 0.8)),
        "label_smoothing": 0.1,
        "logit_scale": 0.75,
        "softcap": 4.0,
        "z_loss": 0.01,
    }
    yield {}
    for name, value in options.items():
        yield {name: value}
    yield {"weight": options["weight"].astype(np.float32), "label_smoothing": 0.3}
    yield {"label_smoothing": 0.9}
    yield {"z_loss": 3.0, "sample_weight": np.asarray(rng.random(row_shape), np.float32)}
    for shown in (mask, common):
        yield {"class_mask": shown}
        yield {"class_mask": shown, "label_smoothing": 0.2, "weight": options["weight"]}
    yield {**options, "class_mask": mask, "denominator": 3.0}
    yield {**options, "class_mask": common, "reduction": "sum", "grad_output": -2.5}
    yield {**options, "reduction": "none", "grad_output": np.asarray(rng.normal(size=row_shape))}


def bits_of(results):
    """Return the dtypes, shapes and bytes of a loss or a tuple of results."""
    results = results if isinstance(results, tuple) else (results,)
    arrays = [np.asarray(result) for result in results]
    return [(type(result), a.dtype, a.shape, a.tobytes()) for result, a in zip(results, arrays, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("n_classes", [1, 10, 130])
def test_a_call_has_the_same_bits_when_its_arguments_are_checked_one_by_one(dtype, kind, row_shape, n_classes):
    rng = np.random.default_rng(n_classes)
    logits = rng.normal(0, 4, (*row_shape, n_classes)).astype(dtype)
    targets = targets_of(kind, rng, row_shape, n_classes, dtype)
    for options in option_sets(rng, row_shape, n_classes):
        loss_options = {name: value for name, value in options.items() if name != "grad_output"}
        expected = fastce.cross_entropy(logits, targets, **loss_options, **CHECKED)
        assert bits_of(fastce.cross_entropy(logits, targets, **loss_options)) == bits_of(expected), options
        functions = [fastce.cross_entropy_with_grad]
        if "softcap" not in options:
            functions.append(fastce.cross_entropy_with_grad_hess)
        for function in functions:
            expected = function(logits, targets, **options, **CHECKED)
            assert bits_of(function(logits, targets, **options)) == bits_of(expected), options
            assert bits_of(function(logits, targets, axis=len(row_shape), **options)) == bits_of(expected), options
            buffer = np.full_like(logits, 7)
            _, grad, *_ = function(logits, targets, out=buffer, **options)
            assert grad is buffer
            assert buffer.tobytes() == expected[1].tobytes(), options


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_class_ids_of_every_integer_dtype_are_the_same_ids(dtype):
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 4, (40, 100))
    ids = rng.integers(0, 100, 40)
    entries = rng.integers(0, 100, (40, 2))
    ignored = int(ids[3])
    for options in ({}, {"ignore_index": ignored}, {"softcap": 3.0, "ignore_index": ignored}):
        expected = fastce.cross_entropy_with_grad(logits, ids, **options)
        assert bits_of(fastce.cross_entropy_with_grad(logits, ids.astype(dtype), **options)) == bits_of(expected)
    values = rng.random((40, 2))
    expected = fastce.cross_entropy_with_grad(logits, SparseTargets(entries, values))
    got = fastce.cross_entropy_with_grad(logits, SparseTargets(entries.astype(dtype), values))
    assert bits_of(got) == bits_of(expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
def test_extreme_class_ids_of_narrow_dtypes_are_out_of_range(dtype):
    for extreme in (np.iinfo(dtype).min, np.iinfo(dtype).max):
        if 0 <= extreme < 5:
            continue
        with pytest.raises(IndexError, match=rf"targets\[1\] = {extreme} "):
            fastce.cross_entropy(np.zeros((2, 5)), np.array([0, extreme], dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_in_place_of_the_logits_has_the_same_bits(kind):
    rng = np.random.default_rng(5)
    for options in option_sets(rng, (6,), 20):
        logits = rng.normal(0, 4, (6, 20)).astype(np.float32)
        targets = targets_of(kind, rng, (6,), 20, np.float32)
        loss, grad = fastce.cross_entropy_with_grad(logits, targets, **options)
        in_place = logits.copy()
        again, _ = fastce.cross_entropy_with_grad(in_place, targets, out=in_place, **options)
        assert bits_of(again) == bits_of(loss)
        assert in_place.tobytes() == grad.tobytes(), options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
def test_focal_and_poly_losses_have_the_same_bits_when_their_arguments_are_checked(dtype, row_shape):
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 4, (*row_shape, 10)).astype(dtype)
    targets = np.asarray(rng.integers(0, 10, row_shape))
    losses = {
        fastce.focal_loss: {"gamma": 2.0},
        fastce.focal_loss_with_grad: {"gamma": 0.5},
        fastce.poly_loss: {"epsilon": 1.5},
        fastce.poly_loss_with_grad: {"epsilon": -1.0},
    }
    for options in option_sets(rng, row_shape, 10):
        options = {name: value for name, value in options.items() if name in ("weight", "sample_weight", "reduction")}
        for function, parameter in losses.items():
            got = function(logits, targets, **parameter, **options)
            assert bits_of(got) == bits_of(function(logits, targets, **parameter, **options, **CHECKED)), options


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)], ids=str)
def test_statistics_of_any_number_of_axes_have_the_bits_of_rows(shape):
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 4, shape)
    targets = rng.integers(0, 5, shape[:-1])
    targets.flat[1] = -100
    got = fastce.cross_entropy_stats(logits, targets)
    expected = fastce.cross_entropy_stats(logits, targets, **CHECKED)
    rows = fastce.cross_entropy_stats(logits.reshape(-1, 5), targets.reshape(-1))
    for a, b, c in zip(got, expected, rows, strict=True):
        assert a.dtype == b.dtype == c.dtype
        assert a.shape == b.shape == shape[:-1]
        assert a.tobytes() == b.tobytes() == c.tobytes()


BAD = {
    "id too large": {"targets": np.array([0, 5, 1])},
    "negative id": {"targets": np.array([0, -1, 1])},
    "sparse index -1": {"targets": SparseTargets(np.array([[0, -1], [1, 2], [3, 4]]), np.ones((3, 2)))},
    "sparse index too large": {"targets": SparseTargets(np.array([[0, 5], [1, 2], [3, 4]]), np.ones((3, 2)))},
    "negative value": {"targets": SparseTargets(np.array([[0], [1], [2]]), np.array([[1.0], [-1.0], [1.0]]))},
    "nan value": {"targets": SparseTargets(np.array([[0], [1], [2]]), np.array([[1.0], [np.nan], [1.0]]))},
    "values of another shape": {"targets": SparseTargets(np.zeros((3, 2), int), np.ones((3, 1)))},
    "entries of other rows": {"targets": SparseTargets(np.zeros((2, 2), int), np.ones((2, 2)))},
    "negative mass": {"targets": np.full((3, 5), -0.5)},
    "ids ignored in distributions": {"targets": np.full((3, 5), 0.2), "ignore_index": 3},
    "every class hidden": {"class_mask": np.array([[True] * 5, [False] * 5, [True] * 5])},
    "mask of other classes": {"class_mask": np.ones(4, bool)},
    "negative weight": {"weight": np.array([1.0, -1.0, 1.0, 1.0, 1.0]), "label_smoothing": 0.1},
    "infinite sample weight": {"sample_weight": np.array([1.0, np.inf, 1.0]), "label_smoothing": 0.9},
    "softcap 0": {"softcap": 0.0},
    "softcap nan": {"softcap": float("nan")},
    "smoothing above 1": {"label_smoothing": 1.5},
    "negative z_loss": {"z_loss": -1.0, "softcap": 3.0},
    "array factor of a mean": {"grad_output": np.ones(3), "softcap": 3.0},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_refused_call_says_the_same_and_writes_nothing(bad):
    arguments = {"logits": np.zeros((3, 5)), "targets": np.array([0, 1, 2]), **bad}
    refusals = []
    for checked in ({}, CHECKED):
        out = np.full((3, 5), 7.0)
        with pytest.raises((ValueError, IndexError, TypeError)) as refusal:
            fastce.cross_entropy_with_grad(**arguments, out=out, **checked)
        refusals.append((refusal.type, str(refusal.value)))
        assert (out == 7).all()
    assert refusals[0] == refusals[1]


def test_a_buffer_that_overlaps_an_argument_is_refused():
    memory = np.zeros(64)
    out = memory[:15].reshape(3, 5)
    entries = SparseTargets(np.zeros((3, 2), int), memory[10:16].reshape(3, 2))
    with pytest.raises(ValueError, match="overlaps targets"):
        fastce.cross_entropy_with_grad(np.ones((3, 5)), entries, out=out)
    mask = memory.view(bool)[:15].reshape(3, 5)
    mask[:] = True
    with pytest.raises(ValueError, match="overlaps class_mask"):
        fastce.cross_entropy_with_grad(np.ones((3, 5)), np.zeros(3, int), out=out, class_mask=mask)


def test_ignored_rows_may_have_no_class_left():
    mask = np.array([[True, True], [False, False]])
    loss = fastce.cross_entropy(np.zeros((2, 2)), np.array([0, -100]), class_mask=mask)
    assert loss == pytest.approx(np.log(2))


def distributions_by_row(logits):
    return fastce.cross_entropy(logits, np.full(logits.shape, 0.5, logits.dtype), reduction="none")


def probabilities_by_row(probs):
    return fastce.cross_entropy_from_probs(probs, np.zeros(len(probs), int), reduction="none")


@pytest.mark.parametrize("function", [distributions_by_row, probabilities_by_row])
def test_an_array_that_changes_its_shape_during_a_call_does_no_harm(function):
    # Results once had the shape that the logits had when the kernel was done, and the length that they had before.
    rows, classes = 3000, 100
    numbers = np.full((rows, classes), 1 / classes, np.float32)
    stop = threading.Event()

    def reshape():
        while not stop.is_set():
            for shape in ((numbers.size,), (rows, classes)):
                numbers.shape = shape

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=reshape)
    thread.start()
    try:
        for _ in range(200):
            try:
                losses = function(numbers)
            except (ValueError, TypeError):  # the other shape came first
                continue
            assert losses.size in (1, rows)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
