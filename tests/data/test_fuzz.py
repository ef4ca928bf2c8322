"""A few seconds of the fuzzer, and that it sees what it is there to see."""

import ctypes
import os
import time
from collections import Counter

from support import fuzz
from support.damage import Guarded
from support.fuzz import CRASHED, HUNG, IN_PART, REFUSED, SERVED, WRONG, Wrong


def test_damaged_files_are_served_or_refused_by_name():
    counts = {kind: Counter() for kind in fuzz.KINDS}
    for seed, outcome, said in fuzz.attempt_all(fuzz.check, range(10**6, 10**6 + 450)):
        assert outcome in (SERVED, IN_PART, REFUSED), (seed, said)
        counts[fuzz.kind_of(seed)][outcome] += 1
    for kind, count in counts.items():
        assert count[SERVED] > 5 and count[REFUSED] > 50, (kind, count)
    assert counts["beton"][IN_PART] > 5


def misbehave(seed):
    if seed == 2:
        raise Wrong("broken")
    if seed == 4:
        os.abort()
    if seed == 5:
        time.sleep(600)
    if seed == 7:
        os._exit(3)
    return REFUSED


def test_crashes_hangs_and_broken_rules_are_told_with_their_seeds():
    told = {
        seed: (outcome, said)
        for seed, outcome, said in fuzz.attempt_all(misbehave, range(9), limit_s=10)
    }
    assert [told[seed][0] for seed in range(9)] == [
        REFUSED,
        REFUSED,
        WRONG,
        REFUSED,
        CRASHED,
        HUNG,
        REFUSED,
        CRASHED,
        REFUSED,
    ]
    assert told[4][1] == "SIGABRT" and told[7][1] == "status 3" and "Wrong: broken" in told[2][1]


def overstep(seed):
    memory = Guarded(10_000)
    array = memory.array(5_000, at_end=seed < 2)
    array[:] = 7
    over = array.ctypes.data + (5_000 if seed < 2 else -1)
    if seed % 2:
        ctypes.memset(over, 0, 1)
    else:
        ctypes.string_at(over, 1)
    return SERVED


def test_a_byte_read_or_written_beyond_guarded_memory_is_a_crash():
    told = [(outcome, said) for _, outcome, said in fuzz.attempt_all(overstep, range(4))]
    assert told == [(CRASHED, "SIGSEGV")] * 4
