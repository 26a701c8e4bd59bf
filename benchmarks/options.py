"""What each option, target kind and further function costs, against its aim: `python -m benchmarks.options`."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from . import agreement, machine
from .cases import DTYPES, FRESH
from .contenders import Job, Step, _torch_style, installed_version, torch_eager
from .counterparts import COUNTERPARTS
from .lines import IGNORED, PLAIN, PLAIN_ROWS, Batch, Group, Line, at_least, at_most, half, ours
from .report import format_ratio, format_time, on, save_with_table
from .timing import QUICK, Effort, Turns, take_turns

HERE = Path(__file__).parent
# More turns than the comparison takes: some aims are 5 per cent.
EFFORT = Effort(rounds=31, seconds=2.0)
# The half types are rounded once more, by both, from numbers that differ a little; float16 has few bits left where a
# mean over many rows makes its gradient subnormal.
TOLERANCE = agreement.TOLERANCE | {"float16": (2e-3, 2e-3), "bfloat16": (1.6e-2, 1e-6)}


def half_line(dtype, package):
    load = half(dtype)
    return ours(f"{dtype} logits", load=load, out=lambda b: load(b.out), packages=(package,), dtypes=("float32",))


SEVERAL = {
    "targets": lambda b: b.ignoring(b.shown_targets),
    "ignore_index": IGNORED,
    "num_threads": lambda b: b.threads,
    "weight": lambda b: b.class_weight,
    "sample_weight": lambda b: b.row_numbers,
    "grad_output": 0.5,
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "logit_scale": 0.7,
    "softcap": 30.0,
    "class_mask": lambda b: b.class_mask,
}

OPTIONS = (
    ours(PLAIN),
    ours("plain, once more"),
    ours("num_threads", num_threads=lambda b: b.threads),
    ours("ignore_index, none ignored", at_most(1.05), ignore_index=IGNORED),
    ours("ignore_index, 10 % ignored", at_most(1.05), targets=lambda b: b.partly_ignored, ignore_index=IGNORED),
    ours("sample_weight", at_most(1.05), sample_weight=lambda b: b.row_numbers),
    ours("grad_output", at_most(1.05), grad_output=0.5),
    ours(PLAIN_ROWS, reduction="none"),
    ours(
        "grad_output (N,), reduction none", at_most(1.05), against=PLAIN_ROWS, reduction="none",
        grad_output=lambda b: b.row_numbers,
    ),
    ours("weight", at_most(1.15), weight=lambda b: b.class_weight),
    ours("label_smoothing", at_most(1.15), label_smoothing=0.1),
    ours("weight, label_smoothing", weight=lambda b: b.class_weight, label_smoothing=0.1),
    ours("z_loss", at_most(1.15), z_loss=1e-4),
    ours("logit_scale", at_most(1.15), logit_scale=0.7),
    ours("softcap", softcap=30.0),
    ours("class_mask (C,)", at_most(1.3), targets=lambda b: b.shown_targets, class_mask=lambda b: b.class_mask),
    ours("class_mask (N, C)", class_mask=lambda b: b.entry_mask),
    ours("all of these", **SEVERAL),
    ours("distributions", at_most(1.7), targets=lambda b: b.distributions),
    ours("SparseTargets, 2 a row", targets=lambda b: b.sparse_targets),
    ours(
        "with Hessian", at_most(1.4), function="cross_entropy_with_grad_hess", hess_out=lambda b: np.zeros_like(b.out)
    ),
    ours("focal_loss_with_grad", function="focal_loss_with_grad"),
    half_line("float16", "numpy"),
    half_line("bfloat16", "ml_dtypes"),
)  # fmt: skip

STATISTICS = (
    ours(PLAIN_ROWS, against=PLAIN_ROWS, function="cross_entropy", reduction="none", out=None),
    ours("cross_entropy_stats", at_most(1.1), against=PLAIN_ROWS, function="cross_entropy_stats", out=None),
)


def with_classes_second(logits):
    return np.ascontiguousarray(np.moveaxis(logits, -1, 1))


def torch_classes_second(batch, module):
    step = torch_eager(Job(batch.logits, batch.targets, batch.out, FRESH, batch.threads))
    return Step(step.call, lambda logits: step.load(with_classes_second(logits)))


LAST, SECOND = "class axis last", "class axis 1"
CLASS_AXIS = (
    ours(LAST, against=LAST),
    ours(
        SECOND, at_most(1.5), against=LAST, axis=1, load=with_classes_second,
        out=lambda b: with_classes_second(np.zeros_like(b.logits)),
    ),
    Line("PyTorch", torch_classes_second, SECOND, at_least(5), like=SECOND, packages=("torch",)),
)  # fmt: skip


def scipy_function(name):
    def prepare(batch, module):
        import scipy.special

        function = getattr(scipy.special, name)
        return Step(lambda logits: function(logits, axis=-1))

    return Line(f"SciPy's {name}", prepare, name, at_least(4), like=name, packages=("scipy",))


def torch_function(name):
    def prepare(batch, module):
        import torch

        torch.set_num_threads(batch.threads)
        function, out = getattr(torch, name), torch.from_numpy(batch.out)
        return Step(lambda logits: function(logits, -1, out=out), torch.from_numpy)

    return Line(f"PyTorch's {name}", prepare, name, like=name, packages=("torch",))


ACTIVATIONS = tuple(
    line
    for name in ("softmax", "log_softmax")
    for line in (ours(name, against=name, function=name, targets=None), scipy_function(name), torch_function(name))
)


def torch_binary(batch, module):
    from torch.nn.functional import binary_cross_entropy_with_logits

    step = _torch_style(
        binary_cross_entropy_with_logits, Job(batch.logits, batch.labels, batch.out, FRESH, batch.threads)
    )
    return Step(step.call, lambda logits: step.load(entries(logits)))


def entries(logits):
    """Return the logits of a batch of one class without the class axis."""
    return logits[..., 0]


BINARY_NAME = "binary_cross_entropy_with_grad"
BINARY = (
    ours(
        BINARY_NAME, against=BINARY_NAME, function=BINARY_NAME, load=entries, targets=lambda b: b.labels,
        out=lambda b: entries(b.out),
    ),
    Line("PyTorch", torch_binary, BINARY_NAME, at_least(5), like=BINARY_NAME, packages=("torch",)),
)  # fmt: skip


CALL = (8, 10)  # nothing but the cost of a call
SHAPES = ((1024, 10), (65536, 10), (1024, 1000), (2048, 32000))
GROUPS = (
    Group("options", "Options and targets: loss and gradient with `out`", OPTIONS, (CALL, *SHAPES), unaimed=(CALL,)),
    Group("statistics", "Statistics and the loss of every row", STATISTICS, (CALL, *SHAPES), unaimed=(CALL,)),
    Group(
        "axis", "The class axis second, as in images: loss and gradient with `out`", CLASS_AXIS, ((16, 256, 256, 21),),
        ((2, 8, 8, 5),),
    ),
    Group("activations", "Softmax and log-softmax with `out`", ACTIVATIONS, ((1024, 10), (1024, 1000), (2048, 32000))),
    Group(
        "binary", "Sigmoid cross-entropy: loss and gradient with `out`", BINARY, ((1000, 1), (1_000_000, 1)),
        ((1000, 1),),
    ),
    Group(
        "counterparts", "What PyTorch's users write for the rest of the surface: loss and gradient, or values",
        COUNTERPARTS, (CALL, (1024, 10), (1024, 1000), (256, 32000)),
    ),
)  # fmt: skip


def measure(group, shape, dtype, threads, effort):
    """Return a record of every line: verified on a small batch, then timed in turns with the others."""
    batch = Batch(shape, dtype, threads)
    lines = [line for line in group.lines if dtype in line.dtypes]
    problems = {line.name: problem_of(line, lines, batch) for line in lines}
    turns = {}
    for line in lines:
        if not problems[line.name] and not problems.get(line.against):  # no ratio without the other time
            turns[line.name] = Turns(prepare(line, batch), batch.logits, consumes=False, effort=effort)
    take_turns(turns.values(), threads)

    records = []
    for line in lines:
        record = {"group": group.name, "shape": name_of(shape), "dtype": dtype, "threads": threads, "line": line.name}
        record |= {"against": line.against, "aim": str(line.aim or ""), "problem": problems[line.name]}
        if line.name in turns:
            record |= turns[line.name].summary()
        if line.name in turns and line.against in turns:
            record |= compare(turns[line.name], turns[line.against], line.aim if shape not in group.unaimed else None)
        records.append(record)
    return records


def compare(turns, others, aim):
    """Return the median and quartiles of the ratio within a round, so that a machine that slows down slows both.

    The ratio of the fastest turns goes with them: on a busy machine it is the one that other programs disturb least.
    """
    ratios = [ours / theirs for ours, theirs in zip(turns.seconds, others.seconds, strict=False)]
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "ratio": float(ratio),
        "ratio_quartiles": [float(low), float(high)],
        "ratio_of_fastest": min(turns.seconds) / min(others.seconds),
        "holds": bool(aim.holds(ratio)) if aim else None,
    }


def prepare(line, batch):
    import fastce

    return line.prepare(batch, fastce)


def problem_of(line, lines, batch):
    """Return why a line has no time, or None: its results on a small batch must be those of the reference."""
    from fastce import reference

    if missing := [package for package in line.packages if installed_version(package) is None]:
        return f"not installed ({', '.join(missing)})"
    judge = next(other for other in lines if other.name == (line.like or line.name))
    small, same = batch.small(), batch.small()  # two, so that nothing is shared but the numbers
    try:
        step, truth = prepare(line, small), judge.prepare(same, reference)
        result, expected = step.call(step.load(small.logits)), truth.call(truth.load(same.logits))
    except Exception as error:  # what breaks is named in the report; it does not end the measurement
        return f"failed: {type(error).__name__}: {error}".partition("\n")[0]
    return difference(result, expected, batch.dtype)


def difference(result, expected, dtype):
    """Return where a result, an array or a tuple of them, differs from what is expected, or None."""
    pairs = list(zip(as_arrays(result), as_arrays(expected), strict=True))
    names = {dtype, *(array.dtype.name for pair in pairs for array in pair)}
    relative, absolute = max(TOLERANCE[name] for name in names & TOLERANCE.keys())
    for place, (got, exact) in enumerate(pairs):
        if got.shape != exact.shape:
            return f"result {place} has the shape {got.shape}, not {exact.shape}"
        got, exact = got.astype(np.float64), exact.astype(np.float64)
        size = np.abs(exact)
        allowed = relative * size + absolute * size.max(initial=0.0, where=np.isfinite(size))
        gap = np.abs(got - exact)
        if not ((gap <= allowed) | (got == exact)).all():
            return f"disagrees with the reference in result {place}, by up to {gap.max():.3g}"
    return None


def as_arrays(result):
    return [np.asarray(part) for part in (result if isinstance(result, tuple) else (result,))]


def name_of(shape):
    return "x".join(map(str, shape))


def report(facts, records):
    """Return the Markdown report: the aims that are missed, then a table for every group and setting."""
    settings = dict.fromkeys((record["group"], record["dtype"], record["threads"]) for record in records)
    parts = [
        "# What options cost",
        "Medians of the ratios within a round (quartiles in brackets); **bold**: the aim does not hold there.",
        verdict(records),
        problems(records),
        f"Measured on: {machine.describe(facts)}; load before: {facts['load_before']}.",
    ]
    for group in GROUPS:
        for setting in settings:
            if setting[0] == group.name:
                parts += [f"## {group.title}; {setting[1]}, {on(setting[2])}", table(records, setting)]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(records):
    aimed = [record for record in records if record.get("holds") is not None]
    missed = [record for record in aimed if not record["holds"]]
    lines = [f"{len(aimed) - len(missed)} of {len(aimed)} ratios that have an aim hold it.", ""]
    for record in missed:
        where = f"{record['shape']} {record['dtype']}, {on(record['threads'])}"
        lines.append(f"- {record['line']}, {where}: {ratio_of(record)} of {record['against']}, aim {record['aim']}")
    return "\n".join(lines).rstrip()


def problems(records):
    found = dict.fromkeys((record["line"], record["problem"]) for record in records if record["problem"])
    return "\n".join(f"- {line} has no time: {problem}" for line, problem in found)


def table(records, setting):
    """Return the table of one group, dtype and number of threads: a line a row, a shape a column."""
    of_setting = [r for r in records if (r["group"], r["dtype"], r["threads"]) == setting]
    shapes = list(dict.fromkeys(record["shape"] for record in of_setting))
    found = {(record["line"], record["shape"]): record for record in of_setting}
    rows = [["", "time over that of", "aim", *shapes, "holds"]]
    for line in dict.fromkeys(record["line"] for record in of_setting):
        cells = [found[line, shape] for shape in shapes if (line, shape) in found]
        verdicts = {cell["shape"]: cell["holds"] for cell in cells if cell.get("holds") is not None}
        texts = [cell_text(found.get((line, shape), {})) for shape in shapes]
        rows.append([line, cells[0]["against"] or "", cells[0]["aim"], *texts, holds_text(verdicts)])
    heads, *rows = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([heads, "|---|---|---|" + "--:|" * len(shapes) + "---|", *rows])


def cell_text(record):
    if "ratio" not in record:
        return format_time(record["seconds"]) if "seconds" in record else "–"
    low, high = record["ratio_quartiles"]
    text = f"{ratio_of(record)} ({low:.2f}–{high:.2f})"
    return f"**{text}**" if record["holds"] is False else text


def ratio_of(record):
    ratio = record["ratio"]
    return f"{ratio:.2f}x" if ratio < 10 else format_ratio(ratio)


def holds_text(verdicts):
    missed = [shape for shape, holds in verdicts.items() if not holds]
    if not missed:
        return "yes" if verdicts else ""
    return "no" if len(missed) == len(verdicts) else "not " + ", ".join(missed)


def main():
    arguments = parse()
    if arguments.measure:
        measure_all(arguments)
        return
    facts, records, failed = machine.facts(), [], []
    facts["versions"]["ml_dtypes"] = installed_version("ml_dtypes") or "not installed"
    for threads in arguments.threads:
        measured, status = measure_in_a_process(threads, arguments)
        records += measured
        failed += [f"the measurement on {on(threads)} ended early, with status {status}"] * (status != 0)
    save_with_table(arguments.save, facts, records, report(facts, records))
    if failed:
        raise SystemExit("; ".join(failed))


def parse():
    available = len(machine.cpus())
    names = [group.name for group in GROUPS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; its numbers mean nothing")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2][:available], help="as in 1 2")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:1])
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these groups")
    parser.add_argument("--save", type=Path, help="where the JSON goes; the table lies beside it")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # in a process for its threads
    arguments = parser.parse_args()
    name = "quick.options.json" if arguments.quick else "options.json"
    arguments.save = arguments.save or HERE / "results" / name
    machine.check_threads(parser, arguments.threads)
    return arguments


def measure_in_a_process(threads, arguments):
    """Return the records measured on `threads` threads in a process of its own, and its exit status."""
    command = [sys.executable, "-m", f"{__package__}.options", "--measure", "--threads", str(threads)]
    command += ["--dtypes", *arguments.dtypes, "--only", *arguments.only] + ["--quick"] * arguments.quick
    environment = machine.environment(threads)
    done = subprocess.run(command, env=environment, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


def measure_all(arguments):
    """Print a JSON record a line of everything asked for, on the one number of threads of this process."""
    (threads,) = arguments.threads
    machine.run_on(threads)
    for group in GROUPS:
        if group.name not in arguments.only:
            continue
        for dtype in arguments.dtypes:
            for shape in group.quick_shapes if arguments.quick else group.shapes:
                print(f"  {on(threads)}: {group.name}, {name_of(shape)} {dtype}", file=sys.stderr, flush=True)
                for record in measure(group, shape, dtype, threads, QUICK if arguments.quick else EFFORT):
                    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
