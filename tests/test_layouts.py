"""Where and how arrays lie in memory changes no bit of the result."""

import numpy as np
import pytest
from calls import calls
from guarded import guarded

import fastce


def assert_same_bits(got, expected, what=""):
    """Equal to the bit, the sign of zero included; nan has no bits to compare."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    np.testing.assert_array_equal(got, expected, err_msg=str(what))
    np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(expected[expected == 0]), err_msg=str(what))


# Each layout is a function that returns an array equal to the given one, but lying differently.


def fortran_order(array):
    return np.asfortranarray(array)


def reversed_rows(array):
    return array[::-1].copy()[::-1]


def reversed_classes(array):
    return array[..., ::-1].copy()[..., ::-1]


def reversed_everything(array):
    return np.flip(np.flip(array).copy())


def every_second_row(array):
    wide = np.full((2 * len(array), *array.shape[1:]), np.nan if array.dtype.kind == "f" else 99).astype(array.dtype)
    wide[::2] = array
    return wide[::2]


def every_third_class(array):
    wide = np.zeros((*array.shape[:-1], 3 * array.shape[-1]), array.dtype)
    wide[..., 1::3] = array
    return wide[..., 1::3]


def padded_rows(array):
    wide = np.full((*array.shape[:-1], array.shape[-1] + 5), np.nan if array.dtype.kind == "f" else 99)
    wide = wide.astype(array.dtype)
    wide[..., 2:-3] = array
    return wide[..., 2:-3]


def unaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:]
    moved = raw.view(array.dtype).reshape(array.shape)
    moved[...] = array
    assert array.dtype.itemsize == 1 or array.size == 0 or not moved.flags.aligned
    return moved


def field_of_records(array):
    records = np.zeros(array.shape, np.dtype([("flag", np.uint8), ("value", array.dtype)]))
    records["value"] = array
    return records["value"]


def permuted_axes(array):
    return np.moveaxis(np.moveaxis(array, 0, -1).copy(), -1, 0)


WRITABLE_LAYOUTS = [
    np.copy,
    fortran_order,
    reversed_rows,
    reversed_classes,
    reversed_everything,
    every_second_row,
    every_third_class,
    padded_rows,
    unaligned,
    field_of_records,
    permuted_axes,
]


def byte_swapped(array):
    return array.astype(array.dtype.newbyteorder())


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def read_only_unaligned(array):
    array = unaligned(array)
    array.flags.writeable = False
    return array


def byte_swapped_and_strided(array):
    return every_third_class(byte_swapped(array))


class Subclass(np.ndarray):
    def __array_finalize__(self, base):
        self.note = "kept from fastce"


def subclass(array):
    return array.copy().view(Subclass)


def record_array(array):
    return array.copy().view(np.recarray)


def unmasked(array):
    return np.ma.array(array)


READABLE_LAYOUTS = [
    *WRITABLE_LAYOUTS,
    byte_swapped,
    read_only,
    read_only_unaligned,
    byte_swapped_and_strided,
    subclass,
    record_array,
    unmasked,
]
SHAPES = [(5, 1), (7, 3), (40, 10), (6, 65), (4, 1000), (3, 4099), (3000, 10), (2, 5, 33), (3, 2, 4, 10)]


def problem(shape, dtype, axis=-1):
    rng = np.random.default_rng(shape)
    logits = (rng.normal(0, 1, shape) * rng.choice([1, 30, 2000], np.append(shape[:-1], 1))).astype(dtype)
    targets = rng.integers(0, shape[axis], np.delete(shape, axis))
    targets[rng.random(targets.shape) < 0.1] = -100
    return logits, targets


def results(logits, targets, **options):
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none", **options)
    mean, _ = fastce.cross_entropy_with_grad(np.array(logits), targets, **{**options, "out": None})
    return losses, gradient, mean


@pytest.mark.parametrize("layout", READABLE_LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_layout_of_logits(layout, dtype):
    for shape in SHAPES:
        logits, targets = problem(shape, dtype)
        expected = results(logits, targets)
        given = layout(logits)
        before = given.tobytes()
        losses, gradient, mean = results(given, targets)
        for got, wanted in zip((losses, gradient), expected, strict=False):
            assert_same_bits(got, wanted, shape)
            assert type(got) is np.ndarray and got.dtype.isnative
        assert mean == expected[2]
        assert_same_bits(fastce.cross_entropy(given, targets, reduction="none"), losses, shape)
        assert fastce.cross_entropy(given, targets) == mean
        assert given.tobytes() == before


@pytest.mark.parametrize("layout", READABLE_LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_layout_of_targets(layout, dtype):
    for shape in SHAPES:
        logits, targets = problem(shape, dtype)
        expected = results(logits, targets)
        for kind in (np.int64, np.int32, np.int16):
            for got, wanted in zip(results(logits, layout(targets.astype(kind))), expected, strict=True):
                assert_same_bits(got, wanted, shape)


@pytest.mark.parametrize("layout", READABLE_LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_layout_of_grad_output(layout, dtype, rng):
    logits, targets = problem((40, 10), dtype)
    factors = rng.normal(0, 2, 40)
    expected = results_with_factors(logits, targets, factors)
    assert_same_bits(results_with_factors(logits, targets, layout(factors)), expected)
    assert_same_bits(results_with_factors(logits, targets, list(factors)), expected)


def results_with_factors(logits, targets, factors):
    return fastce.cross_entropy_with_grad(logits, targets, reduction="none", grad_output=factors)[1]


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_layout_of_out(layout, dtype):
    for shape in SHAPES:
        logits, targets = problem(shape, dtype)
        expected = results(logits, targets)
        out = layout(np.full_like(logits, np.nan))
        losses, gradient, _ = results(logits, targets, out=out)
        assert gradient is out
        assert_same_bits(losses, expected[0], shape)
        assert_same_bits(np.array(out), expected[1], shape)


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS, ids=lambda layout: layout.__name__)
def test_in_place_equals_out_of_place(layout, dtype):
    for shape in SHAPES:
        logits, targets = problem(shape, dtype)
        expected = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
        given = layout(logits)
        losses, gradient = fastce.cross_entropy_with_grad(given, targets, reduction="none", out=given)
        assert gradient is given
        assert_same_bits(losses, expected[0], shape)
        assert_same_bits(np.array(given), expected[1], shape)


def test_in_place_through_another_array_of_the_same_memory(dtype):
    # `out` is the logits when it has their address, shape and strides, whatever the Python object.
    logits, targets = problem((40, 10), dtype)
    expected = fastce.cross_entropy_with_grad(logits, targets)
    given = logits.copy()
    out = given[:]
    loss, gradient = fastce.cross_entropy_with_grad(given, targets, out=out)
    assert gradient is out and loss == expected[0]
    assert_same_bits(given, expected[1])


def test_out_beside_its_surroundings(dtype):
    # Only `out` itself is written, not the memory around it.
    for shape in SHAPES:
        logits, targets = problem(shape, dtype)
        frame = np.full((*shape[:-1], shape[-1] + 7), 8.5, dtype)
        fastce.cross_entropy_with_grad(logits, targets, out=frame[..., 3:-4])
        assert (frame[..., :3] == 8.5).all() and (frame[..., -4:] == 8.5).all()
        flat = np.full(logits.size + 64, 8.5, dtype)
        fastce.cross_entropy_with_grad(logits, targets, out=flat[32:-32].reshape(shape))
        assert (flat[:32] == 8.5).all() and (flat[-32:] == 8.5).all()


@pytest.mark.parametrize("axis", range(4))
def test_any_axis_of_any_layout(axis, dtype):
    shape = (3, 4, 5, 6)
    logits, targets = problem(shape, dtype, axis)
    last = np.ascontiguousarray(np.moveaxis(logits, axis, -1))
    losses, gradient = fastce.cross_entropy_with_grad(last, targets, reduction="none")
    for layout in READABLE_LAYOUTS:
        for name in (axis, axis - 4):
            got_losses, got = fastce.cross_entropy_with_grad(layout(logits), targets, axis=name, reduction="none")
            assert_same_bits(got_losses, losses, layout)
            assert_same_bits(np.moveaxis(got, axis, -1), gradient, layout)
    for layout in WRITABLE_LAYOUTS:
        given = layout(logits)
        fastce.cross_entropy_with_grad(given, targets, axis=axis, reduction="none", out=given)
        assert_same_bits(np.moveaxis(np.array(given), axis, -1), gradient, layout)
        out = layout(np.full_like(logits, np.nan))
        fastce.cross_entropy_with_grad(logits, targets, axis=axis, reduction="none", out=out)
        assert_same_bits(np.moveaxis(np.array(out), axis, -1), gradient, layout)


@pytest.mark.parametrize("shape", [(2, 40, 700), (1, 10, 9000), (3, 1000, 50), (1, 5000, 7), (65, 3, 65)])
def test_a_strided_class_axis_of_a_large_array(shape, dtype):
    # Large enough that the copy goes block by block.
    logits, targets = problem(shape, dtype, axis=1)
    last = np.ascontiguousarray(np.moveaxis(logits, 1, -1))
    losses, gradient = fastce.cross_entropy_with_grad(last, targets, reduction="none")
    given = logits.copy()
    for out in (None, np.empty_like(logits), given):
        got_losses, got = fastce.cross_entropy_with_grad(given, targets, axis=1, reduction="none", out=out)
        assert_same_bits(got_losses, losses)
        assert_same_bits(np.moveaxis(got, 1, -1), gradient)


def test_rows_of_stride_zero(dtype, rng):
    for classes in (3, 10, 65, 1000):
        row = rng.normal(0, 3, classes).astype(dtype)
        targets = rng.integers(0, classes, 50)
        broadcast = np.broadcast_to(row, (50, classes))
        for got, wanted in zip(results(broadcast, targets), results(broadcast.copy(), targets), strict=True):
            assert_same_bits(got, wanted)
        constant = np.broadcast_to(row[:1], (50, classes))
        for got, wanted in zip(results(constant, targets), results(constant.copy(), targets), strict=True):
            assert_same_bits(got, wanted)


def test_targets_of_stride_zero(dtype):
    logits, _ = problem((40, 10), dtype)
    for got, wanted in zip(
        results(logits, np.broadcast_to(np.int64(3), 40)), results(logits, np.full(40, 3)), strict=True
    ):
        assert_same_bits(got, wanted)


def test_sliding_windows_over_one_series(dtype, rng):
    series = rng.normal(0, 3, 300).astype(dtype)
    windows = np.lib.stride_tricks.sliding_window_view(series, 20)
    targets = rng.integers(0, 20, len(windows))
    for got, wanted in zip(results(windows, targets), results(windows.copy(), targets), strict=True):
        assert_same_bits(got, wanted)


def test_strides_of_axes_of_length_one_mean_nothing(dtype, rng):
    row = rng.normal(0, 3, 10).astype(dtype)
    odd = np.lib.stride_tricks.as_strided(row, (1, 1, 10), (-12345678, 7, dtype.itemsize))
    expected = results(row[None, None], [[4]])
    for got, wanted in zip(results(odd, [[4]]), expected, strict=True):
        assert_same_bits(got, wanted)
    single = np.lib.stride_tricks.as_strided(row, (10, 1), (dtype.itemsize, 99991))
    for got, wanted in zip(results(single, [0] * 10), results(row[:, None].copy(), [0] * 10), strict=True):
        assert_same_bits(got, wanted)


def test_memory_maps(tmp_path, dtype):
    logits, targets = problem((40, 33), dtype)
    expected = results(logits, targets)
    for offset in (0, 1, 64):
        path = tmp_path / f"logits{offset}"
        path.write_bytes(b"x" * offset + logits.tobytes())
        for mode in ("r", "r+", "c"):
            mapped = np.memmap(path, dtype, mode, offset, logits.shape)
            for got, wanted in zip(results(mapped, targets), expected, strict=True):
                assert_same_bits(got, wanted)
        assert path.read_bytes()[offset:] == logits.tobytes()
        mapped = np.memmap(path, dtype, "r+", offset, logits.shape)
        assert fastce.cross_entropy_with_grad(mapped, targets, reduction="none", out=mapped)[1] is mapped
        mapped.flush()
        assert path.read_bytes()[offset:] == expected[1].tobytes()


def test_lists_are_float64():
    logits, targets = problem((7, 3), np.dtype(np.float64))
    expected = results(logits, targets)
    for given in (logits.tolist(), tuple(map(tuple, logits.tolist()))):
        losses, gradient = fastce.cross_entropy_with_grad(given, targets.tolist(), reduction="none")
        assert_same_bits(losses, expected[0])
        assert_same_bits(gradient, expected[1])


def test_out_may_be_a_subclass_and_is_returned(dtype):
    logits, targets = problem((7, 3), dtype)
    expected = results(logits, targets)
    out = subclass(np.empty_like(logits))
    assert fastce.cross_entropy_with_grad(logits, targets, reduction="none", out=out)[1] is out
    assert_same_bits(out.view(np.ndarray), expected[1])


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i2", ">i8", ">u4", "q", "Q", "l"])
def test_any_integer_dtype_of_class_ids(kind, dtype, rng):
    logits = rng.normal(0, 3, (300, 10)).astype(dtype)
    ids = rng.integers(0, 10, 300)
    expected = results(logits, ids)
    for got, wanted in zip(results(logits, ids.astype(kind)), expected, strict=True):
        assert_same_bits(got, wanted)
    for ignore_index in (3, [3, 5]):
        expected = results(logits, ids, ignore_index=ignore_index)
        for got, wanted in zip(results(logits, ids.astype(kind), ignore_index=ignore_index), expected, strict=True):
            assert_same_bits(got, wanted)


def test_large_unsigned_ids_are_not_negative_ones():
    # 2**64 - 100 has the bits of -100, the default ignore_index; it is a class id out of range all the same.
    ids = np.array([0, 2**64 - 100, 1], np.uint64)
    with pytest.raises(IndexError, match=str(2**64 - 100)):
        fastce.cross_entropy(np.zeros((3, 2)), ids)


def test_interleaved_views_are_no_overlap(dtype):
    logits, targets = problem((40, 10), dtype)
    expected = results(logits, targets)

    def check(given, out):
        given[...] = logits
        losses, gradient, _ = results(given, targets, out=out)
        assert gradient is out
        assert_same_bits(losses, expected[0])
        assert_same_bits(np.array(out), expected[1])
        assert_same_bits(np.array(given), logits)

    base = np.empty((40, 20), dtype)
    check(base[:, :10], base[:, 10:])
    check(base[:, 10:], base[:, :10])
    check(base[:, ::2], base[:, 1::2])
    base = np.empty((80, 10), dtype)
    check(base[:40], base[40:])
    check(base[::2], base[1::2])
    check(base[1::2], base[::2])
    base = np.empty((2, 10, 40), dtype)
    check(base[0].T, base[1].T)
    base = np.empty((40, 10, 2), dtype)
    check(base[..., 1], base[..., 0])


def test_class_ids_may_lie_where_the_gradient_goes(dtype):
    logits, targets = problem((40, 10), dtype)
    targets = targets.astype(f"i{dtype.itemsize}")
    expected = results(logits, targets)
    for row in (slice(0, 4), slice(36, 40)):
        out = np.empty_like(logits)
        ids = out[row].reshape(-1).view(targets.dtype)
        ids[...] = targets
        losses, gradient = fastce.cross_entropy_with_grad(logits, ids, reduction="none", out=out)
        assert_same_bits(losses, expected[0])
        assert_same_bits(gradient, expected[1])


def test_class_ids_may_lie_in_padding_of_in_place_logits(dtype):
    logits, targets = problem((40, 10), dtype)
    expected = results(logits, targets)
    joint = np.empty((40, 11), dtype)
    joint[:, :10] = logits
    ids = joint.view(f"i{dtype.itemsize}")[:, 10]
    ids[...] = targets
    given = joint[:, :10]
    losses, gradient = fastce.cross_entropy_with_grad(given, ids, reduction="none", out=given)
    assert_same_bits(losses, expected[0])
    assert_same_bits(np.array(gradient), expected[1])
    np.testing.assert_array_equal(ids, targets)


@pytest.mark.parametrize("classes", [1, 3, 10, 17, 48, 64, 100, 1000, 4099])
def test_every_address_gives_the_same_bits(classes, dtype, rng):
    logits = rng.normal(0, 3, (5, classes)).astype(dtype)
    targets = rng.integers(0, classes, 5)
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    raw = np.empty(logits.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64
    out_raw = np.empty_like(raw)
    out_start = -out_raw.ctypes.data % 64
    for offset in range(64):
        given = raw[start + offset :][: logits.nbytes].view(dtype).reshape(logits.shape)
        given[...] = logits
        out = out_raw[out_start + (offset * 7) % 64 :][: logits.nbytes].view(dtype).reshape(logits.shape)
        for target in (None, out, given):
            got_losses, got = fastce.cross_entropy_with_grad(given, targets, reduction="none", out=target)
            assert_same_bits(got_losses, losses, offset)
            assert_same_bits(got, gradient, offset)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 10, 16, 33, 48, 49, 100, 1000, 4099])
def test_the_place_in_the_batch_gives_the_same_bits(classes, dtype, rng):
    rows = 150 if classes < 200 else 20
    logits = (rng.normal(0, 1, (rows, classes)) * rng.choice([1, 30, 90, 2000], (rows, 1))).astype(dtype)
    targets = rng.integers(0, classes, rows)
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    order = rng.permutation(rows)
    parts = [slice(0, 1), slice(1, 2), slice(3, rows), slice(rows - 5, rows), slice(rows // 3, rows // 2), order]
    for part in parts:
        got_losses, got = fastce.cross_entropy_with_grad(logits[part], targets[part], reduction="none")
        assert_same_bits(got_losses, losses[part], part)
        assert_same_bits(got, gradient[part], part)
    for row in range(min(rows, 20)):
        loss, got = fastce.cross_entropy_with_grad(logits[row], targets[row], reduction="none")
        assert_same_bits(loss, losses[row])
        assert_same_bits(got, gradient[row])


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 10, 16, 33, 48, 49, 100, 1000, 4099, 40_000])
def test_the_neighbours_of_a_row_change_nothing(classes, dtype, rng):
    # Rows of very different magnitude, bad rows and ignored rows beside the ones looked at.
    logits = rng.normal(0, 3, (40, classes)).astype(dtype)
    targets = rng.integers(0, classes, 40)
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    # The last of them has rows whose target is far below their maximum.
    spread = np.where(np.arange(classes) % 3 == 1, 400.0, rng.normal(0, 3, classes))
    for neighbour in (np.nan, np.inf, -np.inf, 1e30, 70.0, -70.0, spread):
        changed, ids = logits.copy(), targets.copy()
        changed[1::2] = neighbour
        ids[3::6] = -100
        got_losses, got = fastce.cross_entropy_with_grad(changed, ids, reduction="none")
        assert_same_bits(got_losses[::2], losses[::2], neighbour)
        assert_same_bits(got[::2], gradient[::2], neighbour)


def test_the_loss_alone_equals_the_loss_with_the_gradient(dtype):
    for shape in SHAPES:
        logits, targets = problem(shape, dtype)
        logits.reshape(-1)[:: logits.size // 3 + 1] = -np.inf
        for reduction in ("none", "sum", "mean"):
            alone = fastce.cross_entropy(logits, targets, reduction=reduction)
            with_gradient, _ = fastce.cross_entropy_with_grad(logits, targets, reduction=reduction)
            assert_same_bits(alone, with_gradient, shape)


@pytest.mark.parametrize("classes", [3, 50, 1001, 5003, 40_001])
def test_gradients_too_large_for_the_caches_have_the_same_bits(classes, dtype, rng):
    # From 16 MB on a gradient is written past the caches, by whole lines; written over the logits it never is.
    rows = (1 << 24) // (classes * np.dtype(dtype).itemsize) + 7
    logits = np.tile(rng.normal(size=(7, classes)).astype(dtype), (rows // 7 + 1, 1))[:rows]
    targets = rng.integers(0, classes, rows)
    buffer = np.full(rows * classes + 3, np.nan, dtype)
    out = buffer[1 : 1 + rows * classes].reshape(rows, classes)
    loss, _ = fastce.cross_entropy_with_grad(logits, targets, out=out)
    in_place, _ = fastce.cross_entropy_with_grad(logits, targets, out=logits)
    assert loss == in_place
    np.testing.assert_array_equal(out, logits)
    assert np.isnan(buffer[[0, -2, -1]]).all()


@pytest.mark.parametrize("kind", ["ids", "distributions"])
def test_options_on_short_rows_too_large_for_the_caches_have_the_same_bits(kind, dtype, rng):
    # Ignored rows or such of weight 0, classes that do not exist, and a factor beyond the dtype in some blocks; logits
    # and targets end at a page that must not be touched.
    classes = 10
    rows = (1 << 24) // (classes * np.dtype(dtype).itemsize) + 7
    logits = np.tile(rng.normal(0, 3, (7, classes)).astype(dtype), (rows // 7 + 1, 1))[:rows]
    shown = np.arange(classes) != 4
    factors = np.ones(rows)
    factors[rows // 2] = 1e-44
    options = {"reduction": "none", "grad_output": factors, "class_mask": shown}
    if kind == "ids":
        targets = rng.choice(np.flatnonzero(shown), rows)
        targets[rng.random(rows) < 0.1] = -100
    else:
        targets = rng.random((rows, classes)).astype(dtype) * shown.astype(dtype)
        options["sample_weight"] = (rng.random(rows) > 0.1).astype(float)
    logits, targets = guarded(logits, at_end=True), guarded(targets, at_end=True)
    buffer = np.full(rows * classes + 3, np.nan, dtype)
    out = buffer[1 : 1 + rows * classes].reshape(rows, classes)
    losses, _ = fastce.cross_entropy_with_grad(logits, targets, out=out, **options)
    in_place, _ = fastce.cross_entropy_with_grad(logits, targets, out=logits, **options)
    assert_same_bits(losses, in_place)
    assert_same_bits(out, logits)
    assert np.isnan(buffer[[0, -2, -1]]).all()


@pytest.mark.parametrize("classes", [7, 1001, 70_001])
def test_results_of_general_rows_too_large_for_the_caches_have_the_same_bits(classes, dtype, rng):
    # They pass in slabs, each smaller than what is streamed; parts of the batch are not streamed at all.
    rows = (1 << 24) // (classes * np.dtype(dtype).itemsize) + 5
    logits = rng.normal(0, 3, (rows, classes)).astype(dtype)
    masses, ids = rng.random((rows, classes)).astype(dtype), rng.integers(0, classes, rows)
    parts = [slice(0, rows // 3), slice(rows // 3, rows)]
    for call in (
        lambda part, out: fastce.log_softmax(logits[part], out=out),
        lambda part, out: fastce.cross_entropy_with_grad(logits[part], masses[part], reduction="sum", out=out),
        lambda part, out: fastce.cross_entropy_with_grad(
            logits[part], ids[part], reduction="sum", softcap=5.0, weight=np.ones(classes), label_smoothing=0.1, out=out
        ),
    ):
        buffer = np.full(rows * classes + 3, np.nan, dtype)
        out = buffer[1 : 1 + rows * classes].reshape(rows, classes)
        call(slice(None), out)
        for part in parts:
            alone = np.empty_like(logits[part])
            call(part, alone)
            assert_same_bits(out[part], alone)
        assert np.isnan(buffer[[0, -2, -1]]).all()


@pytest.mark.parametrize(("groups", "inner"), [(2, 100_000), (1, 200_037), (40, 5003)])
def test_columns_too_large_for_the_caches_have_the_same_bits(groups, inner, dtype, rng):
    # Lines that are not whole, at both ends of a block of rows, ignored rows, and factors beyond the dtype.
    classes = 21
    logits = np.tile(rng.normal(0, 3, (1, classes, 7)).astype(dtype), (groups, 1, inner // 7 + 1))[..., :inner].copy()
    logits[0, :, 5] = -np.inf
    targets = rng.integers(0, classes, (groups, inner))
    targets[rng.random(targets.shape) < 0.1] = -100
    factors = np.ones(targets.shape)
    factors[:, inner // 2] = 1e-44
    options = {"axis": 1, "reduction": "none", "grad_output": factors}
    buffer = np.full(logits.size + 3, np.nan, dtype)
    out = buffer[1 : 1 + logits.size].reshape(logits.shape)
    losses, _ = fastce.cross_entropy_with_grad(logits, targets, out=out, **options)
    in_place, _ = fastce.cross_entropy_with_grad(logits, targets, out=logits, **options)
    assert_same_bits(losses, in_place)
    assert_same_bits(out, logits)
    assert np.isnan(buffer[[0, -2, -1]]).all()


@pytest.mark.thread_unsafe(reason="replaces sizes that fastce works with")
def test_no_size_of_slabs_or_blocks_changes_a_bit(dtype, monkeypatch):
    # Batches are handed to the kernels in parts, so that Ctrl-C is noticed; here parts are tiny, and none fits another.
    def results():
        for name, call in calls(dtype, (1200, 5)).items():
            # As an option, what is the default anyway keeps a call from the short way, which knows no parts.
            yield name, call(num_threads=2) if "binary" in name else call(axis=1)
        call = calls(dtype, (1200, 5))["loss and gradient"]
        for groups in (1, 3, 400):
            columns = np.ascontiguousarray(call.arguments["logits"].reshape(groups, -1, 5).swapaxes(1, 2))
            ids = call.arguments["targets"].reshape(groups, -1)
            yield f"columns of {groups} groups", call(logits=columns, targets=ids, axis=1)

    whole = list(results())
    monkeypatch.setattr(fastce._engine, "slab_rows", lambda n_classes, num_threads, elements=0: 7)
    monkeypatch.setattr(fastce._engine, "SLAB_ELEMENTS", 512)
    monkeypatch.setattr(fastce._engine, "BUFFER_ELEMENTS", 512)
    for (name, got), (_, expected) in zip(results(), whole, strict=True):
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_rows_longer_than_a_block_have_the_divergence_of_their_parts(dtype, rng):
    # Uniform: KL(q || p) = sum(q log q) + log C.
    n_classes = 300_001
    targets = rng.random((2, n_classes)).astype(dtype)
    targets /= targets.sum(axis=1, keepdims=True)
    q = targets.astype(np.longdouble)
    expected = (q * np.log(q * n_classes) - q + np.longdouble(1) / n_classes).sum(axis=1) + (q.sum(axis=1) - 1)
    got = fastce.kl_divergence(np.zeros((2, n_classes), dtype), targets, reduction="none")
    np.testing.assert_allclose(got, expected.astype(np.float64), rtol=5e-7 if dtype == np.float32 else 2e-15)
