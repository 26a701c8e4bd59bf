"""Call every kernel once per length, so that a checker of memory sees it: python every_kernel.py 1,10,97."""

import os
import sys

import every_function
import guarded
import numpy as np


def main():
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for dtype in (np.float32, np.float64):
        for classes in map(int, sys.argv[1].split(",")):
            rng = np.random.default_rng(classes)
            for rows in (131, 3) if classes <= 130 else (2,):
                for name, call in guarded.calls(classes, rows, dtype, rng):
                    print(np.dtype(dtype).name, rows, classes, name, flush=True)
                    # An array of its own from the allocator: the checker knows where it ends.
                    call(lambda array, at_end=True: array.copy())
        for name, call in every_function.calls(dtype, [(7, 3), (150, 10), (5, 97), (2, 5003)]):
            print(np.dtype(dtype).name, name, flush=True)
            for result in every_function.arrays_of(call()):
                # A number that was never written shows when it leaves the process.
                os.write(nowhere, np.asarray(result).tobytes())


if __name__ == "__main__":
    main()
