"""One process of the comparison, for one number of threads: verify, then time; one JSON record a line.

Started by `python -m benchmarks`, which sets the environment before any library is loaded.
"""

import json
import sys
from pathlib import Path

import numpy as np

from . import machine
from .agreement import compare
from .cases import IN_PLACE, find, make_logits, make_targets
from .contenders import CONTENDERS, OURS, Job
from .timing import QUICK, Effort, Turns, take_turns


def main(plan_path, records_path):
    """Measure what the plan names, and append the records as they come."""
    plan = json.loads(Path(plan_path).read_text())
    machine.run_on(plan["threads"])
    with open(records_path, "a", encoding="utf-8") as file:
        for shape in plan["shapes"]:
            for dtype in plan["dtypes"]:
                for record in measure(find(shape), dtype, plan):
                    print(json.dumps(record), file=file, flush=True)


def measure(case, dtype, plan):
    """Yield a record of every contender in every mode."""
    from fastce import reference

    logits, targets = make_logits(case, dtype), make_targets(case)
    out = np.zeros_like(logits)
    expected = reference.cross_entropy_with_grad(logits, targets)
    threads = plan["threads"]
    effort = QUICK if plan["quick"] else Effort()
    for mode in plan["modes"]:
        print(f"  {threads} thread{'s' * (threads > 1)}: {case.name} {dtype}, {mode}", file=sys.stderr, flush=True)
        records, turns = [], {}
        for contender in CONTENDERS:
            if contender.name not in plan["contenders"]:
                continue
            job = Job(logits, targets, out, contender.runs_as(mode), threads)
            record = {"shape": case.name, "dtype": dtype, "mode": mode, "threads": threads}
            record |= {"contender": contender.name, "ran_as": job.mode, "problem": None}
            records.append(record)
            try:
                turns[contender.name] = prepare(contender, job, expected, record, effort)
            except Exception as error:  # a rival that breaks is named in the report; it does not end the comparison
                if contender.name == OURS:
                    raise
                record["problem"] = f"failed: {type(error).__name__}: {error}".partition("\n")[0]
            if record["problem"] and contender.name == OURS:
                raise SystemExit(f"fastce {record['problem']}")
        take_turns([turn for turn in turns.values() if turn], threads)
        for record in records:
            if turn := turns.get(record["contender"]):
                record |= turn.summary()
            yield record


def prepare(contender, job, expected, record, effort):
    """Return the contender's turns, or None with the problem noted in `record`."""
    if missing := contender.missing():
        record["problem"] = f"not installed ({', '.join(missing)})"
        return None
    step = contender.prepare(job)
    if not contender.limit:
        differences, record["problem"] = compare(step.call(step.load(job.logits.copy())), expected, str(job.out.dtype))
        record |= differences
        if record["problem"]:
            return None
    consumes = job.mode == IN_PLACE and not contender.limit
    return Turns(step, job.logits, consumes=consumes, effort=effort)


if __name__ == "__main__":
    main(*sys.argv[1:])
