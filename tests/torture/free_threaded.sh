#!/usr/bin/env bash
# Run the suite on a free-threaded CPython 3.13, each test in eight threads at once; the interpreter lock must stay off.
#
#   tests/torture/free_threaded.sh [--quick] [file or option for pytest]...
#
# Python and fastce are built below build/free-threaded/, about ten minutes the first time.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD/build/free-threaded
seconds=20
tests=(tests)
if [ "${1:-}" = --quick ]; then
    shift
    seconds=0
    tests=(tests/test_values.py tests/test_threads.py)
fi
[ $# -eq 0 ] || tests=("$@")

python=$(tests/torture/free_threaded_python.sh plain)
PYTHONPATH=$(tests/torture/free_threaded_fastce.sh fastce)
export PYTHONPATH
# Tests that choose the path of a process of their own find the libraries beside this one.
python=$root/venv/bin/python
cd "$root/fastce"

# The modules declare that they need no lock; one that did not would switch it on when it is imported, with a warning.
"$python" -W error -c '
import sys, fastce
assert not sys._is_gil_enabled(), "importing fastce switched the interpreter lock on"
fastce.cross_entropy_with_grad([[2.0, 0.0]] * 50_000, [0] * 50_000, num_threads=2)
fastce.softmax([[2.0, 0.0]]), fastce.binary_cross_entropy([2.0], [1]), fastce.cross_entropy_stats([[2.0, 0.0]], [0])
assert not sys._is_gil_enabled(), "calling fastce switched the interpreter lock on"
print("interpreter lock: off after import and calls")'
"$python" tests/torture/shared_inputs.py --seconds "$seconds"

# Tests that start a process of their own gain nothing from doing so eight times at once; mpmath has one precision for
# all threads. pytest-run-parallel itself ends the run if anything switches the lock on.
failed=0
"$python" -X faulthandler -m pytest -q -p no:cacheprovider --parallel-threads=8 -o thread_unsafe_fixtures=run_python \
    -o 'thread_unsafe_functions=mpmath.*' "${tests[@]}" >"$root/suite.log" 2>&1 || failed=$?
grep -vE '^[·.se]+ +\[' "$root/suite.log" | tail -n 60
missing=$(tr '\n' ' ' <"$root/missing")
parallel=$(sed -n 's/^Collected \([0-9]*\) items to run in parallel$/\1/p' "$root/suite.log")
echo "result: $(tail -n 1 "$root/suite.log"); $parallel of the tests in 8 threads at once; lock off;" \
    "libraries without a wheel: ${missing:-none}"
exit $failed
