"""Make random calls of every public function for some minutes and check all that tests/fuzz.py knows of them.

    python tests/torture/fuzz.py --seconds 600 [--first NUMBER]
    python tests/torture/fuzz.py --case NUMBER

A call follows from its number; a number that fails is printed, and the second form makes that call again.
"""

import argparse
import faulthandler
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fuzz

MOST_SHOWN = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--quick", action="store_true", help="five seconds")
    parser.add_argument("--first", type=int, default=None, help="number of the first call; by default the time says it")
    parser.add_argument("--case", type=int, help="make this call alone, and let it raise")
    chosen = parser.parse_args()
    faulthandler.enable()
    if chosen.case is not None:
        call = fuzz.decode(fuzz.Seeded(chosen.case))
        print(call)
        fuzz.check(call)
        return 0
    start, seconds = time.monotonic(), 5 if chosen.quick else chosen.seconds
    first = int(time.time() * 1000) * 1000 if chosen.first is None else chosen.first
    print(f"calls {first} and on", flush=True)
    number, refused, failed = first, 0, 0
    while time.monotonic() - start < seconds:
        try:
            # A limit against hangs: the stacks of all threads are printed, and the process ends.
            faulthandler.dump_traceback_later(60, exit=True)
            refused += fuzz.check(fuzz.decode(fuzz.Seeded(number)))
        except Exception:
            failed += 1
            if failed <= MOST_SHOWN:
                print(f"call {number} fails:\n{traceback.format_exc(limit=-4)}", flush=True)
        number += 1
    faulthandler.cancel_dump_traceback_later()
    print(
        f"result: {number - first:,} calls of {len(fuzz.NAMES)} functions, {refused:,} of them to be refused; "
        f"{failed} failed; {time.monotonic() - start:.0f} s"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
