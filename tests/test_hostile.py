"""Objects made to do harm, in every argument of every function: an error that names the argument, or no harm."""

import array
import decimal
import fractions
import math
import re
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
from calls import calls
from test_faults import Wrapped, assert_same_results, each_function, each_function_with_buffers

import fastce
from fastce import SparseTargets

SHAPE = (6, 5)
DEFAULTS = {"axis": -1, "reduction": "mean", "num_threads": 1, "denominator": None, "ignore_index": -100}
NUMBERS = ["label_smoothing", "logit_scale", "softcap", "z_loss", "gamma", "epsilon", "denominator"]


class WithoutRepr:
    def __repr__(self):
        raise RuntimeError("no words for it")


class NotAnArray:
    def __array__(self, dtype=None, copy=None):
        return 5


def itself():
    loop = []
    loop.append(loop)
    return loop


def hostile_objects():
    """Return name -> object."""
    fifth = np.full(SHAPE, 0.2)
    return {
        "0-d float": np.array(1.5),
        "0-d integer": np.array(1),
        "0-d bool": np.array(True),
        "0-d object": np.array(None),
        "nothing": None,
        "objects": np.full(SHAPE, None),
        "floats as objects": fifth.astype(object),
        "records": np.zeros(SHAPE, [("a", "f4"), ("b", "i8")]),
        "records of one field": np.zeros(SHAPE, [("a", "f4")]),
        "text": "abc",
        "bytes": b"abc",
        "arrays of text": np.full(SHAPE, "1"),
        "new text": np.full(SHAPE, "1", np.dtypes.StringDType()),
        "dates": np.zeros(SHAPE, "M8[s]"),
        "duration": np.timedelta64(5),
        "raw memory": np.zeros(SHAPE, "V4"),
        "complex": fifth.astype(complex),
        "longdouble": fifth.astype(np.longdouble),
        "huge longdouble": np.longdouble("1e4000"),
        "float8": np.zeros(SHAPE, ml_dtypes.float8_e4m3fn),
        "int4": np.zeros(SHAPE, ml_dtypes.int4),
        "bfloat16": fifth.astype(ml_dtypes.bfloat16),
        "no array": NotAnArray(),
        "a set": {1, 2},
        "a generator": (i for i in range(6)),
        "a dictionary": {},
        "a type": int,
        "a module": np,
        "an ellipsis": ...,
        "a function": len,
        "an error": ValueError("logits"),
        "a list of itself": itself(),
        "a ragged list": [[1], [1, 2]],
        "an integer beyond int64": 2**70,
        "integers beyond int64": [2**70] * 6,
        "an integer beyond float64": 10**400,
        "an integer too long to write": -(10**5000),
        "a fraction": fractions.Fraction(1, 3),
        "a decimal": decimal.Decimal("0.5"),
        "nan": math.nan,
        "infinity": math.inf,
        "minus zero": -0.0,
        "a bool": True,
        "a bool of NumPy": np.True_,
        "2^64 - 1": np.uint64(2**64 - 1),
        "no numbers": np.zeros(0),
        "no rows": np.zeros((0, 5)),
        "no classes": np.zeros((6, 0)),
        "an axis without length": np.zeros((6, 5, 0)),
        "64 axes": np.zeros((1,) * 64),
        "a sparse matrix": scipy.sparse.csr_matrix(np.eye(*SHAPE)),
        "a bytearray": bytearray(120),
        "an array of the standard library": array.array("d", [0.5] * 6),
        "a memoryview": memoryview(np.full(SHAPE, 0.2, np.float32)),
        "masked": np.ma.masked,
        "a masked array": np.ma.array(fifth, mask=np.eye(*SHAPE)),
        "a masked number": np.ma.array(0.5, mask=True),
        "without repr": WithoutRepr(),
        "a long list": list(range(10_000)),
        "a long text": "x" * 100_000,
        "sparse targets": SparseTargets([[0]] * 6, [[1.0]] * 6),
        "sparse targets of nothing": SparseTargets(None, None),
        "sparse targets of themselves": SparseTargets(SparseTargets(0, 0), SparseTargets(0, 0)),
    }


def options_of(call):
    """Return the call's arguments and options, with valid values for those that it does not set."""
    words = call.function.__kwdefaults__ or {}
    return {**{name: value for name, value in DEFAULTS.items() if name in words}, **call.arguments}


@each_function
def test_no_object_in_any_argument_does_harm(name):
    call = calls(np.float32)[name]
    buffers = call.new_buffers()
    words = call.function.__kwdefaults__ or {}
    valid = options_of(call) | buffers
    for argument in {*valid, *words}:
        for kind, given in hostile_objects().items():
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    call.function(**{**valid, argument: given})
                except (TypeError, ValueError, IndexError) as error:
                    message = str(error)
                else:
                    for buffer in buffers.values():
                        buffer[...] = 12345
                    continue
            # Scores of another shape make the other arguments misfit.
            expected = r"\w+" if argument in ("logits", "probs") else argument.replace("indices", "targets")
            assert re.search(rf"\b{expected}\b", message), f"{argument} = {kind}: {message}"
            assert len(message) < 1500, f"{argument} = {kind}"
            assert all((buffer == 12345).all() for buffer in buffers.values()), f"{argument} = {kind}"


@each_function
def test_errors_of_the_caller_s_own_objects_pass_through(name, dtype):
    class Unreadable:
        def __array__(self, dtype=None, copy=None):
            raise LookupError("the caller's own")

    call = calls(dtype)[name]
    for argument, _ in call.arrays():
        with pytest.raises(LookupError, match=r"^the caller's own$"):
            call(**{argument: Unreadable()})


@each_function
def test_what_an_object_turns_into_is_checked_like_an_array(name, dtype):
    call = calls(dtype)[name]
    expected = call()
    for argument, given in call.arrays():
        assert_same_results(call(**{argument: Wrapped(given)}), expected, argument)
        for wrong in (given.astype(complex), given.astype("M8[s]"), np.zeros((3, 0), given.dtype)):
            with pytest.raises((TypeError, ValueError)):
                call(**{argument: Wrapped(wrong)})


class Trap(np.ndarray):
    """An array whose every method and attribute, and whatever NumPy calls of it, is an error."""

    def refuse(self, *_, **__):
        raise AssertionError("a method of a subclass was called")

    __getitem__ = __setitem__ = __len__ = __iter__ = __array_ufunc__ = __array_function__ = __array__ = refuse
    __eq__ = __lt__ = __ge__ = __bool__ = __float__ = __index__ = refuse
    astype = view = reshape = copy = flatten = ravel = min = max = any = all = sum = __array_wrap__ = refuse
    __hash__ = None


@each_function
def test_methods_of_subclasses_are_never_called(name, dtype):
    call = calls(dtype)[name]
    expected = call()
    for argument, given in call.arrays():
        trap = np.ndarray.view(given.copy(), Trap)
        results = call.function(**{**call.arguments, argument: trap})
        for result in results if isinstance(results, tuple) else (results,):
            assert type(result) in (np.ndarray, float)
        assert_same_results([np.array(result) for result in (results if isinstance(results, tuple) else (results,))],
                            expected, argument)  # fmt: skip


@each_function_with_buffers
def test_methods_of_subclasses_are_never_called_on_buffers(name, dtype):
    call = calls(dtype)[name]
    expected = call()
    for layout in (np.copy, np.asfortranarray):
        places = {buffer: layout(place) for buffer, place in call.new_buffers().items()}
        traps = {buffer: np.ndarray.view(place, Trap) for buffer, place in places.items()}
        results = call.function(**{**call.arguments, **traps})
        returned = results[-len(traps) :] if isinstance(results, tuple) else (results,)
        for given, got in zip(traps.values(), returned, strict=True):
            assert got is given
        for place, wanted in zip(places.values(), expected[-len(traps) :], strict=True):
            np.testing.assert_array_equal(place, wanted)


def test_anything_with_a_buffer_is_an_array(dtype):
    expected = fastce.cross_entropy([1.0, 2.0, 0.5], 1)
    numbers = array.array("f" if dtype == np.float32 else "d", [1.0, 2.0, 0.5])
    for given in (numbers, memoryview(numbers), memoryview(np.frombuffer(numbers, dtype))):
        assert fastce.cross_entropy(given, 1) == pytest.approx(expected, rel=5e-7)
        assert fastce.cross_entropy(given, array.array("i", [1])[0]) == pytest.approx(expected, rel=5e-7)
    with pytest.raises(TypeError, match="logits"):
        fastce.cross_entropy(bytes(numbers), 1)
    with pytest.raises(TypeError, match=r"logits must be a float16.*uint8"):
        fastce.cross_entropy(bytearray(numbers), 1)


@each_function
def test_a_sparse_matrix_is_no_array(name, dtype):
    call = calls(dtype)[name]
    for argument, _ in call.arrays():
        with pytest.raises((TypeError, ValueError), match=rf"\b{argument.replace('indices', 'targets')}\b"):
            call(**{argument: scipy.sparse.csr_matrix(np.eye(6, 5))})


def test_weights_of_any_float_are_taken_exactly(dtype):
    # Of logits in float32 too: weights are float64 inside.
    call = calls(np.float32)["loss"]
    for kind in (np.float16, np.float32, np.float64, int):
        weight = np.array([1, 0.5, 2, 0.25, 4]).astype(kind)
        of_rows = np.array([1, 2, 0.125, -3, 0, 8]).astype(kind)
        given = call(weight=weight, sample_weight=of_rows)
        assert given == call(weight=weight.astype(float), sample_weight=of_rows.astype(float))


def every_number(function):
    """Return the options of a function that are numbers; a Hessian takes no softcap at all."""
    without = "softcap" if function is fastce.cross_entropy_with_grad_hess else ""
    return [name for name in NUMBERS if name in (function.__kwdefaults__ or {}) and name != without]


@each_function
def test_a_masked_number_is_no_number(name, dtype):
    # NumPy turns it into what lies under the mask.
    call = calls(dtype)[name]
    for option in every_number(call.function):
        for masked in (np.ma.masked, np.ma.array(0.5, mask=True)):
            with pytest.raises(TypeError, match=f"^{option} must not be a masked array"):
                call(**{"reduction": "mean", "grad_output": None, option: masked} if "grad_output" in call.arguments
                     else {option: masked})  # fmt: skip


@each_function
def test_bool_and_nan_are_no_values_of_any_number(name, dtype):
    call = calls(dtype)[name]
    plain = {"reduction": "mean", "grad_output": None} if "grad_output" in call.arguments else {}
    for option in [*every_number(call.function), "axis", "num_threads", "ignore_index"]:
        if option not in (call.function.__kwdefaults__ or {}):
            continue
        for given in (True, np.False_, np.array(True)):
            with pytest.raises(TypeError, match=f"^{option} must be"):
                call(**plain, **{option: given})
        for nan in (math.nan, np.float32(math.nan), np.array(math.nan)):
            with pytest.raises((TypeError, ValueError), match=f"^{option} must be"):
                call(**plain, **{option: nan})


def test_integers_are_numbers_as_far_as_float64_goes():
    call = calls(np.float64)["loss"]
    for option in ("logit_scale", "softcap", "z_loss", "denominator"):
        assert call(**{option: 2**70}) == call(**{option: 2.0**70})
        with pytest.raises(ValueError, match=f"^{option} must be finite"):
            call(**{option: 10**400})
        with pytest.raises(ValueError, match=f"^{option} must be finite.*an object of type int"):
            call(**{option: 10**5000})
    with pytest.raises(ValueError, match=r"^label_smoothing must be in \[0, 1\], got -1000"):
        call(label_smoothing=-(10**400))
    for option in ("axis", "ignore_index"):
        with pytest.raises(ValueError, match=f"^{option} must.*an object of type int"):
            call(**{option: 10**5000})
    with pytest.raises(ValueError, match=r"^num_threads must be >= 1 or None, got an object of type int"):
        call(num_threads=-(10**5000))
    assert call(num_threads=10**5000) == call()


def test_minus_zero_is_zero():
    for name, option in (("loss", "label_smoothing"), ("loss", "z_loss"), ("focal", "gamma"), ("poly", "epsilon")):
        call = calls(np.float64)[name]
        assert_same_results(call(**{option: -0.0}), call(**{option: 0.0}), option)
    for option in ("logit_scale", "softcap", "denominator"):
        with pytest.raises(ValueError, match=option):
            calls(np.float64)["loss"](**{option: -0.0})


@each_function
def test_no_call_keeps_or_loses_a_reference(name, dtype):
    call = calls(dtype)[name]
    given = [array for _, array in call.arrays()]
    before = [sys.getrefcount(array) for array in given]
    for _ in range(5):
        call()
        with pytest.raises((TypeError, ValueError)):
            call(axis="x") if not name.startswith("binary") else call(num_threads="x")
    assert [sys.getrefcount(array) for array in given] == before


@pytest.mark.parametrize("n_rows", [2**50, 2**59 - 1])
def test_sizes_that_no_memory_holds_are_memory_errors(n_rows):
    # Broadcast arrays of any size cost nothing, and sizes in bytes may exceed 64 bits.
    logits = np.broadcast_to(np.float16(1), (n_rows, 4))
    ids = np.broadcast_to(np.int8(0), (n_rows,))
    functions = [fastce.cross_entropy, fastce.cross_entropy_with_grad, fastce.cross_entropy_with_grad_hess]
    for function in [*functions, fastce.cross_entropy_stats, fastce.focal_loss]:
        with pytest.raises((MemoryError, ValueError), match=r"allocate|too big|array size|dimension"):
            function(logits, ids)
    for function in (fastce.softmax, fastce.log_softmax, fastce.logsumexp):
        with pytest.raises((MemoryError, ValueError), match=r"allocate|too big|array size|dimension"):
            function(logits)

