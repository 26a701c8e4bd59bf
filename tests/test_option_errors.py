"""Options and soft targets that cannot be right are refused by name, before anything is written, with a remedy."""

import re

import numpy as np
import pytest

import fastce
from fastce import SparseTargets

ROWS, CLASSES = 6, 5
SENTINEL = 12345.678


def valid_arguments(dtype=np.float64):
    rng = np.random.default_rng(5)
    return {"logits": rng.normal(0, 3, (ROWS, CLASSES)).astype(dtype), "targets": rng.integers(0, CLASSES, ROWS)}


def buffers(like):
    return {"out": np.full(like.shape, SENTINEL, like.dtype), "hess_out": np.full(like.shape, SENTINEL, like.dtype)}


def refuse(error, *patterns, only_gradients=False, **changed):
    """All three functions raise exactly this, with all the patterns in the message, and have written nothing."""
    arguments = {**valid_arguments(), **changed}
    calls = [(fastce.cross_entropy_with_grad, ["out"]), (fastce.cross_entropy_with_grad_hess, ["out", "hess_out"])]
    if not only_gradients:
        calls.append((fastce.cross_entropy, []))
    arrays = [value for value in arguments.values() if isinstance(value, np.ndarray) and value.dtype != object]
    before = [array.tobytes() for array in arrays]
    for function, names in calls:
        written = {name: array for name, array in buffers(np.empty((ROWS, CLASSES))).items() if name in names}
        given = {**written, **arguments}
        if "hess_out" not in names:
            given.pop("hess_out", None)
        if "softcap" in given and "hess_out" in names and given["softcap"] is not None:
            continue
        with pytest.raises(error) as caught:
            function(given.pop("logits"), given.pop("targets"), **given)
        message = str(caught.value)
        for pattern in patterns:
            assert re.search(pattern, message), f"{function.__name__}: no {pattern!r} in: {message}"
        assert all((array == SENTINEL).all() for array in written.values()), function.__name__
    assert [array.tobytes() for array in arrays] == before


def test_the_arguments_themselves_are_valid():
    assert np.isfinite(fastce.cross_entropy(**valid_arguments()))


# Weights


@pytest.mark.parametrize("shape", [(ROWS,), (1,), (), (1, CLASSES), (CLASSES, 1), (0,)], ids=str)
def test_class_weights_of_another_shape(shape):
    refuse(ValueError, "^weight", re.escape(str((CLASSES,))), re.escape(str(shape)), weight=np.ones(shape))


@pytest.mark.parametrize("bad", [-1.0, -1e-300, np.nan, np.inf, -np.inf])
def test_class_weights_out_of_range(bad):
    weight = np.ones(CLASSES)
    weight[3] = bad
    refuse(ValueError, "^weight", "finite and >= 0", r"weight\[3\]", re.escape(str(bad)), weight=weight)


@pytest.mark.parametrize("name", ["weight", "sample_weight"])
@pytest.mark.parametrize("kind", [complex, bool, object, "U1", "M8[s]", "m8[s]", np.longdouble], ids=str)
def test_weights_of_a_kind_that_cannot_be_right(name, kind):
    refuse(TypeError, f"^{name}", **{name: np.zeros(CLASSES if name == "weight" else ROWS, kind)})


@pytest.mark.parametrize("name", ["weight", "sample_weight", "class_mask", "targets"])
def test_ragged_lists_are_named(name):
    refuse(ValueError, f"^{name}", **{name: [[1.0], [2.0, 3.0]]})


@pytest.mark.parametrize("name", ["weight", "sample_weight"])
def test_masked_weights_are_refused_unless_nothing_is_masked(name):
    values = np.ma.array(np.ones(CLASSES if name == "weight" else ROWS))
    arguments = valid_arguments()
    np.testing.assert_allclose(fastce.cross_entropy(**arguments, **{name: values}), fastce.cross_entropy(**arguments))
    values[2] = np.ma.masked
    refuse(TypeError, f"^{name}", "mask", **{name: values})


@pytest.mark.parametrize("shape", [(ROWS + 1,), (1,), (), (ROWS, 1), (ROWS, CLASSES), (CLASSES,), (0,)], ids=str)
def test_sample_weights_of_another_shape(shape):
    refuse(ValueError, "^sample_weight", re.escape(str((ROWS,))), re.escape(str(shape)), sample_weight=np.ones(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sample_weights_out_of_range(bad):
    s = np.ones(ROWS)
    s[4] = bad
    refuse(ValueError, "^sample_weight", "finite", r"sample_weight\[4\]", str(bad), sample_weight=s)


def test_the_position_of_a_bad_sample_weight_has_all_axes():
    s = np.ones((2, 3))
    s[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"sample_weight\[1, 2\] = nan"):
        fastce.cross_entropy(np.zeros((2, 4, 3)), np.zeros((2, 3), int), axis=1, sample_weight=s)


# Numbers


OUT_OF_RANGE = [
    *(("label_smoothing", value) for value in (-0.1, 1.1, 1 + 1e-12, np.nan, np.inf, -np.inf)),
    *(("logit_scale", value) for value in (0, 0.0, -1.0, np.nan, np.inf)),
    *(("softcap", value) for value in (0, 0.0, -30.0, np.nan, np.inf)),
    *(("z_loss", value) for value in (-1e-4, -1, np.nan, np.inf, -np.inf)),
]
RANGES = {"label_smoothing": r"\[0, 1\]", "logit_scale": "> 0", "softcap": "> 0", "z_loss": ">= 0"}


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=str)
def test_numbers_out_of_range(name, value):
    refuse(ValueError, f"^{name}", RANGES[name], re.escape(repr(value)), **{name: value})
    refuse(ValueError, f"^{name}", **{name: np.float64(value)})


@pytest.mark.parametrize("name", list(RANGES))
@pytest.mark.parametrize("value", ["0.1", 1j, [0.1], np.array([0.1]), True, object(), b"1", {}], ids=type)
def test_numbers_that_are_none(name, value):
    refuse(TypeError, f"^{name}", **{name: value})


@pytest.mark.parametrize("name", ["label_smoothing", "logit_scale", "z_loss"])
def test_none_stands_for_no_number(name):
    refuse(TypeError, f"^{name}", **{name: None})


@pytest.mark.parametrize("kind", [int, np.float32, np.float16, np.int8, np.array], ids=str)
def test_any_real_scalar_is_a_number(kind):
    arguments = valid_arguments()
    for name in RANGES:
        assert fastce.cross_entropy(**arguments, **{name: kind(1)}) == fastce.cross_entropy(**arguments, **{name: 1.0})


def test_a_hessian_under_a_cap_is_refused_with_what_to_do_instead():
    with pytest.raises(ValueError, match=r"softcap must be None for a Hessian, got 5.0; apply the cap"):
        fastce.cross_entropy_with_grad_hess(**valid_arguments(), softcap=5.0)


# Masks


@pytest.mark.parametrize("kind", [int, float, np.uint8, object, "U4"], ids=str)
def test_masks_are_bool(kind):
    refuse(TypeError, "^class_mask", "bool", class_mask=np.ones(CLASSES, kind))
    refuse(TypeError, "^class_mask", "bool", class_mask=1)


@pytest.mark.parametrize("shape", [(CLASSES + 1,), (ROWS,), (ROWS, CLASSES, 1), (2, CLASSES), (0,), (1, ROWS, CLASSES)])
def test_masks_of_another_shape(shape):
    shapes = re.escape(str((ROWS, CLASSES))), re.escape(str(shape))
    refuse(ValueError, "^class_mask", *shapes, class_mask=np.ones(shape, bool))


def test_a_mask_that_hides_every_class_of_a_row_names_the_row():
    mask = np.ones((ROWS, CLASSES), bool)
    mask[[2, 4]] = False
    words = "^class_mask hides every class of row"
    refuse(ValueError, words, r"\b2\b", "sample_weight 0|ignore_index", class_mask=mask)
    refuse(ValueError, words, r"\b0\b", class_mask=np.zeros(CLASSES, bool))
    refuse(ValueError, words, r"\b0\b", class_mask=False)
    for targets in SOFT:
        refuse(ValueError, words, r"\b2\b", class_mask=mask, targets=targets)
    with pytest.raises(ValueError, match=r"row \[1, 2\]"):
        mask = np.ones((2, 4, 3), bool)
        mask[1, :, 2] = False
        fastce.cross_entropy(np.zeros((2, 4, 3)), np.zeros((2, 3), int), axis=1, class_mask=mask)


# Ignored ids and soft targets


SPARSE = SparseTargets(np.zeros((ROWS, 2), int), np.full((ROWS, 2), 0.5))
SOFT = [np.full((ROWS, CLASSES), 1 / CLASSES), SPARSE]


@pytest.mark.parametrize("targets", SOFT, ids=["distribution", "sparse"])
@pytest.mark.parametrize("ignore_index", [0, 255, -1, [-100], [0, 1], (), np.int64(7), np.array([3])], ids=str)
def test_ignore_index_goes_only_with_class_ids(targets, ignore_index):
    refuse(ValueError, "^ignore_index", "class ids", "sample_weight 0", targets=targets, ignore_index=ignore_index)


@pytest.mark.parametrize("targets", SOFT, ids=["distribution", "sparse"])
def test_the_default_and_none_go_with_soft_targets(targets):
    logits = valid_arguments()["logits"]
    plain = fastce.cross_entropy(logits, targets)
    for ignore_index in (-100, None):
        assert fastce.cross_entropy(logits, targets, ignore_index=ignore_index) == plain
    refuse(TypeError, "^ignore_index", targets=targets, ignore_index="-100")


# Distributions


@pytest.mark.parametrize("bad", [-1e-9, -1.0, np.nan, np.inf, -np.inf])
def test_distributions_out_of_range(bad):
    q = np.full((ROWS, CLASSES), 1 / CLASSES)
    q[3, 2] = q[5, 0] = bad
    refuse(ValueError, "^targets", "finite and >= 0", r"targets\[3, 2\]", re.escape(str(bad)), targets=q)
    refuse(ValueError, "^targets", r"targets\[5, 0\]", targets=q, sample_weight=[1, 1, 1, 0, 1, 1])
    refuse(ValueError, "^targets", targets=q.astype(np.float32))
    refuse(ValueError, "^targets", targets=np.asfortranarray(q))


def test_the_position_in_a_distribution_is_that_of_the_array_as_given():
    q = np.full((2, 4, 3), 0.25)
    q[1, 2, 0] = -1
    with pytest.raises(ValueError, match=r"targets\[1, 2, 0\] = -1"):
        fastce.cross_entropy(np.zeros((2, 4, 3)), q, axis=1)


def test_a_bad_entry_of_a_large_distribution_is_found():
    logits = np.zeros((3000, 100), np.float32)
    for dtype in (np.float32, np.float64):
        for layout in (np.ascontiguousarray, np.asfortranarray):
            q = layout(np.full((3000, 100), 0.01, dtype))
            for bad in (np.nan, -1.0, np.inf):
                q[2999, 99] = bad
                with pytest.raises(ValueError, match=r"targets\[2999, 99\]"):
                    fastce.cross_entropy(logits, q)


@pytest.mark.parametrize(
    ("targets", "error", "hint"),
    [
        (np.zeros((ROWS, CLASSES), int), ValueError, "one-hot"),
        (np.zeros((ROWS, CLASSES), bool), TypeError, "class ids must be integers"),
        (np.zeros(ROWS), TypeError, "class ids must be integers"),
        (np.zeros((ROWS, CLASSES + 1)), (TypeError, ValueError), r"\(6, 6\)"),
        (np.zeros((CLASSES, ROWS)), (TypeError, ValueError), r"\(5, 6\)"),
        (np.zeros((ROWS, CLASSES, 1)), (TypeError, ValueError), r"\(6, 5, 1\)"),
        (np.zeros((ROWS, CLASSES), complex), TypeError, "complex128"),
        (np.zeros((ROWS, CLASSES), object), TypeError, "object"),
        (np.zeros((ROWS, CLASSES), np.longdouble), TypeError, np.dtype(np.longdouble).name),
        (np.full((ROWS, CLASSES), "a"), TypeError, "U1"),
    ],
    ids=str,
)
def test_targets_that_are_neither_ids_nor_distributions(targets, error, hint):
    refuse(error, "^targets", hint, targets=targets)


def test_masked_distributions_are_refused_unless_nothing_is_masked():
    q = np.ma.array(np.full((ROWS, CLASSES), 1 / CLASSES))
    assert np.isfinite(fastce.cross_entropy(valid_arguments()["logits"], q))
    q[1, 1] = np.ma.masked
    refuse(TypeError, "^targets", "mask", targets=q)


# Sparse targets


def sparse(indices=None, values=None):
    indices = np.zeros((ROWS, 2), int) if indices is None else indices
    return SparseTargets(indices, np.full((ROWS, 2), 0.5) if values is None else values)


@pytest.mark.parametrize("kind", [float, bool, complex, object, "U1"], ids=str)
def test_indices_are_integers(kind):
    refuse(TypeError, r"^targets\.indices", targets=sparse(indices=np.zeros((ROWS, 2), kind)))


@pytest.mark.parametrize("shape", [(ROWS,), (2, ROWS), (ROWS, 2, 1), (ROWS + 1, 2), (), (0,), (1, 2)], ids=str)
def test_indices_of_another_shape(shape):
    targets = sparse(np.zeros(shape, int), np.zeros(shape))
    refuse(ValueError, r"^targets\.indices", re.escape(str(shape)), targets=targets)


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1), (ROWS, 3), (2, ROWS), (1, 2), ()], ids=str)
def test_values_of_another_shape(shape):
    refuse(ValueError, r"^targets\.values", re.escape(str((ROWS, 2))), targets=sparse(values=np.zeros(shape)))


@pytest.mark.parametrize("bad", [-1e-9, np.nan, np.inf, -np.inf])
def test_values_out_of_range(bad):
    values = np.ones((ROWS, 2))
    values[4, 1] = bad
    patterns = r"^targets\.values", "finite and >= 0", r"\[4, 1\]", re.escape(str(bad))
    refuse(ValueError, *patterns, targets=sparse(values=values))


@pytest.mark.parametrize("kind", [bool, complex, object, "U1"], ids=str)
def test_values_are_numbers(kind):
    refuse(TypeError, r"^targets\.values", targets=sparse(values=np.ones((ROWS, 2), kind)))


@pytest.mark.parametrize(
    ("value", "kind"),
    [(CLASSES, int), (-1, np.int8), (-100, int), (255, np.uint8), (2**63, np.uint64), (-(2**63), int)],
)
def test_indices_out_of_range_are_named_and_never_wrap(value, kind):
    indices = np.zeros((ROWS, 2), kind)
    indices[3, 1] = value
    refuse(
        IndexError, r"targets\.indices", r"\[3, 1\]", rf"(?<![\d-]){value}\b", r"\b0\b.*\b4\b", targets=sparse(indices)
    )
    # Also where the value is 0, and in rows of weight 0.
    values = np.full((ROWS, 2), 0.5)
    values[3] = 0
    refuse(IndexError, r"targets\.indices", targets=sparse(indices, values), sample_weight=[1, 1, 1, 0, 1, 1])


def test_class_ids_out_of_range_are_found_under_every_option():
    bad = valid_arguments()["targets"].copy()
    bad[2] = CLASSES
    options = {
        "weight": np.ones(CLASSES), "sample_weight": np.zeros(ROWS), "label_smoothing": 1.0, "logit_scale": 2.0,
        "softcap": 3.0, "z_loss": 1.0, "class_mask": np.ones(CLASSES, bool),
    }  # fmt: skip
    for name, value in options.items():
        refuse(IndexError, r"targets\[2\]", r"\b5\b", targets=bad, **{name: value})


# Buffers


def overlapping(name):
    """Arguments of which `name` lies where the gradient goes."""
    memory = np.full(3 * ROWS * CLASSES, 0.5)
    out = memory[: ROWS * CLASSES].reshape(ROWS, CLASSES)
    given = {
        "weight": memory[7 : 7 + CLASSES],
        "sample_weight": memory[:ROWS],
        "class_mask": memory[:ROWS].view(bool)[:CLASSES],
        "grad_output": memory[ROWS * CLASSES - 1 :][:ROWS],
        "targets": memory[1 : 1 + ROWS * CLASSES].reshape(ROWS, CLASSES),
        "targets.indices": SparseTargets(memory[: 2 * ROWS].view(np.int64).reshape(ROWS, 2), np.ones((ROWS, 2))),
        "targets.values": SparseTargets(np.zeros((ROWS, 2), int), memory[: 2 * ROWS].reshape(ROWS, 2)),
    }[name]
    if name == "targets.indices":
        given.indices[...] = 0
    if name == "class_mask":
        given[...] = True
    return out, {name.split(".")[0]: given} | ({"reduction": "none"} if name == "grad_output" else {})


OVERLAPS = ["weight", "sample_weight", "class_mask", "grad_output", "targets", "targets.indices", "targets.values"]


@pytest.mark.parametrize("buffer", ["out", "hess_out"])
@pytest.mark.parametrize("name", OVERLAPS)
def test_buffers_that_overlap_an_argument(name, buffer):
    out, changed = overlapping(name)
    before = out.copy()
    arguments = {**valid_arguments(), **changed, buffer: out}
    functions = [fastce.cross_entropy_with_grad_hess]
    functions += [fastce.cross_entropy_with_grad] if buffer == "out" else []
    for function in functions:
        given = dict(arguments)
        with pytest.raises(ValueError, match=f"^{buffer} overlaps {re.escape(name)}"):
            function(given.pop("logits"), given.pop("targets"), **given)
        np.testing.assert_array_equal(out, before)


def test_class_ids_alone_may_lie_where_the_gradients_go():
    arguments = valid_arguments()
    expected = fastce.cross_entropy_with_grad_hess(**arguments, label_smoothing=0.1)
    for name in ("out", "hess_out"):
        buffer = np.empty((ROWS, CLASSES))
        ids = buffer.reshape(-1)[:ROWS].view(np.int64)
        ids[...] = arguments["targets"]
        got = fastce.cross_entropy_with_grad_hess(arguments["logits"], ids, label_smoothing=0.1, **{name: buffer})
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_two_buffers_may_not_overlap():
    memory = np.full(2 * ROWS * CLASSES, SENTINEL)
    out = memory[: ROWS * CLASSES].reshape(ROWS, CLASSES)
    shifted = memory[1 : 1 + ROWS * CLASSES].reshape(ROWS, CLASSES)
    for hess_out in (out, shifted, out[::-1]):
        with pytest.raises(ValueError, match="hess_out overlaps out"):
            fastce.cross_entropy_with_grad_hess(**valid_arguments(), out=out, hess_out=hess_out)
    logits = valid_arguments()["logits"]
    before = logits.copy()
    with pytest.raises(ValueError, match="hess_out overlaps out"):
        fastce.cross_entropy_with_grad_hess(logits, np.zeros(ROWS, int), out=logits, hess_out=logits)
    for name in ("out", "hess_out"):
        with pytest.raises(ValueError, match=f"{name} overlaps logits"):
            fastce.cross_entropy_with_grad_hess(logits, np.zeros(ROWS, int), **{name: logits[::-1]})
        with pytest.raises(ValueError, match=f"{name} overlaps"):
            other = logits.reshape(-1).view(np.float32)[: ROWS * CLASSES].reshape(ROWS, CLASSES)
            fastce.cross_entropy_with_grad_hess(logits, np.zeros(ROWS, int), **{name: other})
    np.testing.assert_array_equal(logits, before)
    assert (memory == SENTINEL).all()


@pytest.mark.parametrize("name", ["out", "hess_out"])
@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (np.full((ROWS, CLASSES), 7, int), TypeError),
        (np.full((ROWS, CLASSES), 7, complex), TypeError),
        (np.full((ROWS, CLASSES), 7, np.longdouble), TypeError),
        (np.full((ROWS, CLASSES), 7, object), TypeError),
        (np.full((ROWS, CLASSES), 7, ">f8"), TypeError),
        (np.full((ROWS, CLASSES), 7, ">f4"), TypeError),
        (np.ma.array(np.full((ROWS, CLASSES), 7.0)), TypeError),
        ([[7.0] * CLASSES] * ROWS, TypeError),
        (7.0, TypeError),
        (np.full((CLASSES, ROWS), 7.0), ValueError),
        (np.full((ROWS, CLASSES + 1), 7.0), ValueError),
        (np.full(ROWS * CLASSES, 7.0), ValueError),
        (np.broadcast_to(7.0, (ROWS, CLASSES)), ValueError),
        (np.lib.stride_tricks.as_strided(np.full(CLASSES, 7.0), (ROWS, CLASSES), (0, 8)), ValueError),
        (np.lib.stride_tricks.as_strided(np.full(60, 7.0), (ROWS, CLASSES), (8, 8)), ValueError),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)) + str(getattr(value, "shape", "")),
)
def test_buffers_that_cannot_be_right(name, buffer, error):
    arguments = valid_arguments()
    other = np.full((ROWS, CLASSES), SENTINEL)
    given = {"out": other, "hess_out": other, name: buffer}
    with pytest.raises(error, match=rf"\b{name}\b"):
        fastce.cross_entropy_with_grad_hess(**arguments, **given)
    assert (other == SENTINEL).all()
    assert (np.asarray(buffer) == 7).all()


def test_only_the_hessian_function_takes_buffers_of_another_float():
    for kind in (np.float16, np.float32):
        out = np.full((ROWS, CLASSES), 7, kind)
        with pytest.raises(TypeError, match=r"out must have the dtype of logits, float64"):
            fastce.cross_entropy_with_grad(**valid_arguments(), out=out)
        assert (out == 7).all()
        assert fastce.cross_entropy_with_grad_hess(**valid_arguments(), out=out, hess_out=out.copy())[1] is out


# Names


@pytest.mark.parametrize(
    "function", [fastce.cross_entropy, fastce.cross_entropy_with_grad, fastce.cross_entropy_with_grad_hess]
)
def test_options_go_by_name_and_unknown_ones_are_refused(function):
    arguments = valid_arguments()
    with pytest.raises(TypeError, match="positional"):
        function(arguments["logits"], arguments["targets"], -1)
    for name in ("weights", "smoothing", "temperature", "mask", "eps"):
        with pytest.raises(TypeError, match=name):
            function(**arguments, **{name: None})
    if function is not fastce.cross_entropy_with_grad_hess:
        with pytest.raises(TypeError, match="hess_out"):
            function(**arguments, hess_out=None)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_denominator_goes_only_with_the_mean(reduction):
    refuse(ValueError, "^denominator", reduction, denominator=3.0, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("grad_output", ["1", 1j, object(), np.ones(ROWS, complex)], ids=type)
def test_a_grad_output_that_is_no_number(grad_output):
    refuse(TypeError, "^grad_output", grad_output=grad_output, reduction="none", only_gradients=True, z_loss=0.1)


def test_an_array_grad_output_goes_only_with_no_reduction():
    for reduction in ("sum", "mean"):
        refuse(
            ValueError, "^grad_output", "none", grad_output=np.ones(ROWS), reduction=reduction, only_gradients=True
        )
    refuse(ValueError, "^grad_output", grad_output=np.ones(ROWS + 1), reduction="none", only_gradients=True)
