"""Play stories of random faults until one breaks a promise: python scripts/soak_faults.py --from 0

Each seed is a story (`shoal/sim/faults.py`); the first that fails ends the run, is printed whole
and can be played again with --only SEED.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Iterable
from multiprocessing import Pool

from shoal.sim.faults import LONG, SHORT, make_story, play


def attempt(told: tuple[int, bool]) -> tuple[int, int, int, str]:
    """Seed, whole answers, requests, and what went wrong."""
    seed, short = told
    try:
        outcome = play(make_story(seed, SHORT if short else LONG))
    except BaseException:  # noqa: BLE001 - whatever it is, it is the find of this run
        return seed, 0, 0, traceback.format_exc()
    return seed, outcome.whole, outcome.asked, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=0, help="of seeds; 0 = without end")
    parser.add_argument("--only", type=int, help="play this one seed and show its story")
    parser.add_argument("--short", action="store_true", help="the short stories of the tests")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--go-on", action="store_true", help="also after a failure")
    options = parser.parse_args()
    if options.only is not None:
        print(make_story(options.only, SHORT if options.short else LONG))
        *_, wrong = attempt((options.only, options.short))
        print(wrong or "all promises were kept")
        return bool(wrong)
    seeds = itertools.islice(itertools.count(options.first), options.count or None)
    return soak(seeds, options.short, options.processes, options.go_on)


def replay(seed: int, short: bool) -> str:
    return f"python scripts/soak_faults.py --only {seed}{' --short' if short else ''}"


def soak(seeds: Iterable[int], short: bool, processes: int, go_on: bool) -> int:
    started, played, whole, asked, failed = time.monotonic(), 0, 0, 0, []
    with Pool(processes) as pool:
        for seed, answers, requests, wrong in pool.imap(attempt, ((seed, short) for seed in seeds)):
            played, whole, asked = played + 1, whole + answers, asked + requests
            if wrong:
                failed.append(seed)
                print(f"\n{wrong}\nseed {seed} failed; again: {replay(seed, short)}", flush=True)
                if not go_on:
                    break
            if played % 100 == 0:
                took = time.monotonic() - started
                print(
                    f"{played} stories in {took:.0f} s, {whole} of {asked} requests whole",
                    flush=True,
                )
    print(f"{played} stories, {whole} of {asked} requests whole; failed: {failed or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
