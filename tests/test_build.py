"""The build is what it says: targets, machine code, and a process whose floating-point modes are left alone."""

import ast
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

import fastce

INFO = fastce.build_info()
X86_64 = platform.machine() in ("x86_64", "AMD64")
ON_X86_64 = pytest.mark.skipif(not X86_64, reason="x86-64's machine code")


def module_path(target):
    return Path(importlib.util.find_spec(f"fastce._kernels.rows_{target}").origin)


def run_tool(*command, check=True):
    """Run a compiler or its like, without the libraries that a sanitizer's run loads into every process."""
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, capture_output=True, text=True, check=check, env=env)


def inspect(path, *options):
    """What objdump says of a compiled module."""
    return run_tool("objdump", *options, str(path)).stdout


@pytest.fixture
def objdump():
    if shutil.which("objdump") is None:
        pytest.skip("objdump, of GNU binutils, is not installed")
    if "__asan_" in inspect(module_path("baseline"), "-T"):
        pytest.skip("the machine code of a build for the address sanitizer is another")


# What build_info says


def test_build_info_has_the_documented_entries():
    assert set(INFO) == {"version", "target", "available_targets", "built_targets", "openmp", "num_threads"}
    assert INFO["version"] == fastce.__version__ == version("fastce")
    assert type(INFO["openmp"]) is bool
    assert type(INFO["num_threads"]) is int and INFO["num_threads"] >= 1
    assert INFO["target"] in INFO["available_targets"]
    assert set(INFO["available_targets"]) <= set(INFO["built_targets"])
    assert "baseline" in INFO["available_targets"]


def test_the_targets_of_this_architecture_are_built():
    assert set(INFO["built_targets"]) == ({"baseline", "v3", "v4"} if X86_64 else {"baseline"})
    for target in INFO["built_targets"]:
        assert module_path(target).suffix in (".so", ".pyd")


def test_build_info_is_a_copy():
    fastce.build_info().clear()
    assert fastce.build_info()["version"] == fastce.__version__


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads Linux's /proc/cpuinfo")
@ON_X86_64
def test_available_targets_are_those_of_this_processor():
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    expected = {"baseline"}
    if {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"} <= flags:
        expected.add("v3")
        if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
            expected.add("v4")
    assert set(INFO["available_targets"]) == expected


def test_the_package_is_typed_and_free_for_all_uses():
    assert (Path(fastce.__file__).parent / "py.typed").exists()
    assert metadata("fastce")["License-Expression"] == "BSD-3-Clause"


# Machine code


@ON_X86_64
@pytest.mark.parametrize(("target", "register"), [("v3", "ymm"), ("v4", "zmm")])
@pytest.mark.parametrize("kind", ["ps", "pd"])
def test_kernels_hold_packed_fused_multiply_adds(target, register, kind, objdump):
    code = inspect(module_path(target), "-d", "--no-show-raw-insn")
    fused = re.findall(rf"vfn?m(?:add|sub)\d+{kind}\s.*%{register}\d", code)
    # At least the polynomial of one exp.
    assert len(fused) >= 6


@ON_X86_64
@pytest.mark.parametrize(("target", "absent"), [("baseline", "ymm"), ("baseline", "zmm"), ("v3", "zmm")])
def test_no_target_uses_registers_beyond_its_own(target, absent, objdump):
    assert f"%{absent}" not in inspect(module_path(target), "-d", "--no-show-raw-insn")


@ON_X86_64
@pytest.mark.parametrize("target", INFO["built_targets"])
def test_the_exponential_is_inlined_everywhere(target, objdump):
    symbols = inspect(module_path(target), "-t")
    assert "take_batch" in symbols, "stripped: nothing can be seen"
    assert "exp_shifted" not in symbols, "a call for every element keeps its loop from being taken in vectors"
    assert "multiply_add" not in symbols


def test_the_flags_free_choices_from_branches():
    # Each of gcc's flags may take back an earlier one; choices that might trap are branches and their loops scalar.
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    if "gcc" not in run_tool(*compiler, "--version").stdout.lower():
        pytest.skip("only gcc tells which of its optimizations are on")
    setup = ast.parse(Path(__file__).parents[1].joinpath("setup.py").read_text())
    parts = [node for node in setup.body if ast.unparse(node).startswith(("FLAGS = ", "FLAGS += "))]
    flags = [flag for part in parts for flag in ast.literal_eval(part.value)]
    listed = run_tool(*compiler, *flags, "-Q", "--help=optimizers").stdout
    states = dict(line.split() for line in listed.splitlines() if len(line.split()) == 2)
    assert states["-ftrapping-math"] == states["-fassociative-math"] == states["-fmath-errno"] == "[disabled]"
    assert states["-fsigned-zeros"] == "[enabled]"


def test_no_module_sets_fast_math(objdump):
    for target in INFO["built_targets"]:
        assert "set_fast_math" not in inspect(module_path(target), "-t")
        # ldmxcsr is the one instruction that changes the modes; vzeroupper and its like do not.
        assert "ldmxcsr" not in inspect(module_path(target), "-d", "--no-show-raw-insn")


def test_fast_math_does_not_compile(tmp_path):
    header = Path(__file__).parents[1] / "fastce" / "_kernels" / "target.h"
    source = tmp_path / "two_lines.c"
    source.write_text(f'#include "{header}"\nint main(void) {{ return 0; }}\n')
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    includes = f"-I{sysconfig.get_paths()['include']}"
    command = [*compiler, includes, "-c", str(source), "-o", str(tmp_path / "two_lines.o")]
    assert run_tool(*command).returncode == 0
    for flag in ("-ffast-math", "-Ofast", "-ffinite-math-only"):
        refused = run_tool(*command, flag, check=False)
        assert refused.returncode != 0 and "#error" in refused.stderr and "fast-math" in refused.stderr


COMPILERS = ["cc", "gcc", "clang", *(f"clang-{version}" for version in range(14, 22))]


@pytest.mark.parametrize("compiler", [name for name in COMPILERS if shutil.which(name)])
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3", "x86-64-v4", None] if X86_64 else [None])
@pytest.mark.parametrize("name", ["target.h", "passage.h"])
def test_what_cython_cannot_say_is_c_for_every_compiler_that_is_here(compiler, name, march, tmp_path):
    # None: as other processors see it, whose code must not rot where nobody has one.
    text = (Path(__file__).parents[1] / "fastce" / "_kernels" / name).read_text()
    header = tmp_path / name
    header.write_text(text.replace("__x86_64__", "__elsewhere__") if march is None else text)
    options = [] if march is None else [f"-march={march}"]
    run_tool(compiler, *options, "-fsyntax-only", "-x", "c", str(header))


# Hardening


def modules():
    """The names of all compiled modules of this build."""
    kinds = "rows", "soft", "binary", "divergence", "probabilities", "passage"
    return ["cpu", *(f"{kind}_{target}" for kind in kinds for target in INFO["built_targets"])]


@pytest.fixture
def readelf():
    """A function from a module's name and readelf's options to what it says."""
    if shutil.which("readelf") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs readelf, of GNU binutils, and modules in its format")

    def read(module, *options):
        origin = importlib.util.find_spec(f"fastce._kernels.{module}").origin
        return run_tool("readelf", "-W", *options, origin).stdout

    return read


@pytest.mark.parametrize("module", modules())
def test_no_memory_of_a_module_is_both_written_and_run(module, readelf):
    segments = [line.split() for line in readelf(module, "-l").splitlines() if re.match(r"\s+(LOAD|GNU_STACK)\s", line)]
    flags = ["".join(words[6:-1]) for words in segments]
    assert len(flags) >= 3 and all(re.fullmatch("R?W?E?", flag) for flag in flags)
    assert not [flag for flag in flags if "W" in flag and "E" in flag]
    assert "E" not in flags[[words[0] for words in segments].index("GNU_STACK")]


@pytest.mark.parametrize("module", modules())
def test_what_is_bound_when_a_module_is_loaded_is_read_only_afterwards(module, readelf):
    assert re.search(r"^\s+GNU_RELRO\s", readelf(module, "-l"), re.MULTILINE)
    assert re.search(r"\((FLAGS|FLAGS_1|BIND_NOW)\).*\bNOW|BIND_NOW", readelf(module, "-d"))


@pytest.mark.parametrize("module", modules())
def test_a_module_names_no_folder_and_needs_no_relocation_of_code(module, readelf):
    # A run path is a folder of whoever built: others might put a library there.
    dynamic = readelf(module, "-d")
    assert "(SONAME)" in dynamic or "(NEEDED)" in dynamic
    for entry in ("RPATH", "RUNPATH", "TEXTREL"):
        assert f"({entry})" not in dynamic


# The state of the process

MODES = """
import ctypes, mmap
import numpy as np

page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes([0x0F, 0xAE, 0x1F, 0xC3, 0, 0, 0, 0]))  # stmxcsr [rdi]; ret
page.write(bytes([0x0F, 0xAE, 0x17, 0xC3]))  # ldmxcsr [rdi]; ret
start = ctypes.addressof(ctypes.c_char.from_buffer(page))
store = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))(start)
load = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))(start + 8)

def modes():
    word = ctypes.c_uint32()
    store(ctypes.byref(word))
    return word.value & ~0x3F  # without the flags that any inexact result raises

def calls():
    for shape in ((60_000, 10), (300, 1000), (3, 100_000)):
        for dtype in (np.float32, np.float64):
            logits = np.full(shape, 1e-40, dtype)
            logits[0, 0] = np.nan
            for num_threads in (1, 2):
                fastce.cross_entropy(logits, np.zeros(shape[0], int), num_threads=num_threads)
                fastce.cross_entropy_with_grad(logits, np.zeros(shape[0], int), num_threads=num_threads)

before = modes()
import fastce
assert modes() == before, "import changed the floating-point modes"
calls()
assert modes() == before, "a call changed the floating-point modes"

flushing = ctypes.c_uint32(before | 0x8040)  # subnormal results and operands are zero
load(ctypes.byref(flushing))
assert modes() == flushing.value & ~0x3F
calls()
assert modes() == flushing.value & ~0x3F, "a call changed the floating-point modes that were set"
"""


@ON_X86_64
@pytest.mark.skipif(os.name != "posix", reason="passes arguments as POSIX systems do")
@pytest.mark.parametrize("target", INFO["available_targets"])
def test_floating_point_modes_are_left_alone(target, run_python):
    run_python("-c", MODES, FASTCE_TARGET=target)


SUBNORMAL = """
import sys, warnings
import numpy as np
import fastce

warnings.simplefilter("error")
fastce.cross_entropy_with_grad(np.zeros((60_000, 10), np.float32), np.zeros(60_000, int))
assert sys.float_info.min / 2 > 0
assert np.float32(1.2e-38) / np.float32(4) > 0
assert np.finfo(np.float32).smallest_subnormal > 0
"""


@pytest.mark.parametrize("target", INFO["available_targets"])
def test_subnormal_numbers_exist_after_import_and_a_call(target, run_python):
    run_python("-c", SUBNORMAL, FASTCE_TARGET=target)


def test_import_brings_numpy_and_nothing_else(run_python):
    code = """
import sys
import numpy
known = set(sys.modules)
import fastce
print(*sorted({name.split(".")[0] for name in set(sys.modules) - known}))
"""
    third_party = set(run_python("-c", code).stdout.split()) - sys.stdlib_module_names
    # Compiled modules keep what they share under names of Cython's own.
    assert {name for name in third_party if "cython" not in name} <= {"numpy", "fastce"}
