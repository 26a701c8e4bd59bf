"""Nothing is left of a call, a failed call or a thread: no memory, no reference, no thread, no file."""

import os
import sys

import pytest
import soak

# A sanitizer keeps freed memory for a while, to find its use, and red zones beside it: sizes mean nothing there.
MEMORY = "FASTCE_SANITIZED" not in os.environ
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc/self"),
    pytest.mark.thread_unsafe(reason="counts what the whole process holds"),
]


def test_calls_leave_nothing_behind():
    soak.soak_calls(soak.good_calls(), 6_000, memory=MEMORY)


def test_what_is_left_is_found():
    kept = []
    if MEMORY:
        with pytest.raises(AssertionError, match="bytes"):
            soak.soak_calls([lambda: kept.append(bytearray(2000))], 2_000, memory=True)
    item = object()
    with pytest.raises(AssertionError, match="referred to"):
        soak.soak_calls([lambda: kept.append(item)], 100, memory=False)


def test_failing_calls_leave_nothing_behind():
    soak.soak_failures(3_000, memory=MEMORY)


@pytest.mark.parametrize("expected, call", soak.bad_calls(), ids=lambda value: getattr(value, "__name__", ""))
def test_each_kind_of_failing_call_keeps_no_reference(expected, call):
    objects = soak.arguments_of([call])
    soak.fail(expected, call)
    references = [sys.getrefcount(item) for item in objects]
    for _ in range(20):
        soak.fail(expected, call)
    assert [sys.getrefcount(item) for item in objects] == references


def test_short_lived_threads_leave_nothing_behind():
    soak.soak_threads(120, memory=False)  # their stacks come and go; tests/torture/soak.py counts memory too
