"""What holds for every batch: agreement with the reference, and the invariances of the loss, on generated input."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from truth import assert_accurate

import fastce
from fastce import reference

settings.register_profile(
    "fastce",
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fastce")

dtypes = st.sampled_from([np.dtype(np.float32), np.dtype(np.float64)])


@st.composite
def batches(draw, min_rows=0, max_classes=70):
    """Logits (N, C) of mixed magnitudes with ids in range; nan, infinities and subnormal numbers left out."""
    dtype = draw(dtypes)
    rows, classes = draw(st.integers(min_rows, 9)), draw(st.integers(1, max_classes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.01, 1, 10, 40, 100, 700, 3000, 1e8]))
    logits = (rng.normal(0, 1, (rows, classes)) * scale).astype(dtype)
    if draw(st.booleans()):
        logits = np.round(logits)
    if rows:
        exact = draw(st.lists(st.floats(-200, 200, width=32, allow_subnormal=False), max_size=5))
        for value in exact:
            logits[rng.integers(rows), rng.integers(classes)] = value
    return logits, rng.integers(0, classes, rows)


@st.composite
def calls(draw):
    """A call of any shape, axis and options, with some rows ignored."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=7))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    classes, row_shape = shape[axis], tuple(np.delete(shape, axis))
    dtype = draw(dtypes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = (rng.normal(0, 1, shape) * draw(st.sampled_from([1, 10, 60]))).astype(dtype)
    ids_dtype = draw(st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u4", "u8"]))
    targets = rng.integers(0, classes, row_shape).astype(ids_dtype)
    options = {"axis": axis, "reduction": draw(st.sampled_from(["none", "sum", "mean"]))}
    options["ignore_index"] = draw(
        st.one_of(st.none(), st.integers(-3, 8), st.lists(st.integers(-3, 8), max_size=3), st.just(-100))
    )
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["denominator"] = draw(st.floats(0.01, 1e4))
    if draw(st.booleans()):
        as_array = options["reduction"] == "none" and draw(st.booleans())
        options["grad_output"] = rng.normal(0, 2, row_shape) if as_array else draw(st.floats(-10, 10, width=32))
    return logits, targets, options


@given(calls())
def test_any_call_agrees_with_the_reference(call):
    logits, targets, options = call
    loss, gradient = fastce.cross_entropy_with_grad(logits, targets, **options)
    true_loss, true_gradient = reference.cross_entropy_with_grad(logits, targets, **options)
    close = {"rtol": 1e-6, "atol": 2e-38} if logits.dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-300}
    np.testing.assert_allclose(loss, true_loss, **close)
    np.testing.assert_allclose(gradient, true_gradient, **close)
    options.pop("grad_output", None)
    alone = fastce.cross_entropy(logits, targets, **options)
    np.testing.assert_array_equal(alone, loss)
    assert np.shape(alone) == np.shape(true_loss) and type(alone) is type(loss)


@given(batches())
def test_any_row_is_accurate(batch):
    logits, targets = batch
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    assert_accurate(logits, targets, losses, gradient)
    assert not np.signbit(losses).any()


@given(batches(), st.integers(-20, 20))
def test_a_power_of_two_scales_the_gradient_exactly(batch, exponent):
    logits, targets = batch
    _, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    _, scaled = fastce.cross_entropy_with_grad(logits, targets, reduction="none", grad_output=2.0**exponent)
    normal = np.minimum(np.abs(gradient), np.abs(scaled)) >= np.finfo(logits.dtype).smallest_normal
    np.testing.assert_array_equal(scaled[normal], np.ldexp(gradient, exponent)[normal])


@given(batches(min_rows=1), st.integers(1, 3))
def test_an_appended_class_of_minus_infinity_changes_nothing(batch, count):
    logits, targets = batch
    rows, classes = logits.shape
    wider = np.concatenate([logits, np.full((rows, count), -np.inf, logits.dtype)], axis=1)
    losses, gradient = fastce.cross_entropy_with_grad(wider, targets, reduction="none")
    assert_accurate(logits, targets, losses, gradient[:, :classes])
    assert not gradient[:, classes:].any()


@given(batches(min_rows=2), st.data())
def test_a_batch_split_anywhere_gives_the_same_bits(batch, data):
    logits, targets = batch
    at = data.draw(st.integers(0, len(logits)))
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    parts = [
        fastce.cross_entropy_with_grad(logits[rows], targets[rows], reduction="none")
        for rows in (slice(None, at), slice(at, None))
    ]
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), losses)
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), gradient)


@given(batches(min_rows=1), st.randoms(use_true_random=False))
def test_rows_in_any_order_give_the_same_bits(batch, random):
    logits, targets = batch
    order = list(range(len(logits)))
    random.shuffle(order)
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    shuffled_losses, shuffled = fastce.cross_entropy_with_grad(logits[order], targets[order], reduction="none")
    np.testing.assert_array_equal(shuffled_losses, losses[order])
    np.testing.assert_array_equal(shuffled, gradient[order])


@given(batches(min_rows=1), st.integers(0, 2**32))
def test_classes_in_any_order_mean_the_same(batch, seed):
    logits, targets = batch
    order = np.random.default_rng(seed).permutation(logits.shape[1])
    place = np.argsort(order)
    losses, gradient = fastce.cross_entropy_with_grad(logits[:, order], place[targets], reduction="none")
    assert_accurate(logits, targets, losses, gradient[:, place])


@given(batches(min_rows=1), st.integers(-30, 30))
def test_a_common_offset_changes_nothing_when_it_rounds_nothing(batch, offset):
    logits, targets = batch
    shifted = logits + logits.dtype.type(offset)
    exact = (shifted.astype(np.longdouble) - logits == offset).all(axis=1)
    losses, gradient = fastce.cross_entropy_with_grad(shifted[exact], targets[exact], reduction="none")
    assert_accurate(logits[exact], targets[exact], losses, gradient)


@given(batches(min_rows=1))
def test_the_mean_is_the_mean_of_the_losses(batch):
    logits, targets = batch
    losses = fastce.cross_entropy(logits.astype(float), targets, reduction="none")
    np.testing.assert_allclose(fastce.cross_entropy(logits.astype(float), targets), losses.mean(), rtol=1e-13)
    np.testing.assert_allclose(
        fastce.cross_entropy(logits.astype(float), targets, reduction="sum"), losses.sum(), rtol=1e-13
    )


@given(batches(min_rows=1), st.sampled_from([np.nan, np.inf]), st.data())
def test_a_bad_logit_anywhere_spoils_its_row_only(batch, bad, data):
    logits, targets = batch
    row = data.draw(st.integers(0, len(logits) - 1))
    column = data.draw(st.integers(0, logits.shape[1] - 1))
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    logits = logits.copy()
    logits[row, column] = bad
    spoiled_losses, spoiled = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    assert np.isnan(spoiled_losses[row]) and np.isnan(spoiled[row]).all()
    others = np.arange(len(logits)) != row
    np.testing.assert_array_equal(spoiled_losses[others], losses[others])
    np.testing.assert_array_equal(spoiled[others], gradient[others])


@given(
    hnp.arrays(np.uint32, st.tuples(st.integers(1, 4), st.integers(1, 40))),
    st.integers(0, 2**32),
)
def test_any_bits_at_all_as_float32_logits(bits, seed):
    logits = bits.view(np.float32)
    targets = np.random.default_rng(seed).integers(0, logits.shape[1], len(logits))
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    bad = (np.isnan(logits) | np.isposinf(logits)).any(axis=1) | np.isneginf(logits).all(axis=1)
    assert np.isnan(losses[bad]).all() and np.isnan(gradient[bad]).all()
    assert (losses[~bad] >= 0).all() and np.isfinite(gradient[~bad]).all()
    assert_accurate(logits[~bad], targets[~bad], losses[~bad], gradient[~bad])


@given(st.data())
def test_a_bad_id_anywhere_is_found(data):
    rows, classes = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 12))
    targets = np.zeros(rows, np.int64)
    where = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, unique=True))
    too_large, negative = st.integers(classes, 2**63 - 1), st.integers(-(2**63), -1).filter(lambda value: value != -100)
    targets[where] = data.draw(too_large | negative)
    out = np.full((rows, classes), 3.25)
    try:
        fastce.cross_entropy_with_grad(np.zeros((rows, classes)), targets, out=out)
    except IndexError as problem:
        assert str(min(where)) in str(problem) and str(targets[min(where)]) in str(problem)
    else:
        raise AssertionError("a class id out of range was accepted")
    assert (out == 3.25).all()
