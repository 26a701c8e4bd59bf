"""Input that cannot be right is refused before anything is written, in words that name the argument and the remedy."""

import contextlib
import os
import re
import sys

import numpy as np
import pytest

import fastce

ROWS, CLASSES = 6, 5


class Call:
    """A valid call, to be spoiled in one argument; `unchanged` tells whether its arrays still hold what they did."""

    def __init__(self, dtype=np.float32):
        rng = np.random.default_rng(5)
        self.logits = rng.normal(0, 3, (ROWS, CLASSES)).astype(dtype)
        self.targets = rng.integers(0, CLASSES, ROWS)
        self.out = np.full((ROWS, CLASSES), 12345.678, dtype)
        self.options = {}

    def arrays(self):
        arguments = [self.logits, self.targets, self.out, *self.options.values()]
        return [array for array in arguments if isinstance(array, np.ndarray) and array.dtype != object]

    def loss_and_gradient(self):
        options = {"out": self.out, **self.options}
        return fastce.cross_entropy_with_grad(self.logits, self.targets, **options)

    def loss(self):
        options = {name: value for name, value in self.options.items() if name not in ("out", "grad_output")}
        return fastce.cross_entropy(self.logits, self.targets, **options)


def refuse(call, exception, *patterns, loss_too=True):
    """Both functions raise exactly this kind of error, its message has all the patterns, and no array has changed."""
    before = [array.tobytes() for array in call.arrays()]
    for function in [call.loss_and_gradient, call.loss] if loss_too else [call.loss_and_gradient]:
        with pytest.raises(exception) as caught:
            function()
        message = str(caught.value)
        for pattern in patterns:
            assert re.search(pattern, message), f"no {pattern!r} in: {message}"
    assert [array.tobytes() for array in call.arrays()] == before
    return message


def test_the_call_itself_is_valid(dtype):
    call = Call(dtype)
    assert np.isfinite(call.loss())
    assert call.loss_and_gradient()[1] is call.out


# Logits


@pytest.mark.parametrize(
    ("logits", "got"),
    [
        (np.zeros((ROWS, CLASSES), int), "int64"),
        (np.zeros((ROWS, CLASSES), np.int32), "int32"),
        (np.zeros((ROWS, CLASSES), np.uint8), "uint8"),
        (np.zeros((ROWS, CLASSES), bool), "bool"),
        (np.zeros((ROWS, CLASSES), complex), "complex128"),
        (np.zeros((ROWS, CLASSES), np.longdouble), np.dtype(np.longdouble).name),
        (np.zeros((ROWS, CLASSES), object), "object"),
        (np.full((ROWS, CLASSES), "1.5"), "str|<U3"),
        (np.full((ROWS, CLASSES), b"1.5"), r"bytes|S3"),
        (np.zeros((ROWS, CLASSES), "M8[s]"), "datetime64"),
        (np.zeros((ROWS, CLASSES), "m8[s]"), "timedelta64"),
        (np.zeros((ROWS, CLASSES), [("x", np.float32)]), "x|void"),
        ([[0] * CLASSES] * ROWS, "int64"),
        (None, "object|None"),
        ("logits", "str|<U6"),
    ],
    ids=lambda value: value if isinstance(value, str) and "|" not in value else None,
)
def test_logits_of_a_kind_that_cannot_be_right(logits, got):
    call = Call()
    call.logits = logits
    refuse(call, TypeError, "logits", "float32", "float64", got)


def test_masked_logits_are_refused_unless_nothing_is_masked():
    call = Call()
    plain = call.loss()
    call.logits = np.ma.array(call.logits, mask=np.zeros((ROWS, CLASSES), bool))
    assert call.loss() == plain
    call.logits[2, 3] = np.ma.masked
    refuse(call, TypeError, "logits", "mask")


def test_masked_targets_are_refused_unless_nothing_is_masked():
    call = Call()
    plain = call.loss()
    call.targets = np.ma.array(call.targets)
    assert call.loss() == plain
    call.targets[2] = np.ma.masked
    refuse(call, TypeError, "targets", "mask")


def test_logits_without_an_axis():
    call = Call()
    call.logits = np.float32(1)
    refuse(call, ValueError, "logits", r"0-d|\(\)|at least")


@pytest.mark.parametrize("shape", [(ROWS, 0), (0, 0), (0,)])
def test_logits_without_a_class(shape):
    call = Call()
    call.logits = np.zeros(shape, np.float32)
    call.targets = np.zeros(shape[:-1], int)
    call.out = np.zeros(shape, np.float32)
    refuse(call, ValueError, "logits", "class", re.escape(str(shape)) + "|0 classes|no class")


# Axis


@pytest.mark.parametrize("axis", [2, -3, 100, 2**70])
def test_an_axis_that_logits_do_not_have(axis):
    call = Call()
    call.options = {"axis": axis}
    refuse(call, ValueError, "axis", re.escape(str(axis)), "2")


@pytest.mark.parametrize("axis", [1.0, "1", None, (0,), [1]])
def test_an_axis_that_is_no_integer(axis):
    call = Call()
    call.options = {"axis": axis}
    refuse(call, TypeError, "axis", "int")


def test_any_integer_is_an_axis():
    call = Call()
    for axis in (1, -1, np.int8(1), np.uint64(1)):
        call.options = {"axis": axis}
        assert np.isfinite(call.loss())


# Targets


@pytest.mark.parametrize(
    ("targets", "got"),
    [
        (np.zeros(ROWS, np.float32), "float32"),
        (np.zeros(ROWS), "float64"),
        ([0.0] * ROWS, "float64"),
        (np.zeros((ROWS, CLASSES), np.longdouble), np.dtype(np.longdouble).name),
        (np.full(ROWS, np.nan), "float64"),
        (np.zeros(ROWS, complex), "complex128"),
        (np.zeros(ROWS, bool), "bool"),
        (np.zeros(ROWS, object), "object"),
        (np.full(ROWS, "1"), "str|<U1"),
        (np.zeros(ROWS, "m8[s]"), "timedelta64"),
        (np.zeros(ROWS, "M8[s]"), "datetime64"),
        ([2**70] * ROWS, "object"),
        (None, "object|None"),
        ("targets", "str|<U7"),
    ],
    ids=lambda value: value if isinstance(value, str) and "|" not in value else None,
)
def test_targets_of_a_kind_that_cannot_be_right(targets, got):
    call = Call()
    call.targets = targets
    refuse(call, TypeError, "targets", "class ids must be integers", got)


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        (np.eye(ROWS, CLASSES, dtype=int), "one-hot"),
        (np.zeros((ROWS, 1), int), r"\[\.\.\., 0\]|\[:, 0\]|squeeze|ravel|reshape"),
        (np.zeros((CLASSES, ROWS), int), "transpose|axis"),
        (np.zeros(CLASSES, int), "axis"),
        (np.zeros(ROWS + 1, int), ""),
        (np.zeros(ROWS - 1, int), ""),
        (np.zeros((), int), ""),
        (np.zeros(1, int), ""),
        (np.zeros((1, ROWS), int), ""),
        (np.zeros(0, int), ""),
        ([], ""),
        (3, ""),
    ],
    ids=["one-hot", "column", "transposed", "other axis", "long", "short", "0-d", "one", "row", "none", "list", "int"],
)
def test_targets_of_another_shape(targets, hint):
    call = Call()
    call.targets = targets
    shape = re.escape(str(np.shape(targets)))
    refuse(call, ValueError, "targets", shape, rf"\({ROWS},\)|\({ROWS}, {CLASSES}\)", hint)


@pytest.mark.parametrize("function", [fastce.cross_entropy, fastce.kl_divergence])
@pytest.mark.parametrize(
    ("shape", "hint"),
    [((ROWS, CLASSES - 1), ""), ((CLASSES, ROWS), "axes look transposed"), ((ROWS + 1,), ""), ((ROWS, 1), "last axis")],
)
def test_distributions_of_another_shape(function, shape, hint):
    with pytest.raises(ValueError, match=f"targets .*distributions.*{re.escape(str(shape))}.*{hint}") as caught:
        function(np.zeros((ROWS, CLASSES)), np.ones(shape))
    assert f"({ROWS}, {CLASSES})" in str(caught.value)


def test_indices_of_sparse_targets_out_of_range_are_entries():
    targets = fastce.SparseTargets([[0, -1], [1, -1]], np.ones((2, 2)))
    with pytest.raises(IndexError, match=r"2 entries have.*; fill up with any class and the value 0$"):
        fastce.cross_entropy(np.zeros((2, 3)), targets)
    targets = fastce.SparseTargets([[1, 2], [3, 1]], np.ones((2, 2)))
    with pytest.raises(IndexError, match=r"pass targets\.indices - 1$"):
        fastce.cross_entropy(np.zeros((2, 3)), targets)


def test_ragged_lists_are_refused():
    call = Call()
    call.targets = [[0], [1, 2], 3, 4, 0, 0]
    refuse(call, ValueError)
    call = Call()
    call.logits = [[0.0, 1.0], [2.0]]
    refuse(call, ValueError)


# Class ids out of range


@pytest.mark.parametrize("num_threads", [None, 1, 2, 3, 7])
def test_the_lowest_bad_row_is_named(num_threads):
    call = Call()
    call.targets[[3, 5]] = [17, -9]
    call.options = {"num_threads": num_threads}
    refuse(call, IndexError, "targets", r"\b3\b", r"\b17\b", r"\b0\b.*\b4\b", r"\b2\b")


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("first", [0, 1, 2049, 49_999, 99_998])
def test_the_lowest_bad_row_of_a_large_batch_is_named(first, num_threads):
    call = Call()
    call.logits = np.zeros((100_000, 5), np.float32)
    call.out = np.full((100_000, 5), 7, np.float32)
    call.targets = np.zeros(100_000, int)
    call.targets[first] = 1234
    call.targets[first + 1 :: 3] = 5678
    count = np.count_nonzero(call.targets)
    call.options = {"num_threads": num_threads}
    message = refuse(call, IndexError, "targets", rf"\b{first}\b", r"\b1234\b", r"\b0\b.*\b4\b")
    assert re.search(rf"\b{count}\b", message.replace(",", ""))


def test_the_position_has_all_axes():
    call = Call()
    call.logits = np.zeros((4, 5, 7), np.float32)
    call.out = np.zeros((4, 5, 7), np.float32)
    call.targets = np.zeros((4, 7), np.int16)
    call.targets[2, 3] = 9
    call.targets[3, 1] = -3
    call.options = {"axis": 1}
    refuse(call, IndexError, "targets", r"[\[(]2, 3[\])]", r"\b9\b", r"\b0\b.*\b4\b", r"\b2\b")


def test_the_position_is_that_of_the_array_as_given():
    # A transposed array: the lowest row is counted in the order of its axes, not of its memory.
    call = Call()
    call.logits = np.zeros((3, 4, 5), np.float32)
    call.out = np.zeros((3, 4, 5), np.float32)
    call.targets = np.zeros((4, 3), int).T
    call.targets[0, 3] = 8
    call.targets[1, 0] = 9
    refuse(call, IndexError, r"[\[(]0, 3[\])]", r"\b8\b")


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (CLASSES, np.int64),
        (-1, np.int8),
        (-CLASSES, np.int64),
        (255, np.uint8),
        (2**31, np.uint32),
        (2**32, np.int64),
        (2**63 - 1, np.int64),
        (-(2**63), np.int64),
        (2**63, np.uint64),
        (2**63 + 1, np.uint64),
        (2**64 - 1, np.uint64),
        (2**64 - 100, np.uint64),
    ],
)
def test_ids_out_of_range_are_named_as_they_are_and_never_wrap(value, dtype):
    call = Call()
    call.targets = call.targets.astype(dtype)
    call.targets[4] = value
    refuse(call, IndexError, "targets", r"\b4\b", rf"(?<![\d-]){value}\b", r"\b0\b")


def test_an_id_in_a_single_row():
    call = Call()
    call.logits, call.out, call.targets = call.logits[0], call.out[0], 5
    refuse(call, IndexError, "targets", r"\b5\b", r"\b0\b.*\b4\b")


def test_bad_ids_among_ignored_ones():
    call = Call()
    call.targets[:] = [-100, 99, -100, 0, 1, 2]
    refuse(call, IndexError, r"\b1\b", r"\b99\b")
    call.options = {"ignore_index": 99}
    refuse(call, IndexError, r"\b0\b", r"-100\b")
    call.options = {"ignore_index": [99, -100]}
    assert np.isfinite(call.loss())
    call.options = {"ignore_index": None}
    refuse(call, IndexError, r"\b0\b", r"-100\b")


def test_hint_for_labels_that_start_at_one():
    call = Call()
    call.targets = np.arange(ROWS) % CLASSES + 1
    refuse(call, IndexError, "labels seem to start at 1")
    call.targets[2] = 0
    message = refuse(call, IndexError)
    assert "start at 1" not in message


@pytest.mark.parametrize("value", [-1, 255])
def test_hint_for_padding(value):
    call = Call()
    call.targets[2] = value
    refuse(call, IndexError, rf"ignore_index\s*=\s*{value}")


# Options


@pytest.mark.parametrize("reduction", ["avg", "", "Mean", "mean ", "batchmean"])
def test_an_unknown_reduction(reduction):
    call = Call()
    call.options = {"reduction": reduction}
    refuse(call, ValueError, "reduction", "none", "sum", "mean", re.escape(repr(reduction)))


@pytest.mark.parametrize("reduction", [None, 1, b"mean", ["mean"], True])
def test_a_reduction_that_is_no_string(reduction):
    call = Call()
    call.options = {"reduction": reduction}
    refuse(call, (TypeError, ValueError), "reduction", "none", "sum", "mean")


@pytest.mark.parametrize("denominator", [0, 0.0, -1, -0.5, np.nan, np.inf, -np.inf])
def test_a_denominator_out_of_range(denominator):
    call = Call()
    call.options = {"denominator": denominator}
    refuse(call, ValueError, "denominator", "finite", "> 0|positive", re.escape(str(denominator)))


@pytest.mark.parametrize("denominator", ["3", 1j, [2.0, 3.0], object()])
def test_a_denominator_that_is_no_number(denominator):
    call = Call()
    call.options = {"denominator": denominator}
    refuse(call, TypeError, "denominator")


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_denominator_goes_only_with_the_mean(reduction):
    call = Call()
    call.options = {"denominator": 3.0, "reduction": reduction}
    refuse(call, ValueError, "denominator", "mean", reduction)


@pytest.mark.parametrize("ignore_index", [1.0, "1", [1.0], [0, None], np.array([1.5]), 1j, object(), [[1]], b"a"])
def test_an_ignore_index_that_is_no_integer(ignore_index):
    call = Call()
    call.options = {"ignore_index": ignore_index}
    refuse(call, TypeError, "ignore_index", "int")


@pytest.mark.parametrize("ignore_index", [2**63, -(2**63) - 1, 2**70, [0, 2**64], np.uint64(2**63)])
def test_an_ignore_index_beyond_int64(ignore_index):
    call = Call()
    call.options = {"ignore_index": ignore_index}
    refuse(call, ValueError, "ignore_index", "int64")


@pytest.mark.parametrize("num_threads", [True, False, np.True_, 1.0, 2.5, "2", [2], 1j])
def test_num_threads_that_is_no_integer(num_threads):
    call = Call()
    call.options = {"num_threads": num_threads}
    refuse(call, TypeError, "num_threads", "int")


@pytest.mark.parametrize("num_threads", [0, -1, -(2**70), np.int64(0)])
def test_num_threads_below_one(num_threads):
    call = Call()
    call.options = {"num_threads": num_threads}
    refuse(call, ValueError, "num_threads", "1", re.escape(str(num_threads)))


@pytest.mark.parametrize("option", ["dim", "n_jobs", "temperature"])
def test_an_unknown_option(option):
    call = Call()
    call.options = {option: None}
    refuse(call, TypeError, option)


def test_options_go_by_name():
    call = Call()
    with pytest.raises(TypeError, match="positional"):
        fastce.cross_entropy(call.logits, call.targets, -1)
    with pytest.raises(TypeError, match="positional"):
        fastce.cross_entropy_with_grad(call.logits, call.targets, -1)
    for name in ("out", "grad_output"):
        with pytest.raises(TypeError, match=name):
            fastce.cross_entropy(call.logits, call.targets, **{name: None})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_array_grad_output_goes_only_with_no_reduction(reduction):
    call = Call()
    call.options = {"grad_output": np.ones(ROWS), "reduction": reduction}
    refuse(call, ValueError, "grad_output", "none", loss_too=False)


@pytest.mark.parametrize("shape", [(ROWS + 1,), (1,), (ROWS, 1), (ROWS, CLASSES), (0,)])
def test_a_grad_output_of_another_shape(shape):
    call = Call()
    call.options = {"grad_output": np.ones(shape), "reduction": "none"}
    refuse(call, ValueError, "grad_output", re.escape(str(shape)), re.escape(str((ROWS,))), loss_too=False)


@pytest.mark.parametrize("grad_output", ["1", 1j, np.ones(ROWS, complex), np.full(ROWS, "a"), object()])
def test_a_grad_output_that_is_no_number(grad_output):
    call = Call()
    call.options = {"grad_output": grad_output, "reduction": "none"}
    refuse(call, TypeError, "grad_output", loss_too=False)


# The gradient buffer


@pytest.mark.parametrize("shape", [(ROWS, CLASSES + 1), (ROWS - 1, CLASSES), (CLASSES, ROWS), (ROWS * CLASSES,), ()])
def test_out_of_another_shape(shape):
    call = Call()
    call.out = np.ones(shape, np.float32)
    refuse(call, ValueError, "out", re.escape(str(shape)), re.escape(str((ROWS, CLASSES))), loss_too=False)


@pytest.mark.parametrize(
    ("logits_dtype", "out_dtype"),
    [(np.float32, np.float64), (np.float64, np.float32), (np.float32, np.int32), (np.float32, np.float16)],
)
def test_out_of_another_dtype(logits_dtype, out_dtype):
    call = Call(logits_dtype)
    call.out = np.ones((ROWS, CLASSES), out_dtype)
    patterns = "out", np.dtype(logits_dtype).name, np.dtype(out_dtype).name
    refuse(call, TypeError, *patterns, loss_too=False)


def test_out_of_another_byte_order(dtype):
    call = Call(dtype)
    call.out = call.out.astype(dtype.newbyteorder())
    refuse(call, TypeError, "out", "byte order|native", loss_too=False)
    call.logits = call.out
    refuse(call, TypeError, "out", "byte order|native", loss_too=False)


@pytest.mark.parametrize("out", [[[0.0] * CLASSES] * ROWS, 3.0, "out", bytearray(ROWS * CLASSES * 4)], ids=repr)
def test_out_that_is_no_array(out):
    call = Call()
    call.out = out
    refuse(call, TypeError, "out", "array", type(out).__name__, loss_too=False)


def test_out_that_is_read_only():
    call = Call()
    call.out.flags.writeable = False
    refuse(call, ValueError, "out", "read-only|writ", loss_too=False)
    call.out = call.logits
    call.logits.flags.writeable = False
    refuse(call, ValueError, "out", "read-only|writ", loss_too=False)


def overlapping(kind, dtype):
    """A valid call whose `out` shares memory with something other than class ids."""
    call = Call(dtype)
    flat = np.linspace(-3, 3, 4 * ROWS * CLASSES).astype(dtype)
    size = ROWS * CLASSES
    call.logits = flat[:size].reshape(ROWS, CLASSES)
    if kind == "shifted by one element":
        call.out = flat[1 : size + 1].reshape(ROWS, CLASSES)
    elif kind == "shifted by one row":
        call.out = flat[CLASSES : size + CLASSES].reshape(ROWS, CLASSES)
    elif kind == "last element":
        call.out = flat[size - 1 : 2 * size - 1].reshape(ROWS, CLASSES)
    elif kind == "shifted by one byte":
        call.out = flat.view(np.uint8)[1 : 1 + size * dtype.itemsize].view(dtype).reshape(ROWS, CLASSES)
    elif kind == "reversed":
        call.out = call.logits[::-1]
    elif kind == "reversed classes":
        call.out = call.logits[:, ::-1]
    elif kind == "other order":
        call.logits = flat[:25].reshape(5, 5)
        call.out = call.logits.T
        call.targets = call.targets[:5]
    elif kind == "logits of stride 0":
        call.logits = np.broadcast_to(flat[:CLASSES], (ROWS, CLASSES))
        call.out = flat[:size].reshape(ROWS, CLASSES)
    elif kind == "itself, in rows":
        call.out = np.lib.stride_tricks.as_strided(flat[2 * size :], (ROWS, CLASSES), (0, dtype.itemsize))
    elif kind == "itself, in classes":
        call.out = np.lib.stride_tricks.as_strided(flat[2 * size :], (ROWS, CLASSES), (dtype.itemsize, 0))
    elif kind == "itself, sliding":
        call.out = np.lib.stride_tricks.as_strided(flat[2 * size :], (ROWS, CLASSES), (dtype.itemsize,) * 2)
    elif kind == "grad_output":
        call.out = flat[size : 2 * size].reshape(ROWS, CLASSES)
        call.options = {"grad_output": call.out[:, 1], "reduction": "none"}
    return call


@pytest.mark.parametrize(
    "kind",
    [
        "shifted by one element",
        "shifted by one row",
        "last element",
        "shifted by one byte",
        "reversed",
        "reversed classes",
        "other order",
        "logits of stride 0",
        "itself, in rows",
        "itself, in classes",
        "itself, sliding",
        "grad_output",
    ],
)
def test_out_that_overlaps(kind, dtype):
    call = overlapping(kind, dtype)
    other = "itself" if kind.startswith("itself") else "grad_output" if kind == "grad_output" else "logits"
    refuse(call, ValueError, "out", other, "overlap|share|memory", loss_too=False)


def test_in_place_on_logits_that_overlap_themselves_is_refused(dtype):
    call = Call(dtype)
    flat = np.linspace(-3, 3, ROWS + CLASSES).astype(dtype)
    call.logits = np.lib.stride_tricks.as_strided(flat, (ROWS, CLASSES), (dtype.itemsize,) * 2)
    call.out = call.logits
    refuse(call, ValueError, "out", "overlap|share|memory", loss_too=False)
    call.out = None
    assert np.isfinite(call.loss())


# What an error leaves behind


def test_a_bad_id_leaves_in_place_logits_alone(dtype):
    for num_threads in (1, 2, 3, 7):
        call = Call(dtype)
        call.logits = np.random.default_rng(1).normal(0, 3, (20_000, 10)).astype(dtype)
        call.targets = np.zeros(20_000, int)
        call.targets[-1] = 10
        call.out = call.logits
        call.options = {"num_threads": num_threads}
        refuse(call, IndexError, r"\b19999\b", loss_too=False)


def test_errors_hold_on_to_nothing():
    call = Call()
    call.options = {"ignore_index": None}
    call.targets[3] = 99
    objects = [call.logits, call.targets, call.out]
    before = [sys.getrefcount(item) for item in objects]
    for _ in range(20):
        for function in (call.loss, call.loss_and_gradient):
            with contextlib.suppress(IndexError):
                function()
    assert [sys.getrefcount(item) for item in objects] == before
    call.targets[3] = 0
    for _ in range(20):
        call.loss()
        call.loss_and_gradient()
    assert [sys.getrefcount(item) for item in objects] == before


OUT_OF_MEMORY = """
import numpy as np, fastce
row = np.broadcast_to(np.float32(1), (1, 2**50))
try:
    fastce.cross_entropy_with_grad(row, [0])
except MemoryError as problem:
    print(type(problem).__name__, problem)
else:
    raise SystemExit("a gradient of four petabytes")
print(fastce.cross_entropy(np.zeros((2, 2)), [0, 1]))
"""


def test_an_allocation_that_fails_is_a_memory_error(run_python):
    # No address space holds the gradient; nothing is computed before it is found out.
    sanitizer = os.environ.get("ASAN_OPTIONS", "") + ":allocator_may_return_null=1"
    done = run_python("-c", OUT_OF_MEMORY, ASAN_OPTIONS=sanitizer)
    assert done.stdout.splitlines()[-1].startswith("0.693")


def test_a_bool_is_no_axis():
    with pytest.raises(TypeError, match="axis must be an integer"):
        fastce.cross_entropy(np.zeros((2, 3)), [0, 1], axis=True)


@pytest.mark.parametrize("name", ["logits", "targets", "grad_output"])
def test_ragged_lists_are_named(name):
    arguments = {"logits": np.zeros((2, 3)), "targets": [0, 1], "grad_output": 1.0, name: [[0.0, 1.0], [2.0]]}
    with pytest.raises(ValueError, match=name):
        fastce.cross_entropy_with_grad(**arguments, reduction="none")
