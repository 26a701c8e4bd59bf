"""What a measurement depends on besides the code: the machine, the versions, and how many threads may run."""

import os
import platform
import sys
from datetime import date
from pathlib import Path

from .contenders import CONTENDERS, installed_version

BUSY = 0.5  # processes that wanted to run, on average over the last minute, before the measurement began


def cpus():
    """Return the CPUs that this process may use, one of every core first."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    allowed = sorted(os.sched_getaffinity(0))

    def is_second_thread_of_a_core(cpu):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        return siblings.exists() and int(siblings.read_text().replace("-", ",").split(",")[0]) != cpu

    return sorted(allowed, key=is_second_thread_of_a_core)


def run_on(threads):
    """Bind this process to `threads` CPUs; it is the only limit that JAX knows."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus()[:threads])


def check_threads(parser, threads):
    """End a program whose --threads are more than its CPUs."""
    available = len(cpus())
    if not all(1 <= number <= available for number in threads):
        parser.error(f"--threads must lie within 1 and the {available} CPUs that this process may use")


def environment(threads):
    """Return the environment of a process in which every library runs `threads` threads."""
    limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "FASTCE_NUM_THREADS")
    # JAX computes in float64 only when it is asked before it starts; float32 stays float32.
    return os.environ | dict.fromkeys(limits, str(threads)) | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}


def facts():
    """Return the machine, how busy it is and the versions, for the record; to be asked before the measurement."""
    import fastce

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load and load > BUSY:
        print(f"Other programs are running here (load {load:.2f}): these times will be off.", file=sys.stderr)
    versions = {"python": platform.python_version()}
    for contender in CONTENDERS:
        for package in contender.packages:
            versions[package] = installed_version(package) or "not installed"
    return {
        "date": date.today().isoformat(),
        "cpu": _processor(),
        "cpus": len(cpus()),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "caches": _caches(),
        "load_before": load,
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
        "fastce": fastce.build_info(),
    }


def describe(facts):
    """Return the facts in one line."""
    build, versions = facts["fastce"], facts["versions"]
    used = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()) if number != "not installed")
    caches = "".join(f", {name} {size}" for name, size in facts["caches"].items())
    return (
        f"{facts['cpu']}, {facts['cpus']} CPUs{caches}, {facts['memory_gb']} GB; {facts['system']}; "
        f"fastce target {build['target']}, OpenMP {'on' if build['openmp'] else 'off'}; {used}; {facts['date']}"
    )


def _processor():
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _caches():
    """Return the size of each data cache that the first CPU sees."""
    sizes = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (cache / "type").read_text().strip() != "Instruction":
            sizes["L" + (cache / "level").read_text().strip()] = (cache / "size").read_text().strip()
    return sizes
