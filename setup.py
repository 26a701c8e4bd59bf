"""The compiled part of the build: one kernel source, one module per CPU target. Everything else is in pyproject.toml.

Environment at build time:
    FASTCE_OPENMP=auto|on|off   auto (default) probes the compiler and builds serial, with a message, if it has none
    FASTCE_DEBUG_CHECKS=1       turn Cython's own checks of bounds and None back on
    FASTCE_MODULES=rows_v3,...  build these modules alone (tests/torture/planted_faults.py)
    FASTCE_OPTIMIZATION=-O1     another level than -O3, where speed is not looked for (.ci/sanitize, .ci/packaging)
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("fastce/_kernels")
SOURCES = ("rows", "soft", "binary", "divergence", "probabilities", "passage")  # each compiled once per target
# Two-sum and the rounding to integers live on the order of operations, whatever CFLAGS say. These come first: gcc takes
# back -fno-trapping-math with -fno-unsafe-math-optimizations, and choices then are branches, not vectors.
FLAGS = ["-O3", "-fno-unsafe-math-optimizations", "-fno-associative-math"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden"]
# gcc stops inlining when a file has grown by 40 per cent or a large function to twice its size; an exponential that is
# called takes its loop out of vectors.
FLAGS += ["--param", "inline-unit-growth=400", "--param", "large-function-growth=2000"]
# What a debugger wants to know takes a quarter of the compiler's time and eight times the room; CFLAGS=-g asks for it.
SYMBOLS = [] if "-g" in shlex.split(os.environ.get("CFLAGS", "")) else ["-g0"]
OPTIMIZATION = os.environ.get("FASTCE_OPTIMIZATION", "-O3")  # of two levels the later one counts
# What a later -Ofast in the user's CFLAGS would break is refused by target.h; what -march=native there would break
# (a baseline that needs the builder's machine) is undone here: these flags come last.
TARGETS = {"baseline": []}
# Whoever can overwrite memory of the process finds neither a table of functions to write to nor a stack to run code on.
# The interpreter's own flags need not say so. Not -fstack-protector-strong, which those may bring (Debian's do): loops
# lose nothing by it, but calls of one or two short rows 2 to 10 per cent.
LINK_FLAGS = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack"] if sys.platform == "linux" else []
if platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32:
    TARGETS = {
        "baseline": ["-march=x86-64", "-mtune=generic"],
        "v3": ["-march=x86-64-v3", "-mtune=generic"],
        "v4": ["-march=x86-64-v4", "-mtune=generic", "-mprefer-vector-width=512"],
    }


def openmp_flags():
    """Return the OpenMP flags, or none where the compiler lacks it and FASTCE_OPENMP allows that."""
    wanted = os.environ.get("FASTCE_OPENMP", "auto")
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"FASTCE_OPENMP must be auto, on or off, got {wanted!r}")
    if wanted == "off":
        return []
    if compiles_openmp():
        return ["-fopenmp"]
    message = "the C compiler has no OpenMP"
    if wanted == "on":
        raise SystemExit(f"FASTCE_OPENMP=on, but {message}")
    print(f"fastce: {message}; building for one thread", file=sys.stderr)
    return []


def compiles_openmp():
    """Return whether a program that calls OpenMP compiles and links (it is not run: the target may be another CPU)."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, "-fopenmp", str(source), "-o", str(Path(folder, "probe"))]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def extension(module, source, target, openmp):
    """Return one compiled module of fastce._kernels."""
    return Extension(
        f"fastce._kernels.{module}",
        [str(KERNELS / source)],
        include_dirs=[str(KERNELS), numpy.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            ("FASTCE_OPENMP", "1" if openmp else "0"),
        ],
        extra_compile_args=[*FLAGS, *SYMBOLS, OPTIMIZATION, *TARGETS[target], *openmp],
        extra_link_args=[*LINK_FLAGS, *openmp],
        libraries=["m"] if os.name == "posix" else [],
        depends=["setup.py", *(str(path) for pattern in ("*.h", "*.pxd") for path in sorted(KERNELS.glob(pattern)))],
    )


def extensions():
    """Return the processor probe and one module per target; each target's C source has a build folder of its own."""
    checks = os.environ.get("FASTCE_DEBUG_CHECKS") == "1"
    directives = {
        "language_level": 3,
        "boundscheck": checks,
        "wraparound": False,
        "initializedcheck": checks,
        "nonecheck": checks,
        "cdivision": True,
        "embedsignature": True,
        "freethreading_compatible": True,
    }
    openmp = openmp_flags()
    wanted = os.environ.get("FASTCE_MODULES")
    built = []
    for target in TARGETS:
        modules = [(f"{source}_{target}", f"{source}.pyx") for source in SOURCES]
        modules += [("cpu", "cpu.pyx")] if target == "baseline" else []
        modules = [(module, source) for module, source in modules if not wanted or module in wanted.split(",")]
        # Side by side: Cython takes five seconds for a module of ours, and each step of a release asks for all of them.
        built += cythonize(
            [extension(module, source, target, openmp) for module, source in modules], build_dir=f"build/{target}",
            compiler_directives=directives, nthreads=(os.cpu_count() or 1) if sys.platform == "linux" else 0,
        )  # fmt: skip
    return built


class BuildKernels(build_ext):
    """Compile the modules side by side, as many as there are processors, and link them without run paths.

    The library folders of the interpreter that builds are not those of the one that imports.
    """

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or True  # as an option of setup() it would not reach editable installs

    def build_extensions(self):
        own = {flag for flag in shlex.split(sysconfig.get_config_var("LDSHARED") or "") if "-rpath" in flag}
        self.compiler.linker_so = [flag for flag in self.compiler.linker_so if flag not in own]
        super().build_extensions()


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
