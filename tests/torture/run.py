"""Run the long tests one after the other and keep what each of them found in tests/README.md.

    python tests/torture/run.py [--quick] [--only NAME ...]

Each script stands alone, takes --quick, ends with a status that is not 0 if it finds anything, and says on its last
line "result: ..." what it did. Results of quick runs are not kept. `make torture` calls this.
"""

import argparse
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
README = ROOT / "tests" / "README.md"
BEGIN, END = "<!-- torture -->", "<!-- /torture -->"
HEAD = ["| script | last run | seconds | exit status | result |", "|---|---|---|---|---|"]
# What finds most in the least time comes first.
SCRIPTS = [
    "large_arrays.py",
    "exponential.py",
    "fuzz.py",
    "soak.py",
    "allocation.py",
    "runtimes.py",
    "interrupts.py",
    "environments.py",
    "planted_faults.py",
    "valgrind.sh",
    "thread_sanitizer.sh",
    "free_threaded.sh",
]


def run_script(name, quick):
    """Run one script, printing what it prints; return (exit status, its result, seconds)."""
    command = ["bash" if name.endswith(".sh") else sys.executable, str(HERE / name)] + ["--quick"] * quick
    # Shell scripts find the same Python by its name.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    begun = time.monotonic()
    last = ""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    status = process.wait()
    result = last.removeprefix("result:").strip() if last.startswith("result:") else f"no result; {last}"
    return status, result, time.monotonic() - begun


def rows_of(text):
    """Return {script: its row} of the table between the marks of a text."""
    table = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    return {row.split("`")[1]: row for row in rows}


def with_rows(text, rows):
    """Return a text whose table holds these rows, in the order of SCRIPTS."""
    ordered = [rows[name] for name in SCRIPTS if name in rows]
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    return "\n".join([before, *HEAD, *ordered, after])


def keep(name, status, result, seconds):
    """Write one result into tests/README.md, where those of the other scripts stay."""
    text = README.read_text()
    cell = result.replace("|", "\\|")
    row = f"| `{name}` | {datetime.date.today()} | {seconds:.0f} | {status} | {cell} |"
    README.write_text(with_rows(text, rows_of(text) | {name: row}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of each script")
    parser.add_argument("--only", nargs="+", default=SCRIPTS, choices=SCRIPTS, metavar="NAME", help="these scripts")
    arguments = parser.parse_args()
    failed = []
    for name in [name for name in SCRIPTS if name in arguments.only]:
        print(f"\n==== {name} ====", flush=True)
        status, result, seconds = run_script(name, arguments.quick)
        if status != 0:
            failed.append(name)
        if not arguments.quick:
            keep(name, status, result, seconds)
    print(f"\n{'failed: ' + ', '.join(failed) if failed else 'all passed'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
