#!/usr/bin/env bash
# Build fastce for free-threaded Python in build/free-threaded/NAME, a copy of the working tree; print what PYTHONPATH
# then has to be for it and all that its tests import.
#
#   tests/torture/free_threaded_fastce.sh NAME
#
# Only what has changed is compiled; CC, CFLAGS, LDFLAGS and FASTCE_OPENMP count as always. The libraries of the extra
# "test" that offer no wheel are listed in build/free-threaded/missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=$1
root=$PWD/build/free-threaded
python=$root/venv/bin/python

install_libraries() {
    # The compiler of the modules is not that of the interpreter.
    "$(env -u CC -u CXX tests/torture/free_threaded_python.sh plain)" -m venv --clear "$root/venv"
    local pip=("$python" -m pip install -q --only-binary :all:) library
    "${pip[@]}" "setuptools>=77" "cython>=3.1,<4" "numpy>=2.1" "pytest>=8" pytest-run-parallel
    : >"$root/missing"
    "$python" -c 'import tomllib
for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"]: print(line)' |
        while read -r library; do "${pip[@]}" "$library" || echo "$library" >>"$root/missing"; done
    touch "$root/venv/complete"
}

build() {
    [ -e "$root/venv/complete" ] || install_libraries
    mkdir -p "$root/$name"
    # With their times, so that only what has changed is compiled.
    git ls-files -z | tar --null -T - -c | tar -x -C "$root/$name"
    cd "$root/$name"
    "$python" setup.py -q egg_info build_ext --inplace
}

mkdir -p "$root"
build >"$root/$name.log" 2>&1 || { tail -n 40 "$root/$name.log" >&2; exit 1; }
echo "$root/$name:$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
