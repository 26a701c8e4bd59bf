"""Hostile arrays: whatever lies where, changes meanwhile or holds what, every function is right or refuses."""

import contextlib
import math
import mmap
import threading
import warnings

import numpy as np
import pytest
from calls import NAMES, WITH_BUFFERS, calls
from test_layouts import READABLE_LAYOUTS, WRITABLE_LAYOUTS, assert_same_bits

import fastce
from fastce import _engine

SHAPES = {np.dtype(np.float32): [(6, 5), (2, 1030)], np.dtype(np.float64): [(3, 70)]}
each_function = pytest.mark.parametrize("name", NAMES)
each_function_with_buffers = pytest.mark.parametrize("name", WITH_BUFFERS)


def assert_same_results(got, expected, what):
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other, what)


# Layouts


@each_function
def test_no_layout_of_any_argument_changes_a_bit(name, dtype):
    for shape in SHAPES[dtype]:
        call = calls(dtype, shape)[name]
        expected = call()
        for argument, array in call.arrays():
            for layout in READABLE_LAYOUTS:
                given = layout(array)
                before = given.tobytes()
                assert_same_results(call(**{argument: given}), expected, (shape, argument, layout.__name__))
                assert given.tobytes() == before


@each_function_with_buffers
def test_no_layout_of_any_buffer_changes_a_bit(name, dtype):
    for shape in SHAPES[dtype]:
        call = calls(dtype, shape)[name]
        expected = call()
        for layout in WRITABLE_LAYOUTS:
            given = {buffer: layout(array) for buffer, array in call.new_buffers(np.nan).items()}
            assert_same_results(call(**given), expected, (shape, layout.__name__))
            in_place = layout(call.arguments["logits"])
            assert_same_results(call(logits=in_place, out=in_place), expected, (shape, layout.__name__))


@each_function
def test_a_stride_of_zero_is_as_good_as_copies(name, dtype):
    for shape in SHAPES[dtype]:
        call = calls(dtype, shape)[name]
        for argument, array in call.arrays():
            # One class for all rows makes binary and other rows of one kind; the mask must show the ids of all rows.
            repeated = np.broadcast_to(array[:1], array.shape)
            if argument == "class_mask":
                repeated = np.broadcast_to(array.any(axis=0), array.shape)
            expected = call(**{argument: repeated.copy()})
            assert_same_results(call(**{argument: repeated}), expected, (shape, argument))


@each_function
def test_arguments_may_overlap_one_another(name, dtype):
    # Only what is written has to be apart: all that have a class axis are one array, the others windows on one block.
    call = calls(dtype)[name]
    shared = fastce.softmax(call.arguments.get("logits", call.arguments.get("probs")))
    block = np.linspace(0.1, 0.9, 64)
    windows = {}
    for argument, array in call.arrays():
        if array.dtype == dtype and array.shape == shared.shape:
            windows[argument] = shared
        elif array.dtype == np.float64:
            windows[argument] = block[len(windows) :][: array.size].reshape(array.shape)
    copies = {argument: array.copy() for argument, array in windows.items()}
    assert_same_results(call(**windows), call(**copies), windows.keys())


@pytest.fixture(scope="module")
def far_apart(tmp_path_factory):
    """A function that copies an array of three rows to where they lie 5 GB apart, in a sparse file."""
    bytes_of_rows = np.memmap(tmp_path_factory.mktemp("far") / "rows", np.uint8, "w+", shape=(3, 5 * 2**30))

    def copy(array, offset):
        place = bytes_of_rows[:, offset : offset + array.nbytes // 3].view(array.dtype)
        place[...] = array
        return place

    return copy


@pytest.mark.thread_unsafe(reason="all threads have one file")
@each_function
def test_rows_may_lie_gigabytes_apart(name, dtype, far_apart):
    # A row stride of more than 32 bits.
    call = calls(dtype, (3, 8))[name]
    expected = call()
    apart = {argument: array for argument, array in call.arrays() if array.ndim == 2}
    given = {argument: far_apart(array, 4096 * i) for i, (argument, array) in enumerate(apart.items())}
    assert_same_results(call(**given), expected, "arguments")
    for i, (buffer, array) in enumerate(call.new_buffers().items()):
        place = far_apart(array, 4096 * (len(given) + i))
        assert_same_results(call(**given, **{buffer: place}), expected, buffer)
        assert_same_results(call(**given, **{buffer: given["logits"]}), expected, buffer)
        given["logits"][...] = call.arguments["logits"]


@pytest.mark.parametrize("general", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}], ids=str)
def test_more_elements_than_32_bits_can_count(general, tmp_path):
    # Ignored rows are never read, so only the others need memory and time.
    dtype = np.float32
    rows, classes = 2_500_000, 2048
    live = [0, 1_048_575, 1_048_576, 2_097_151, 2_097_152, rows - 1]
    logits = np.memmap(tmp_path / "logits", dtype, "w+", shape=(rows, classes))
    logits[live] = np.random.default_rng(1).normal(0, 3, (len(live), classes))
    targets = np.full(rows, -100, np.int32)
    targets[live] = [2047, 0, 1, 1024, 2046, 2047]
    expected = fastce.cross_entropy(np.array(logits[live]), targets[live], reduction="none", **general)
    losses = fastce.cross_entropy(logits, targets, reduction="none", **general)
    assert_same_bits(losses[live], expected)
    assert np.count_nonzero(losses) == len(live)
    targets[rows - 1] = classes
    with pytest.raises(IndexError, match=rf"targets\[{rows - 1}\] = {classes}"):
        fastce.cross_entropy(logits, targets, **general)


@each_function
def test_axes_of_length_zero_in_every_position(name, dtype):
    call = calls(dtype)[name]
    scores = "probs" if "probs" in call.arguments else "logits"
    entries = name.startswith("binary")
    for shape in ((0, 5), (3, 0), (0, 0), (0, 2, 5), (2, 0, 5), (2, 3, 0)):
        empty = {scores: np.zeros(shape, dtype)}
        for argument, array in call.arrays():
            if argument == "weight":
                empty[argument] = np.ones(shape[-1])
            elif argument in ("indices", "values"):
                empty[argument] = np.zeros((*shape[:-1], 3), array.dtype)
            elif argument != scores:
                full = entries or array.shape == (6, 5)
                empty[argument] = np.zeros(shape if full else shape[:-1], array.dtype)
        if shape[-1] == 0 and not entries:
            with pytest.raises(ValueError, match=f"{scores} must have at least one class.*0 along axis"):
                call(**empty)
            continue
        for result in call(**empty):
            assert np.isnan(result).all() if result.ndim == 0 else result.size == 0


def test_nothing_is_read_of_arrays_without_elements(dtype):
    # Strides of an array without elements may be anything, and its address need not exist.
    for strides in ((0, 0), (-(2**40), 12345), (2**62, -1)):
        logits = np.lib.stride_tricks.as_strided(np.empty(0, dtype), (0, 5), strides)
        targets = np.lib.stride_tricks.as_strided(np.empty(0, np.int64), (0,), strides[:1])
        for reduction in ("none", "sum", "mean"):
            loss, gradient = fastce.cross_entropy_with_grad(
                logits, targets, reduction=reduction, out=np.empty((0, 5), dtype)
            )
            assert np.size(loss) == (reduction != "none") and gradient.shape == (0, 5)
        assert fastce.softmax(logits).shape == (0, 5)
        assert fastce.binary_cross_entropy(logits, logits, reduction="sum") == 0.0


# Overlaps


class Wrapped:
    """No array, but turned into one by NumPy: the same memory every time; `meanwhile` is called first."""

    def __init__(self, array, meanwhile=None):
        self.array = array
        self.meanwhile = meanwhile

    def __array__(self, dtype=None, copy=None):
        if self.meanwhile is not None:
            self.meanwhile()
        return self.array


@each_function_with_buffers
@pytest.mark.parametrize("wrapped", [memoryview, Wrapped])
def test_no_object_hides_an_overlap_with_a_buffer(name, wrapped, dtype):
    # What is copied before the first write may lie anywhere in such an object; what is read later may not.
    call = calls(dtype, (40, 5))[name]
    expected = call()
    for buffer in call.buffers:
        for argument, array in call.arrays():
            for shift in (-3, 3):
                memory = np.zeros(array.nbytes + call.arguments["logits"].nbytes + 64, np.uint8)
                start = max(0, -shift) * 8
                out = memory[start : start + call.arguments["logits"].nbytes].view(dtype).reshape(40, 5)
                start = max(0, shift) * 8
                given = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
                given[...] = array
                try:
                    got = call(**{argument: wrapped(given), buffer: out})
                except ValueError as error:
                    assert f"{buffer} overlaps {argument}" in str(error)
                    np.testing.assert_array_equal(given, array)
                else:
                    assert_same_results(got, expected, (argument, buffer))


# What changes during a call


def change_shape(array):
    array.shape = array.shape[::-1] if array.ndim == 2 else (1, *array.shape)


def change_to_fewer_axes(array):
    array.shape = (1, array.size)


def change_dtype(array):
    array.dtype = f"V{array.itemsize}"


def change_strides(array):
    array.strides = (0,) * array.ndim


CHANGES = [change_shape, change_to_fewer_axes, change_dtype]


@each_function
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_arrays_that_are_changed_by_the_conversion_of_another(name, change, dtype):
    # An argument that NumPy has to convert runs Python, which may do anything to the other arrays: the result is
    # that of the arrays as they were when they were checked, or an error.
    shape = (400, 7)
    call = calls(dtype, shape)[name]
    expected = call()
    for argument, array in call.arrays():
        for victim in [*(other for other, _ in call.arrays() if other != argument), *call.buffers]:
            arguments = {other: value.copy() for other, value in call.arrays()} | call.new_buffers()
            done = []

            def meanwhile(arguments=arguments, victim=victim, done=done):
                if not done:
                    done.append(True)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", DeprecationWarning)
                        change(arguments[victim])

            arguments[argument] = Wrapped(array, meanwhile)
            try:
                got = call(**arguments)
            except (TypeError, ValueError, IndexError):
                continue
            assert done
            for one, other in zip(got, expected, strict=True):
                numbers = one.reshape(-1).view(other.dtype)
                np.testing.assert_array_equal(numbers, other.reshape(-1), f"{argument} {victim}")


@pytest.mark.parametrize("change", [*CHANGES, change_strides], ids=lambda change: change.__name__)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_arrays_that_are_changed_while_threads_are_chosen(change, reduction, dtype, monkeypatch):
    # The number of threads is chosen by Python code, during which another thread may get the interpreter.
    rows, classes = 8192, 11
    call = calls(dtype, (rows, classes))["loss and gradient"]
    expected = call(reduction=reduction)
    for victim in ("logits", "targets"):
        arguments = {argument: array.copy() for argument, array in call.arrays()}

        def choose(array=arguments[victim]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                change(array)
            return 2

        monkeypatch.setattr(_engine, "default_threads", choose)
        try:
            got = call(reduction=reduction, **arguments)
        except (TypeError, ValueError, IndexError, AttributeError):
            continue
        finally:
            monkeypatch.undo()
        if change is not change_strides:  # those of an array are its values
            for one, other in zip(got, expected, strict=True):
                np.testing.assert_array_equal(one.reshape(-1), other.reshape(-1))


@each_function
def test_arrays_cannot_be_resized_while_they_are_in_use(name, dtype):
    # NumPy refuses as long as somebody else refers to the memory.
    call = calls(dtype)[name]
    expected = call()
    for argument, array in call.arrays():
        for victim, used in call.arrays():
            if victim == argument:
                continue
            given = used.copy()
            refused = []

            def meanwhile(given=given, refused=refused):
                try:
                    given.resize(given.size // 2)
                except ValueError:
                    refused.append(True)

            try:
                got = call(**{argument: Wrapped(array, meanwhile), victim: given})
            except ValueError:
                # It was resized before anybody looked at it: another shape.
                continue
            assert refused
            assert_same_results(got, expected, (argument, victim))


def test_buffers_of_other_objects_cannot_be_closed_or_resized_while_they_are_in_use(dtype):
    call = calls(dtype)["loss and gradient"]
    expected = call()
    memory = bytearray(call.arguments["logits"].tobytes())
    logits = np.frombuffer(memory, dtype).reshape(6, 5)

    def meanwhile():
        with pytest.raises(BufferError):
            memory.append(0)

    assert_same_results(call(logits=logits, targets=Wrapped(call.arguments["targets"], meanwhile)), expected, "")


def disturbed(disturb, work, repeats):
    """Call work() `repeats` times while another thread calls disturb() all the time."""
    stop = threading.Event()

    def run():
        while not stop.is_set():
            disturb()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(repeats):
            work()
    finally:
        stop.set()
        thread.join()


@each_function
def test_logits_that_another_thread_overwrites_meanwhile_are_memory_safe(name):
    # Their numbers may be anything, but no place in memory is computed from them.
    dtype = np.float32
    call = calls(dtype, (300, 40))[name]
    scores = call.arguments.get("logits", call.arguments.get("probs"))
    patterns = [np.full_like(scores, value) for value in (np.nan, np.inf, -np.inf, 1e30, -1e30)]
    frames = {buffer: np.full((300, 48), 8.5, dtype) for buffer in call.buffers}
    buffers = {buffer: frame[:, 4:44] for buffer, frame in frames.items()}

    def disturb():
        for pattern in patterns:
            scores[...] = pattern

    def work():
        try:
            call(**buffers)
        except ValueError as error:
            assert "probs" in str(error)

    disturbed(disturb, work, 8)
    for frame in frames.values():
        assert (frame[:, :4] == 8.5).all() and (frame[:, 44:] == 8.5).all()


def test_two_threads_that_write_to_one_buffer_write_nowhere_else(dtype):
    call = calls(dtype, (600, 40))["loss and gradient"]
    frame = np.full((600, 48), 8.5, dtype)
    expected = call()

    def work():
        loss, _ = call(out=frame[:, 4:44], num_threads=2)
        assert_same_bits(loss, expected[0])

    disturbed(work, work, 20)
    assert (frame[:, :4] == 8.5).all() and (frame[:, 44:] == 8.5).all()
    assert_same_bits(np.array(frame[:, 4:44]), expected[1])


# Values


def bits(numbers):
    numbers = np.asarray(numbers)
    return [hex(int(number)) for number in numbers.reshape(-1).view(f"u{numbers.itemsize}")]


INF = math.inf
TOP = float(np.finfo(np.float32).max)
EXACT_ROWS = [
    ([0, 0], 0, 0.69314718055994531, [-0.5, 0.5]),
    ([1e8, 1e8], 1, 0.69314718055994531, [0.5, -0.5]),
    ([1000, 0], 0, 0.0, [0, 0]),
    ([1000, 0], 1, 1000.0, [1, -1]),
    ([20, 0], 0, 2.0611536181902037e-09, [-2.0611536139418474e-09, 2.0611536139418474e-09]),
    ([-INF, 0], 1, 0.0, [0, 0]),
    ([-INF, 0], 0, INF, [-1, 1]),
    ([TOP, -TOP], 1, INF, [1, -1]),
    ([TOP, -TOP], 0, 0.0, [0, 0]),
    ([3.5], 0, 0.0, [0]),
    ([1e-45, 0, -1e-45], 0, 1.0986122886681098, [-2 / 3, 1 / 3, 1 / 3]),
    ([0.0, -0.0, 0.0], 1, 1.0986122886681098, [1 / 3, -2 / 3, 1 / 3]),
]


@pytest.mark.parametrize(("row", "target", "loss", "gradient"), EXACT_ROWS, ids=str)
def test_rows_are_rounded_from_the_exact_values(row, target, loss, gradient):
    for copies in (1, 37):  # one row, and several in a block
        logits = np.tile(np.array(row, np.float32), (copies, 1))
        got_loss, got = fastce.cross_entropy_with_grad(logits, [target] * copies, reduction="none")
        assert bits(got_loss) == bits(np.full(copies, loss, np.float32))
        assert bits(np.abs(got)) == bits(np.abs(np.tile(np.array(gradient, np.float32), (copies, 1))))
        np.testing.assert_array_equal(got, np.tile(np.array(gradient, np.float32), (copies, 1)))


def test_losses_too_small_for_normal_numbers_are_positive_and_nearly_exact():
    for lead, loss in ((88, 6.054601895401186e-39), (104, 0.0), (1e30, 0.0)):
        got, gradient = fastce.cross_entropy_with_grad(np.array([lead, 0], np.float32), 0, reduction="none")
        assert abs(float(got) - loss) <= 2.0**-126 and not np.signbit(got)
        assert np.abs(gradient).max() <= 2.0**-126 and abs(gradient.sum()) == 0


def test_a_constant_row_of_a_thousand_classes():
    loss, gradient = fastce.cross_entropy_with_grad(np.full((1, 1000), 2.5, np.float32), [7], reduction="none")
    assert bits(loss) == bits(np.float32(math.log(1000)))
    assert set(bits(np.delete(gradient, 7))) == set(bits(np.float32(0.001)))
    assert bits(gradient[0, 7]) == bits(np.float32(-0.999))


def test_ties_at_the_maximum(dtype):
    # The target is left out of the sum, not the first of the largest.
    for ties in (2, 3, 7):
        row = np.append(np.full(ties, 50.0), np.full(20, -5.0)).astype(dtype)
        for target in range(ties):
            loss, gradient = fastce.cross_entropy_with_grad(row, target, reduction="none")
            assert float(loss) == pytest.approx(math.log(ties), rel=5e-7)
            others = np.delete(gradient[:ties], target)
            np.testing.assert_allclose(others, 1 / ties, rtol=5e-7)
            assert gradient[target] == pytest.approx(1 / ties - 1, rel=5e-7)


def test_smoothing_of_a_class_at_minus_infinity(dtype):
    # Mass on a class that cannot be: an infinite loss, its gradient the mass; without smoothing nothing of it.
    row = np.array([1, -np.inf, 0, 2], dtype)
    loss, gradient = fastce.cross_entropy_with_grad(row, 0, label_smoothing=0.2)
    assert loss == np.inf and np.isfinite(gradient).all()
    assert gradient[1] == pytest.approx(-0.05, rel=5e-7)
    loss, gradient = fastce.cross_entropy_with_grad(row, 0, label_smoothing=0.0)
    assert math.isfinite(loss) and gradient[1] == 0


def test_class_ids_may_be_a_view_of_in_place_logits(dtype):
    # Bytes that make sense as floats and as ids: zeros.
    logits = np.zeros((6, 6), dtype)
    ids = logits.view(f"i{dtype.itemsize}")[:, 2]
    expected = fastce.cross_entropy_with_grad(logits.copy(), ids.copy())
    loss, gradient = fastce.cross_entropy_with_grad(logits, ids, out=logits)
    assert loss == expected[0] and gradient is logits
    assert_same_bits(gradient, expected[1])


def test_memory_that_is_shared_or_lies_on_huge_pages(dtype):
    call = calls(dtype, (300, 65))["loss and gradient"]
    expected = call()
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        memory = mmap.mmap(-1, 1 << 23, flags=flags | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        both = np.frombuffer(memory, dtype, 2 * 300 * 65).reshape(2, 300, 65)
        both[0] = call.arguments["logits"]
        assert_same_results(call(logits=both[0], out=both[1]), expected, flags)


def test_every_entry_of_a_buffer_is_written(dtype):
    for shape in SHAPES[dtype]:
        for name, call in calls(dtype, shape).items():
            for poison in (np.nan, 12345.0):
                buffers = call.new_buffers(poison)
                options = {"ignore_index": int(call.arguments["targets"][0])} if name == "weights" else {}
                call(**buffers, **options)
                for buffer in buffers.values():
                    assert not np.isnan(buffer).any() and not (buffer == 12345.0).any(), name
