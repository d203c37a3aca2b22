"""Contenders timed turn by turn, each in a process of its own, so that drift hits all alike.

A contender is a command that prints "ready", then for every line read on stdin runs its work once
warm and once timed and prints the seconds (wall, then CPU) of the timed one.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable


def serve(work: Callable[[], None]) -> None:
    """The contender's side: answers every line on stdin with the seconds of one warm call."""
    work()
    print("ready", flush=True)
    for _ in sys.stdin:
        work()  # idle memory may have been reclaimed meanwhile
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


def contest(commands: dict[str, list[str]], rounds: int) -> dict[str, list[tuple]]:
    """Runs `rounds` turns of every contender; `{name: [(wall, cpu), ...]}` in seconds."""
    workers = {
        name: subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for name, command in commands.items()
    }
    try:
        for name, worker in workers.items():
            if worker.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{name} did not start: {' '.join(commands[name])}")
        times = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                worker.stdin.write("go\n")
                wall, cpu = map(float, worker.stdout.readline().split())
                times[name].append((wall, cpu))
        return times
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()


def ratio(times: dict, a: str, b: str) -> float:
    """Median over rounds of wall(b) / wall(a): how many times faster a is."""
    return statistics.median(y[0] / x[0] for x, y in zip(times[a], times[b], strict=True))
