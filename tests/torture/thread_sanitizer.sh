#!/usr/bin/env bash
# Call everything from eight threads under ThreadSanitizer; any race that is not in thread_sanitizer.suppressions fails.
#
#   tests/torture/thread_sanitizer.sh [--quick]
#
# CPython is instrumented, NumPy is not: what fastce and the interpreter read and write is seen. fastce is built twice,
# without OpenMP (races between callers alone) and with clang's, to which Archer explains what its barriers order; gcc's
# OpenMP would look like one race after another. Built below build/free-threaded/, a quarter of an hour the first time.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=$PWD/tests/torture
root=$PWD/build/free-threaded
version=19
seconds=60
[ "${1:-}" != --quick ] || seconds=0
SECONDS=0

missing=()
for package in clang-$version libclang-rt-$version-dev libomp-$version-dev llvm-$version; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    apt-get update -q >&2
    apt-get install -qy --no-install-recommends "${missing[@]}" >&2
fi

export CC=clang-$version CXX=clang++-$version
python=$("$here/free_threaded_python.sh" thread-sanitizer --with-thread-sanitizer)
cat "$root/source/Tools/tsan/suppressions_free_threading.txt" "$here/thread_sanitizer.suppressions" >"$root/suppressions"
# Each of the callers' threads keeps a pool of its own; one that spins while it waits would keep the others waiting.
export KMP_BLOCKTIME=0
export OMP_TOOL_LIBRARIES=/usr/lib/llvm-$version/lib/libarcher.so

# sanitize NAME COMMAND...: run it and put the reports into a folder of that name. Tests fork while threads run.
sanitize() {
    reports=$root/reports/$1
    shift
    rm -rf "$reports"
    mkdir -p "$reports"
    local options=(
        "suppressions=$root/suppressions" "log_path=$reports/report" die_after_fork=0 exitcode=0
        history_size=3 memory_limit_mb=6000 ignore_noninstrumented_modules=1 allocator_may_return_null=1
        "external_symbolizer_path=/usr/lib/llvm-$version/bin/llvm-symbolizer"
    )
    TSAN_OPTIONS=$(IFS=:; echo "${options[*]}") FASTCE_SANITIZED=1 "$@" >"$reports/output" 2>&1 ||
        { tail -n 30 "$reports/output"; echo "failed: $*"; failed=1; }
}

count_reports() { grep -s 'WARNING: ThreadSanitizer' "$reports"/report.* | wc -l || true; }

failed=0
found=0
seen=
for openmp in off on; do
    name=fastce-sanitized-openmp-$openmp
    # The interpreter that compiles is the plain one: under the sanitizer Cython would take ten times as long.
    PYTHONPATH=$(FASTCE_OPENMP=$openmp CFLAGS="-g -fsanitize=thread" LDFLAGS=-fsanitize=thread \
        "$here/free_threaded_fastce.sh" "$name")
    export PYTHONPATH
    cd "$root/$name"
    # First a race that is there: two threads fill one array. A tool that does not see it proves nothing by silence.
    sanitize "$openmp-race" "$python" tests/torture/shared_inputs.py --only race --seconds 1
    if ! grep -qs 'kernels.*take_batch' "$reports"/report.*; then
        echo "OpenMP $openmp: the planted race was not seen" >&2
        exit 1
    fi
    for part in 'first calls' steady ids; do
        sanitize "$openmp-${part/ /-}" "$python" tests/torture/shared_inputs.py --only "$part" --seconds "$seconds"
        echo "OpenMP $openmp: $(head -n 1 "$reports/output"), $(count_reports) reports"
        found=$((found + $(count_reports)))
    done
    sanitize "$openmp-tests" "$python" -m pytest -q -p no:cacheprovider tests/test_threads.py
    seen="$seen OpenMP $openmp: $(tail -n 1 "$reports/output"),"
    echo "OpenMP $openmp: $(tail -n 1 "$reports/output"), $(count_reports) reports"
    found=$((found + $(count_reports)))
done

echo "result: $found races, the planted ones found;$seen $SECONDS seconds"
[ $failed -eq 0 ] && [ "$found" -eq 0 ]
