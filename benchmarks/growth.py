"""How time and memory grow with the batch, from a hundred logits to a billion: `python -m benchmarks.growth`."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from . import chart, machine
from .cases import OUT, Case, find, make_logits, make_targets
from .contenders import Job, fastce
from .report import format_time
from .timing import QUICK, Effort, Turns, take_turns

HERE = Path(__file__).parent
CLASSES = (10, 1000, 128256)
SIZES = [10**exponent for exponent in range(2, 10)]
# A batch's float32 logits and gradient; its ids, fastce's private copy of them and a float64 for each row.
BYTES_PER_LOGIT, BYTES_PER_ROW = 8, 24
STATUS = Path("/proc/self/status")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: a million logits at most")
    parser.add_argument("--threads", type=int, default=min(2, len(machine.cpus())))
    parser.add_argument("--save", type=Path, help="where the JSON goes; the chart lies beside it")
    parser.add_argument("--point", type=find, help=argparse.SUPPRESS)  # the one batch that a child process measures
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(arguments.point, arguments.threads, QUICK if arguments.quick else Effort())))
        return

    facts, points = machine.facts(), []
    for case in cases(most_bytes=10**7 if arguments.quick else available_bytes() // 2):
        points.append(point := measure_in_a_process(case, arguments))
        extra = "unknown" if point["extra_bytes"] is None else f"{point['extra_bytes'] / 1e6:.2f} MB"
        each = f"{point['ns_per_logit']:.3f} ns a logit"
        print(f"{case.name:>16}: {format_time(point['seconds']):>8}, {each:>18}, memory beyond: {extra}", flush=True)

    path = arguments.save or HERE / "results" / ("growth-quick.json" if arguments.quick else "growth.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"facts": facts, "threads": arguments.threads, "points": points}
    path.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    lines = {}
    for point in points:
        line = lines.setdefault(f"C = {point['classes']}", [])
        line.append((point["logits"], point["ns_per_logit"], point["extra_bytes"]))
    title = f"float32, loss and gradient with out, {arguments.threads} thread{'s' * (arguments.threads > 1)}"
    chart.growth(path.with_suffix(".svg"), title, lines, limit=("a second array of logits", 4))
    print(f"Saved: {path}, {path.with_suffix('.svg')}")


def cases(most_bytes):
    """Yield the batches that need `most_bytes` at most; the smallest of each number of classes is one row."""
    for classes in CLASSES:
        for rows in sorted({max(1, size // classes) for size in SIZES}):
            if rows * (classes * BYTES_PER_LOGIT + BYTES_PER_ROW) <= most_bytes:
                yield Case(rows, classes, "growth")


def available_bytes():
    """Return the memory that is free to use."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * _number(meminfo, "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def measure_in_a_process(case, arguments):
    """Each point has a process of its own, so that what one has allocated cannot hide what the next one needs."""
    command = [sys.executable, "-m", f"{__package__}.growth", "--point", case.name]
    command += ["--threads", str(arguments.threads)] + ["--quick"] * arguments.quick
    environment = machine.environment(arguments.threads)
    done = subprocess.run(command, env=environment, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{case.name} ended with status {done.returncode}")
    return json.loads(done.stdout)


def measure(case, threads, effort):
    """Return time and extra memory of one batch, loss and gradient with `out`."""
    machine.run_on(threads)
    small = Case(threads * 64, 1000, "starts the threads, so that their stacks are there before memory is counted")
    first_logits = make_logits(small, "float32")
    fastce(Job(first_logits, make_targets(small), np.empty_like(first_logits), OUT, threads)).call(first_logits)

    logits, targets = make_logits(case, "float32"), make_targets(case)
    out = np.empty_like(logits)
    out[:] = 0.0  # its pages are there before memory is counted, too
    step = fastce(Job(logits, targets, out, OUT, threads))
    extra = peak_beyond(lambda: step.call(logits))
    turns = Turns(step, logits, consumes=False, effort=effort)
    take_turns([turns], threads)
    point = {"rows": case.rows, "classes": case.classes, "logits": logits.size, "extra_bytes": extra}
    point |= turns.summary()
    return point | {"ns_per_logit": 1e9 * point["seconds"] / logits.size}


def peak_beyond(call):
    """Return how far the process's memory rises above its present size during a call; None where none can tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    except OSError:
        return None
    before = _number(STATUS, "VmRSS")
    call()
    return 1024 * max(0, _number(STATUS, "VmHWM") - before)


def _number(path, key):
    """Return the number after `key:` in a file of the kernel, in kB."""
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise ValueError(f"{path} has no {key}")


if __name__ == "__main__":
    main()
