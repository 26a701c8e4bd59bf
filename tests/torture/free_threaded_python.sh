#!/usr/bin/env bash
# Build a free-threaded CPython 3.13 in build/free-threaded/NAME, once, and print the path of its interpreter.
#
#   tests/torture/free_threaded_python.sh NAME [VARIABLE=VALUE | configure option]...
#
# The source is Debian trixie's, fetched with a package list of its own: the machine's apt is left as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=$1
shift
root=$PWD/build/free-threaded
python=$root/$name/bin/python3.13t
log=$root/$name.log

fetch_source() {
    mkdir -p "$root"/apt/{state/lists/partial,cache/archives/partial}
    cat >"$root/apt/trixie.sources" <<'SOURCES'
Types: deb-src
URIs: http://deb.debian.org/debian
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
    local private=(-qq -o "Dir::Etc::SourceList=$root/apt/trixie.sources" -o Dir::Etc::SourceParts=/dev/null)
    private+=(-o "Dir::State=$root/apt/state" -o "Dir::Cache=$root/apt/cache" -o APT::Sandbox::User=root)
    cd "$root/apt"
    apt-get "${private[@]}" update
    apt-get "${private[@]}" source --download-only python3.13
    rm -rf "$root/source.part"
    # Without Debian's patches: they divide the standard library into packages and take ensurepip away. apt has checked
    # the signatures.
    dpkg-source --no-check --skip-patches -x python3.13_*.dsc "$root/source.part"
    mv "$root/source.part" "$root/source"
    cd -
}

build() {
    local missing=()
    for package in build-essential dpkg-dev libbz2-dev libffi-dev liblzma-dev libssl-dev zlib1g-dev; do
        dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        apt-get update -q
        apt-get install -qy --no-install-recommends "${missing[@]}"
    fi
    [ -d "$root/source" ] || fetch_source
    rm -rf "$root/$name.part" "${root:?}/$name"
    mkdir -p "$root/$name.part"
    cd "$root/$name.part"
    "$root/source/configure" -q --prefix="$root/$name" --disable-gil --disable-test-modules --with-ensurepip=install "$@"
    make -s -j"$(nproc)"
    make -s install
    cd "$root"
    rm -rf "$root/$name.part"
}

if ! [ -e "$root/$name/complete" ]; then
    mkdir -p "$root"
    build "$@" >"$log" 2>&1 || { tail -n 40 "$log" >&2; exit 1; }
    touch "$root/$name/complete"
fi
echo "$python"
