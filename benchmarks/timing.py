"""Contenders take turns: warm-up, then rounds in which each runs once, and the median and spread of its rounds."""

import gc
import time
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Effort:
    """How long to measure one contender: until it has had `rounds` turns or `seconds`, but `fewest` turns at least."""

    rounds: int = 15
    seconds: float = 1.0
    fewest: int = 3
    turn: float = 0.01  # short calls are repeated until a turn lasts this many seconds


QUICK = Effort(rounds=3, seconds=0.05, fewest=2, turn=5e-4)

# A call that ends sooner than this is led by an untimed one, so that the caches hold its own data.
SHORT = 0.05
# In-place calls need fresh logits each. As many as stay in the second-level cache are made at a time, so that they
# find their logits there, as calls on one and the same array do.
COPIES_BYTES = 1 << 18
# Idle OpenMP threads keep spinning for some milliseconds; they must not take a CPU from the next contender.
SETTLE = 0.01


class Turns:
    """One contender's turns: `seconds` is the time of one call, by turn. Says whether a call `consumes` its logits."""

    def __init__(self, step, logits, *, consumes, effort):
        self.step, self.logits, self.consumes, self.effort = step, logits, consumes, effort
        self.seconds = []
        self.spent = 0.0
        self._kept = None if consumes else step.load(logits)
        self._calibrate()

    def _calibrate(self):
        """Warm up, and find how many calls make a turn."""
        calls, turn = 1, self.effort.turn
        self._time(1)
        while (elapsed := self._time(calls)) < turn / 4:
            calls *= 2
        self.expected = elapsed / calls
        self.calls = max(1, round(turn / self.expected))

    def _time(self, calls):
        """Return the seconds that `calls` calls take, without making what they take."""
        call = self.step.call
        at_once = max(1, COPIES_BYTES // self.logits.nbytes) if self.consumes else calls
        elapsed = 0.0
        for first in range(0, calls, at_once):
            count = min(at_once, calls - first)
            inputs = [self._kept] * count
            if self.consumes:
                inputs = [self.step.load(self.logits.copy()) for _ in range(count)]
            start = time.perf_counter()
            for logits in inputs:
                call(logits)
            elapsed += time.perf_counter() - start
        return elapsed

    def take(self):
        if self.expected < SHORT:
            self._time(1)
        elapsed = self._time(self.calls)
        self.spent += elapsed
        self.seconds.append(elapsed / self.calls)

    @property
    def done(self):
        turns = len(self.seconds)
        return turns >= self.effort.fewest and (turns >= self.effort.rounds or self.spent >= self.effort.seconds)

    def summary(self):
        low, median, high = np.quantile(self.seconds, [0.25, 0.5, 0.75])
        return {
            "seconds": float(median),
            "quartiles": [float(low), float(high)],
            "rounds": len(self.seconds),
            "calls_per_round": self.calls,
        }


def take_turns(turns, threads):
    """Let all `turns` run, one after the other, until each is done; another one begins in every round."""
    waiting = deque(turns)
    gc.collect()
    gc.disable()
    try:
        while waiting:
            for contender in tuple(waiting):
                if threads > 1:
                    time.sleep(SETTLE)
                contender.take()
            waiting = deque(contender for contender in waiting if not contender.done)
            waiting.rotate(1)
    finally:
        gc.enable()
