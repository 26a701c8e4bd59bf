#!/usr/bin/env bash
# Run every kernel and a selection of the tests under valgrind's memcheck: nothing is read that was never written, nothing
# beyond its array. Needs valgrind; it knows no AVX-512, so the v3 modules run.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
command -v valgrind >/dev/null || { echo "result: valgrind is not installed"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export FASTCE_TARGET=v3 FASTCE_NUM_THREADS=2 OMP_NUM_THREADS=2 PYTHONMALLOC=malloc OPENBLAS_NUM_THREADS=1
export PYTHONPATH=$PWD:$PWD/tests PYTHONDONTWRITEBYTECODE=1
lengths=1,2,3,7,10,15,16,17,33,64,96,97,127,128,129,257,1000,4095,4097,5003,12289,16385,70000
# Tests whose truth does not need long doubles, which valgrind computes as doubles.
tests="tests/test_special_values.py tests/test_errors.py tests/test_values.py tests/test_half_types.py"
if [ "${1:-}" = --quick ]; then
    lengths=1,10,97,4097
    tests=
fi

memcheck() {
    valgrind -q --error-exitcode=99 --leak-check=no --track-origins=no --num-callers=25 \
        --suppressions=tests/torture/valgrind.supp --log-file="$work/$1.%p" "$python" "${@:2}"
}

begun=$SECONDS
status=0
memcheck kernels tests/torture/every_kernel.py "$lengths" | tee "$work/printed" || status=1
cases=$(grep -c '^float' "$work/printed")
passed=0
if [ -n "$tests" ]; then
    # shellcheck disable=SC2086
    memcheck suite -m pytest -q -p no:cacheprovider $tests | tee "$work/suite" || status=1
    passed=$(grep -oE '[0-9]+ passed' "$work/suite" | cut -d' ' -f1)
fi
errors=$(cat "$work"/kernels.* "$work"/suite.* 2>/dev/null | grep -cE '(Invalid|uninitialised|Mismatched|overlap in|Process terminating)')
cat "$work"/kernels.* "$work"/suite.* 2>/dev/null | head -200
echo "result: memcheck, $cases groups of calls and ${passed:-0} tests, $errors errors, $((SECONDS - begun)) s"
exit $((status != 0 || errors != 0))
