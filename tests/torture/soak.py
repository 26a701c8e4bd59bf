"""A million calls, a hundred thousand failing ones and two thousand short-lived threads: what is left of them?"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import soak


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a hundredth of it")
    part = 100 if parser.parse_args().quick else 1
    calls, failures, threads = 1_000_000 // part, 100_000 // part, 2_000 // part
    start = time.monotonic()
    grown = []
    try:
        for name, soaked in (
            (f"{calls:,} calls", lambda: soak.soak_calls(soak.good_calls(), calls)),
            (f"{failures:,} failing calls", lambda: soak.soak_failures(failures)),
            (f"{threads:,} threads", lambda: soak.soak_threads(threads)),
        ):
            grown.append(f"{name} (+{soaked() / 1024:.0f} KiB)")
            print(grown[-1], flush=True)
    except AssertionError as problem:
        print(f"result: {problem}, after {', '.join(grown) or 'nothing'}; {time.monotonic() - start:.0f} s")
        return 1
    print(f"result: {', '.join(grown)}; no thread, file or reference left; {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
