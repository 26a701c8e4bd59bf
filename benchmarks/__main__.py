"""The paired comparison of fastce with its rivals: `python -m benchmarks`; see README.md for what it means."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from . import machine, report
from .cases import CASES, DTYPES, LOSS, MODES, OUT, QUICK_CASES, find
from .contenders import CONTENDERS, OURS

HERE = Path(__file__).parent


def main():
    arguments = parse()
    facts, records, failed = machine.facts(), [], []
    with tempfile.TemporaryDirectory() as folder:
        for threads in arguments.threads:
            measured, status = run(arguments, threads, Path(folder, f"{threads}.jsonl"))
            records += measured
            failed += [f"the measurement on {threads} thread(s) ended early, with status {status}"] * (status != 0)
    if not records:
        raise SystemExit("; ".join(failed))
    results = report.Results(facts, records)
    arguments.save.parent.mkdir(parents=True, exist_ok=True)
    results.save(arguments.save)
    picture, tables = report.write(results, arguments.save)
    if arguments.readme:
        report.update_readme(arguments.readme, results, picture)
    print(report.summary(results, picture))
    print(f"\nSaved: {arguments.save}, {picture}, {tables}")
    if failed:
        raise SystemExit("; ".join(failed))


def parse():
    def names(kind, choices=None):
        def split(text):
            parts = [part.strip() for part in text.split(",")]
            for part in parts:
                if choices and part not in choices:
                    raise argparse.ArgumentTypeError(f"{part!r} is none of: {', '.join(choices)}")
            return [kind(part) for part in parts]

        return split

    def shape(name):
        try:
            return find(name).name
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    available = len(machine.cpus())
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; its numbers mean nothing")
    parser.add_argument("--shapes", type=names(shape), help="as in 1024x10,2048x32000")
    parser.add_argument("--dtypes", type=names(str, DTYPES))
    parser.add_argument("--modes", type=names(str, MODES), help="any of: " + ", ".join(MODES))
    parser.add_argument("--threads", type=names(int), help="as in 1,2")
    parser.add_argument("--only", type=names(str, [c.name for c in CONTENDERS]), help="these beside fastce")
    parser.add_argument("--save", type=Path, help="where the JSON goes; tables and chart lie beside it")
    parser.add_argument("--readme", type=Path, help="replace the table between the marks in this file")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.shapes = arguments.shapes or [case.name for case in (QUICK_CASES if quick else CASES)]
    arguments.dtypes = arguments.dtypes or list(DTYPES[:1] if quick else DTYPES)
    arguments.modes = arguments.modes or list((LOSS, OUT) if quick else MODES)
    arguments.threads = arguments.threads or [1, 2][:available]
    # Compiling takes torch.compile tens of seconds, so a smoke run has it only when it is asked for by name.
    everyone = [c.name for c in CONTENDERS if not (quick and c.name == "torch.compile")]
    arguments.only = {OURS, *(arguments.only or everyone)}
    arguments.save = arguments.save or HERE / "results" / ("quick.json" if quick else "comparison.json")
    machine.check_threads(parser, arguments.threads)
    return arguments


def run(arguments, threads, records_path):
    """Measure on `threads` threads, in a process of its own; return the records and its exit status."""
    plan = {
        "threads": threads,
        "shapes": arguments.shapes,
        "dtypes": arguments.dtypes,
        "modes": arguments.modes,
        "contenders": sorted(arguments.only),
        "quick": arguments.quick,
    }
    plan_path = records_path.with_suffix(".plan")
    plan_path.write_text(json.dumps(plan))
    command = [sys.executable, "-m", f"{__package__}.measure", str(plan_path), str(records_path)]
    finished = subprocess.run(command, env=machine.environment(threads), cwd=HERE.parent)
    lines = records_path.read_text(encoding="utf-8").splitlines() if records_path.exists() else []
    return [json.loads(line) for line in lines], finished.returncode


if __name__ == "__main__":
    main()
