"""No kernel reads or writes beyond the arrays it is given."""

import os
import sys
from pathlib import Path

import pytest

import fastce

GUARDED = Path(__file__).with_name("guarded.py")
INFO = fastce.build_info()
# Under a sanitizer, which slows it down and guards arrays itself, one target is enough.
TARGETS = [INFO["target"]] if "FASTCE_SANITIZED" in os.environ else INFO["available_targets"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages by Linux's own mprotect")
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_beyond_an_array_is_touched(target, run_python):
    done = run_python(str(GUARDED), FASTCE_TARGET=target, timeout=300)
    assert done.stdout.endswith("safe\n")
