"""Every compiled target keeps every promise, and v3 and v4 give the same bits."""

import os
from pathlib import Path

import pytest

import fastce

TESTS = Path(__file__).parent
INFO = fastce.build_info()
OTHERS = [target for target in INFO["available_targets"] if target != INFO["target"]]
# What depends on the compiled code; errors, threads and the rest are the same Python for all targets. Under a
# sanitizer, which slows all of it down several times, the general rows are tried on one target: they have one text.
SANITIZED = "FASTCE_SANITIZED" in os.environ
GENERAL = [
    "test_options.py",
    "test_soft_targets.py",
    "test_activations.py",
    "test_hessians.py",
    "test_statistics.py",
    "test_half_types.py",
    "test_faults.py",
]
DEPENDENT = [
    *([] if SANITIZED else GENERAL),
    "test_values.py",
    "test_accuracy.py",
    "test_special_values.py",
    "test_layouts.py",
    "test_gradients.py",
    "test_threads.py::test_any_number_of_threads_gives_the_same_bits",
]


@pytest.mark.parametrize("target", OTHERS)
def test_the_suite_passes_on(target, run_python):
    modules = [str(TESTS / name) for name in DEPENDENT]
    done = run_python("-m", "pytest", "-p", "no:cacheprovider", *modules, FASTCE_TARGET=target, timeout=580)
    assert f"fastce: target {target}," in done.stdout
    assert " passed" in done.stdout and " failed" not in done.stdout


@pytest.mark.parametrize("target", INFO["available_targets"])
def test_a_target_is_forced_by_the_environment(target, run_python):
    done = run_python("-c", "import fastce; print(fastce.build_info()['target'])", FASTCE_TARGET=target)
    assert done.stdout.split() == [target]


@pytest.mark.parametrize("empty", [None, ""])
def test_the_best_available_target_is_the_default(empty, run_python):
    done = run_python("-c", "import fastce; print(fastce.build_info()['target'])", FASTCE_TARGET=empty)
    best = next(target for target in ("v4", "v3", "baseline") if target in INFO["available_targets"])
    assert done.stdout.split() == [best]


@pytest.mark.parametrize("target", ["avx2", "V3", "v5", "v3,v4"])
def test_an_unknown_target_fails_at_import_and_lists_the_available_ones(target, run_python):
    done = run_python("-c", "import fastce", FASTCE_TARGET=target, check=False)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError") and "FASTCE_TARGET" in error and target in error
    for available in INFO["available_targets"]:
        assert available in error


@pytest.mark.skipif(not {"v3", "v4"} <= set(INFO["available_targets"]), reason="this processor has no AVX-512")
def test_v3_and_v4_give_the_same_bits(run_python):
    v3, v4 = (
        run_python(str(TESTS / "digests.py"), FASTCE_TARGET=target).stdout.splitlines()
        for target in ("v3", "v4")
    )
    assert v3[0] == "target v3" and v4[0] == "target v4"
    assert len(v3) == len(v4) > 500
    assert [(one, other) for one, other in zip(v3[1:], v4[1:], strict=True) if one != other] == []
