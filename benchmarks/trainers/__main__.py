"""Which trainer are you in, and what does fastce's loss gain there? One process a library and number of threads."""

import argparse
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from .. import machine
from ..contenders import Step, installed_version
from ..report import format_ratio, format_time, on, save_with_table
from ..timing import QUICK, Effort, Turns, take_turns
from .case import FASTCE

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
LIBRARIES = sorted(path.stem for path in HERE.glob("[a-z]*.py") if path.stem != "case")
EFFORT = Effort(rounds=15, seconds=6.0, fewest=5)


def main():
    arguments = parse()
    if arguments.measure:
        measure_all(arguments)
        return
    facts, records = machine.facts(), []
    for library in arguments.only:
        for package in import_module(f"{__package__}.{library}").PACKAGES:
            facts["versions"][package] = installed_version(package) or "not installed"
        for threads in arguments.threads:
            records += measure_in_a_process(library, threads, arguments.quick)
    save_with_table(arguments.save, facts, records, report(facts, records))
    if wrong := [record["problem"] for record in records if record["problem"] and not record["missing"]]:
        raise SystemExit("; ".join(wrong))


def parse():
    available = len(machine.cpus())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; its numbers mean nothing")
    parser.add_argument("--threads", type=int, nargs="+", default=[available], help="as in 1 2")
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=LIBRARIES, help="these libraries")
    parser.add_argument("--save", type=Path, help="where the JSON goes; the table lies beside it")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # in a process for its threads
    arguments = parser.parse_args()
    name = "quick.trainers.json" if arguments.quick else "trainers.json"
    arguments.save = arguments.save or RESULTS / name
    machine.check_threads(parser, arguments.threads)
    return arguments


def measure_in_a_process(library, threads, quick):
    """Return the records of one library, measured in a process of its own."""
    command = [sys.executable, "-m", __package__, "--measure", "--only", library, "--threads", str(threads)]
    environment = machine.environment(threads)
    done = subprocess.run(
        command + ["--quick"] * quick, env=environment, cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True
    )
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        problem = f"the measurement of {library} ended early, with status {done.returncode}"
        records.append({"library": library, "threads": threads, "problem": problem, "missing": False})
    return records


def measure_all(arguments):
    """Print a JSON record a line of every case of the one library, on the one number of threads, of this process."""
    (threads,), (name,) = arguments.threads, arguments.only
    machine.run_on(threads)
    library = import_module(f"{__package__}.{name}")
    start = {"library": library.NAME, "threads": threads, "problem": None, "missing": False}
    if missing := [package for package in library.PACKAGES if installed_version(package) is None]:
        print(json.dumps(start | {"problem": f"not installed ({', '.join(missing)})", "missing": True}))
        return
    for case in library.cases(arguments.quick, threads):
        print(f"  {on(threads)}: {library.NAME}, {case.task}", file=sys.stderr, flush=True)
        record = start | measure(case, threads, QUICK if arguments.quick else EFFORT)
        print(json.dumps(record), flush=True)


def measure(case, threads, effort):
    """Return a case's record: verified, then timed by turns."""
    expected = case.ways[case.built_in]()
    problems = [case.problem(way, call(), expected) for way, call in case.ways.items()]
    record = {"task": case.task, "built_in": case.built_in, "aims": case.aims}
    if problem := "; ".join(filter(None, problems)):
        return record | {"problem": problem}

    def step(call):
        return Step(lambda _: call())

    turns = {way: Turns(step(call), None, consumes=False, effort=effort) for way, call in case.ways.items()}
    take_turns(list(turns.values()), threads)
    return record | {"ways": {way: turn.summary() for way, turn in turns.items()}}


def report(facts, records):
    """Return the Markdown table: a line a case."""
    lines = [
        "# Which trainer are you in?",
        "",
        "Time of a whole task with fastce, and that of the other ways over it (medians, taken in turns; below 1 means "
        "that fastce does not pay there). **Bold**: an aim that does not hold.",
        "",
        "| trainer | threads | task | fastce | the others, over fastce | aims |",
        "|---|--:|---|--:|---|---|",
    ]
    lines += [line(record) for record in records if "ways" in record]
    lines += [""] + [f"- {record['library']}: {record['problem']}" for record in records if record["problem"]]
    measured_on = f"Measured on: {machine.describe(facts)}; load before: {facts['load_before']}."
    return "\n".join([*lines, "", measured_on]) + "\n"


def line(record):
    """Return a case's line of the table."""
    times, aims = {way: summary["seconds"] for way, summary in record["ways"].items()}, record["aims"]
    others = []
    for way in times:
        if way != FASTCE:
            ratio = times[way] / times[FASTCE]
            text = f"{way} {ratio:.2f}x" if ratio < 10 else f"{way} {format_ratio(ratio)}"
            others.append(f"**{text}**" if ratio < aims.get(way, 0) else text)
    wanted = ", ".join(f"{way} at least {aim:.2g}x" for way, aim in aims.items())
    time = format_time(times[FASTCE])
    cells = [record["library"], str(record["threads"]), record["task"], time, ", ".join(others), wanted]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
