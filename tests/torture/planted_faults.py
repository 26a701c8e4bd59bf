"""Plant one bug at a time in a copy of the sources: the tests named beside it must go red, or a test is missing.

    python tests/torture/planted_faults.py [--quick] [--only WORD] [--list]

A fault replaces a text that stands exactly once in its file (tests/test_torture.py looks that up), so that the table
cannot rot in silence. Only the module that it changes is compiled, for one target and with -O1; the tests are those
that should notice, but for those that look at optimised machine code. They are run on the unchanged copy first: red
means something only where green was possible.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "planted_faults"
SECONDS_PER_FAULT = 300


class Fault(NamedTuple):
    """One bug: in `file`, the text `old` becomes `new`, and one of `tests` must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


KERNELS = "fastce/_kernels/"
FAULTS = [
    # Memory and input
    Fault("the range check of the short way is off", KERNELS + "plain.pxd",
          "n_outside += 1 if <uint64_t>ids[i] >= <uint64_t>n_classes and ids[i] != ignored else 0", "n_outside += 0",
          "test_errors.py"),
    Fault("the range check of the general way is off", KERNELS + "rows.pyx",
          "n_bad += <uint64_t>t[i] >= <uint64_t>n_classes", "n_bad += 0",
          "test_errors.py test_option_errors.py"),
    Fault("ids are checked before the ignored ones are left out", KERNELS + "rows.pyx",
          "n_bad -= hits", "n_bad -= 0",
          "test_special_values.py test_errors.py"),
    Fault("whole vectors are written beyond the last row", KERNELS + "small.pxd",
          "return larger(0, n - (padded(n_classes) + n_classes - 1) // n_classes)", "return n",
          "test_memory.py"),
    Fault("a maximum is read one element too far", KERNELS + "lanes.pxd",
          "for i in range(n % (4 * LANES)):", "for i in range(n % (4 * LANES) + 1):",
          "test_memory.py"),
    Fault("class ids are taken where they lie", "fastce/_checks.py",
          "values = flat_copy(array, array.dtype)  #", "values = array.reshape(-1)  #",
          "test_layouts.py test_errors.py test_threads.py"),
    Fault("overlaps are not looked for", "fastce/_checks.py",
          "if isinstance(value, np.ndarray) and share_memory(out, value):", "if False:",
          "test_errors.py test_option_errors.py"),
    Fault("out is written before targets are checked", "fastce/_problem.py",
          "_checks.check_reduction(reduction)", "[np.copyto(buffer, 0) for buffer in (buffers or {}).values()]",
          "test_errors.py test_option_errors.py"),
    Fault("rows whose distances differ are taken for evenly spaced", "fastce/_engine.py",
          "elif stride != row_stride * n_rows:", "elif False:",
          "test_layouts.py"),
    Fault("probabilities may sum to anything", "fastce/_checks.py",
          "off = np.abs(totals - 1.0) > tolerance", "off = np.abs(totals - 1.0) > np.inf",
          "test_probabilities.py"),
    Fault("the kernel takes any sum for that of probabilities", KERNELS + "probabilities.pyx",
          "fabs(total - 1.0) <= tolerance", "fabs(total - 1.0) < INFINITY",
          "test_probabilities.py"),
    Fault("rows of probabilities are read whatever their weight", KERNELS + "probabilities.pyx",
          "return batch.sample_weight == NULL or batch.sample_weight[row] != 0", "return True",
          "test_probabilities.py"),
    Fault("log(1 - p) of small p loses digits", KERNELS + "binary.pyx",
          "(1.0 - below) - p[i]", "0.0",
          "test_probabilities.py"),
    Fault("binary targets are not looked at", KERNELS + "binary.pyx",
          "return largest <= 0x3f800000 and not outside", "return True",
          "test_binary.py"),
    # Numbers
    Fault("the tail of a short row is one short", KERNELS + "target.h",
          "fastce_taken_##type(fastce_take(n - i, t - i, part), row + i",
          "fastce_taken_##type(fastce_take(n - 1 - i, t - i, part), row + i",
          "test_values.py test_accuracy.py"),
    Fault("the tail of a long gradient is one short", KERNELS + "block.pxd",
          "shift_terms(out, terms, left, factor, shift)", "shift_terms(out, terms, left - 1, factor, shift)",
          "test_values.py test_accuracy.py test_layouts.py"),
    Fault("log instead of log1p", KERNELS + "block.pxd",
          "logarithm = log_mantissa(x) + lost * (2.0 - x)", "logarithm = log_mantissa(x)",
          "test_values.py test_accuracy.py"),
    Fault("p - 1 at the target", KERNELS + "block.pxd",
          "return 1.0 if others == total else others * (1.0 / total)", "return 1.0 - at_target / total",
          "test_values.py test_accuracy.py"),
    Fault("the batch is summed in float32", KERNELS + "plain.pxd",
          "lanes[lane] += x[i + lane]", "lanes[lane] = <float>(lanes[lane] + x[i + lane])",
          "test_values.py test_accuracy.py test_gradients.py"),
    Fault("nan is dropped where the exponent is bounded", KERNELS + "vexp.pxd",
          "x = low if low > x else x", "x = x if x > low else low",
          "test_special_values.py"),
    Fault("a row with +inf is taken for an ignored one", KERNELS + "large.pxd",
          "put_row(rows, r, NAN, NAN, NAN, 0.0, 0.0)", "put_row(rows, r, 0.0, 1.0, 0.0, 0.0, 0.0)",
          "test_special_values.py"),
    Fault("the shift of the exponential is off by one", KERNELS + "vexp.pxd",
          "window.magic = 12582912.0 + 127 - shift", "window.magic = 12582912.0 + 126 - shift",
          "test_values.py"),
    Fault("a row that leaves its window is not taken again", KERNELS + "lanes.pxd",
          "return 1.5e37    # 2^123.5", "return 3.0e38    # 2^127.8",
          "test_values.py test_accuracy.py test_special_values.py"),
    Fault("what the sum of a long row rounds off is lost", KERNELS + "lanes.pxd",
          "total[1] += (total[0] - (after - part)) + (chunk - part)", "total[1] += 0.0",
          "test_values.py test_accuracy.py"),
    Fault("a weighted loss may be -0.0", KERNELS + "block.pxd",
          "weights[r] * loss + 0.0      # never -0.0", "weights[r] * loss",
          "test_special_values.py test_options.py"),
    Fault("a block of a streamed gradient starts at its head", KERNELS + "block.pxd",
          "pending.terms = <char*>(terms + head)", "pending.terms = <char*>(terms)",
          "test_layouts.py test_values.py test_accuracy.py"),
    Fault("columns of out are taken to lie like those of the logits", KERNELS + "rows.pyx",
          "grid_of(logits if out is None else out)", "grid_of(logits)",
          "test_layouts.py"),
    Fault("float16 is rounded towards 0", KERNELS + "passage.h",
          "_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO",
          "test_half_types.py"),
    Fault("an infinite logit on its target's side costs 0 * inf", KERNELS + "binary.pyx",
          "return near * (x if near != 0 else <floating>0.0)", "return near * x",
          "test_binary.py"),
    Fault("a divergence's terms have a coefficient of too few digits", KERNELS + "divergence.pyx",
          "0.28571429407117194", "0.285714",
          "test_divergence.py"),
    Fault("a divergence takes no logarithm of a probability below the normal numbers", KERNELS + "divergence.pyx",
          "p = p if q > 0.0 else 1.0", "p = 1.0",
          "test_divergence.py"),
    # Options and reductions
    Fault("the mean's denominator ignores weights", KERNELS + "rows.pyx",
          "divisor = summed.total", "divisor = n_live",
          "test_options.py test_gradients.py"),
    Fault("ignored rows count in the mean", KERNELS + "plain.pxd",
          "n_ignored += 1 if ids[i] == ignored else 0", "n_ignored += 0",
          "test_values.py test_special_values.py"),
    Fault("the mean of nothing is 0", "fastce/_problem.py",
          'return float("nan")', "return 0.0",
          "test_special_values.py"),
    Fault("rows of sample weight 0 are looked at", "fastce/_problem.py",
          "np.copyto(ids, -1, where=self.sample_weight == 0)", "pass",
          "test_options.py test_special_values.py"),
    Fault("a common mask leaves smoothing to all classes", KERNELS + "soft.pyx",
          "uniform = batch.smoothing / larger(1, n_shown)", "uniform = batch.smoothing / batch.n_classes",
          "test_options.py"),
    Fault("the short way takes -1 for an entry to ignore", KERNELS + "soft.pyx",
          "copy_ids(ids, indices, n, batch.n_classes, -1) == n", "copy_ids(ids, indices, n, batch.n_classes, -1) >= 0",
          "test_short_ways.py"),
    Fault("the short way looks at the first row's mask alone", KERNELS + "plain.pxd",
          "mask += n_classes", "mask += 0",
          "test_short_ways.py"),
    Fault("focal loss has the gradient of its first factor alone", KERNELS + "target_losses.pxd",
          "factor[0] = focused * (1.0 + gamma * ratio)", "factor[0] = focused",
          "test_further_losses.py"),
    Fault("a mask of each row leaves smoothing to all classes", KERNELS + "general.pxd",
          "uniform = batch.smoothing / n_shown", "uniform = batch.smoothing / batch.n_classes",
          "test_options.py"),
    Fault("a target on a masked class has a gradient", KERNELS + "block.pxd",
          "out[t] = out[t] if mask[t] else 0", "out[t] = out[t]",
          "test_options.py"),
    Fault("the scale is not squared in the Hessian", KERNELS + "block.pxd",
          "cdef double scale = rows.scale[r] * batch.options.transform.scale", "cdef double scale = rows.scale[r]",
          "test_hessians.py"),
    Fault("of a sparse target's equal indices the last one wins", KERNELS + "general.pxd",
          "<floating>(out[index - start] - a * own.factor[r])", "<floating>(-a * own.factor[r])",
          "test_soft_targets.py"),
    Fault("mass at the largest logit is not counted", KERNELS + "short.pxd",
          "own.mass_at_maximum[r] = a[top]", "own.mass_at_maximum[r] = 0.0",
          "test_soft_targets.py"),
    # The process
    Fault("no flag is set in a forked child", KERNELS + "team.h",
          "return pthread_atfork(NULL, NULL, fastce_note_fork);", "return 0;",
          "test_threads.py::test_children_of_a_fork_work"),
    Fault("threads are not tried before a team is opened", KERNELS + "cpu.pyx",
          "refused = try_threads(n - 1)", "refused = 0",
          "test_processes.py"),
    Fault("the interpreter is not let go", KERNELS + "rows.pyx",
          "if num_threads == 1 and batch.n_rows * batch.n_classes < GIL_ELEMENTS:\n        take_batch_of(",
          "if num_threads == 1:\n        take_batch_of(",
          "test_threads.py::test_python_runs_on_while_a_kernel_runs"),
    Fault("rows beyond their window are not redone where columns are shared", KERNELS + "split.pxd",
          "row.whole = not others < sum_limit(x)", "row.whole = False",
          "test_threads.py::test_any_number_of_threads_gives_the_same_bits"),
    Fault("the number of threads is not bounded", "fastce/_engine.py",
          "return min(num_threads, MAX_THREADS)", "return num_threads",
          "test_threads.py"),
    Fault("the host's rounding mode is computed in", KERNELS + "target.h",
          "if (rounding->is_set) {", "if ((rounding->is_set = 0)) {",
          "test_environment.py::test_threads_that_were_born_in_another_rounding_mode_give_the_same_bits"),
    Fault("import sets the processor to flush subnormal numbers", KERNELS + "team.h",
          "static inline int fastce_watch_forks(void) {", "static inline int fastce_watch_forks(void) {\n"
          "    __builtin_ia32_ldmxcsr(0x9fc0);",
          "test_build.py::test_floating_point_modes_are_left_alone"),
]  # fmt: skip

# The module that shows a fault in a file; those that are not here are shown by "rows", Python files by none. That of
# the processor is compiled once, not for every target.
SHOWN_BY = {
    "soft.pyx": "soft", "short.pxd": "soft", "general.pxd": "soft", "log_columns.pxd": "soft",
    "binary.pyx": "binary", "divergence.pyx": "divergence",
    "probabilities.pyx": "probabilities",
    "passage.pyx": "passage", "passage.h": "passage",
    "cpu.pyx": "cpu", "team.h": "cpu",
}  # fmt: skip


def module_of(fault, target):
    """Return the name of the compiled module that a fault changes, or None."""
    path = Path(fault.file)
    if path.suffix == ".py":
        return None
    shown = SHOWN_BY.get(path.name, "rows")
    return shown if shown == "cpu" else f"{shown}_{target}"


def occurrences(fault, root=ROOT):
    """Return how often the text of a fault stands in its file: 1, unless the sources have changed."""
    return (root / fault.file).read_text().count(fault.old)


def run(*command, seconds, **environment):
    """Run Python in the copy; return (exit status or None if it did not end, what it printed)."""
    env = {**os.environ, "PYTHONPATH": str(TREE), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=TREE, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=seconds)
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # with the children that it waits for
        return None, process.communicate()[0]


def build(modules):
    """Compile modules of the copy in place."""
    status, printed = run("setup.py", "-q", "build_ext", "--inplace", seconds=600, FASTCE_MODULES=",".join(modules))
    if status != 0:
        raise SystemExit(f"{modules} did not compile:\n{printed}")


def run_tests(tests, target, seconds=SECONDS_PER_FAULT):
    """Return (verdict, the first failure's line) of tests: "green", "red", or "broken" if they could not be run."""
    selected = [f"tests/{name}" for name in tests]
    status, printed = run(
        "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "not packed and not inlined", *selected,
        seconds=seconds, FASTCE_TARGET=target,
    )  # fmt: skip
    lines = printed.splitlines()
    if status is None:
        return "red", f"does not end within {seconds} s"
    if status < 0:
        return "red", f"dies of signal {-status}"
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    verdict = {0: "green", 1: "red"}.get(status, "broken")
    return verdict, failed[0] if failed else (lines or [""])[-1]


def copy_sources():
    """Make the copy, with the modules that are built here; what is compiled in it compiles fast, not to fast code."""
    shutil.rmtree(TREE, ignore_errors=True)
    for folder in ("fastce", "tests"):
        shutil.copytree(ROOT / folder, TREE / folder, ignore=shutil.ignore_patterns("__pycache__", "torture"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, TREE / name)
    setup = TREE / "setup.py"
    setup.write_text(setup.read_text().replace('"-O3"', '"-O1"'))


def try_fault(fault, target):
    """Plant a fault, build, test, and take it back; return as run_tests does."""
    path = TREE / fault.file
    sound = path.read_text()
    module = module_of(fault, target)
    built = [(so, so.read_bytes()) for so in (TREE / KERNELS).glob(f"{module}.*.so")] if module else []
    path.write_text(sound.replace(fault.old, fault.new))
    try:
        if module:
            build([module])
        return run_tests(fault.tests.split(), target)
    finally:
        path.write_text(sound)
        for so, code in built:
            so.unlink()  # a new file: the old one may still be mapped
            so.write_bytes(code)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three faults only")
    parser.add_argument("--only", default="", help="faults whose name holds this word")
    parser.add_argument("--list", action="store_true", help="print the table and plant nothing")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in fault.name]
    if arguments.quick:
        faults = [fault for fault in faults if fault.file.endswith("_checks.py")]
    if arguments.list:
        for fault in faults:
            print(f"{fault.name:64} {fault.file:28} {fault.tests}")
        return
    rotten = [fault.name for fault in faults if occurrences(fault) != 1]
    if rotten:
        raise SystemExit("the sources have changed, these texts do not stand there exactly once: " + "; ".join(rotten))

    start = time.monotonic()
    copy_sources()
    available = subprocess.run(
        [sys.executable, "-c", "import fastce; print(*fastce.build_info()['available_targets'])"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, check=True,
    ).stdout.split()  # fmt: skip
    target = "v3" if "v3" in available else "baseline"
    build(sorted({module for fault in faults if (module := module_of(fault, target))}) or [f"rows_{target}"])
    every_test = sorted({test for fault in faults for test in fault.tests.split()})
    verdict, line = run_tests(every_test, target, seconds=3600)
    if verdict != "green":
        raise SystemExit(f"the unchanged copy is {verdict}: {line}")
    print(f"unchanged sources, target {target}: green ({time.monotonic() - start:.0f} s)", flush=True)

    missed = []
    for fault in faults:
        begun = time.monotonic()
        verdict, line = try_fault(fault, target)
        print(f"{verdict:6} {fault.name} ({time.monotonic() - begun:.0f} s): {line[:160]}", flush=True)
        if verdict != "red":
            missed.append(fault.name)
    seconds = time.monotonic() - start
    if missed:
        print("not noticed: " + "; ".join(missed))
    print(f"result: {len(faults)} planted faults, {len(faults) - len(missed)} noticed, {seconds:.0f} s")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
