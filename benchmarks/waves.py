"""Entries of a benchmark in worker processes, under one budget of time; none stops the others.

A wave is a list of entries for one kind of worker. Its programs are compiled side by side, each in
a thread, and measured afterwards one by one, while nothing compiles. A worker lives until another
kind is needed, so that frameworks do not share a device's memory, or until it dies: then the entry
that killed it has failed, and those behind it are tried again one by one in a new worker.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TextIO

THREADS = max(os.cpu_count() or 1, 4) // 2  # that compile; XLA itself uses several for some passes


class Prepared(NamedTuple):
    """An entry that is traced, but not yet compiled.

    Attributes:
      compile: makes what `measure` takes; called in a thread.
      measure: returns the entry's values.
    """

    compile: Callable[[], Any]
    measure: Callable[[Any], dict]


class Entry(NamedTuple):
    """What is measured under one name.

    Attributes:
      name: with parts between slashes.
      worker: kind of the process that it runs in.
      compiles, runs: seconds that compilation and the rest are expected to take.
      work: returns the values, or what has to be compiled first.
    """

    name: str
    worker: str
    compiles: float
    runs: float
    work: Callable[[], dict | Prepared]


Wave = Sequence[Entry]
Send = Callable[[dict], None]


# in a worker


def serve(entries: dict[str, Entry], hello: dict) -> None:
    """Runs the waves that stdin names, a JSON list a line, and answers on stdout in JSON lines.

    Whatever else writes to stdout goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(message: dict) -> None:
        answers.write(json.dumps(message) + "\n")

    send({"hello": hello})
    for line in sys.stdin:
        run_wave([entries[name] for name in json.loads(line)], send)


def run_wave(wave: Wave, send: Send) -> None:
    """Runs the entries of a wave and sends the result of each."""
    waiting: list[tuple[str, Prepared, Future]] = []
    with ThreadPoolExecutor(max(1, min(THREADS, len(wave)))) as pool:
        for entry in wave:
            found = _attempt(entry.name, entry.work, send)
            if isinstance(found, Prepared):
                waiting.append((entry.name, found, pool.submit(_timed, found.compile)))
            elif found is not None:
                send({"entry": entry.name, "values": found})
    together = len(waiting)
    while waiting:  # emptied on the way: programs hold memory
        name, prepared, compiled = waiting.pop(0)
        send({"begin": name})
        values = _attempt(name, partial(_measured, prepared, compiled), send)
        if values is not None:
            send({"entry": name, "values": values | {"compiled_together": together}})


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def _measured(prepared: Prepared, compiled: Future) -> dict:
    program, seconds = compiled.result()
    return prepared.measure(program) | {"compile_s": seconds}


def _attempt(name: str, work: Callable[[], Any], send: Send) -> Any:
    try:
        return work()
    except Exception as error:  # an entry may fail in any way; the others go on
        send({"entry": name, "reason": one_line(error)})
        return None


def one_line(error: BaseException) -> str:
    """Type and first line of an error, not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


# in the process that starts them


class Worker:
    """A process that runs `serve`."""

    def __init__(self, command: list[str], environment: dict[str, str], log: TextIO):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            bufsize=1,
            start_new_session=True,  # so that what it starts ends with it
        )
        self._answers: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def send(self, names: list[str]) -> None:
        """Asks for a wave; a process that has died is noticed in `receive`."""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(names) + "\n")

    def receive(self, seconds: float) -> dict | None:
        """The next message; None: the process has ended.

        Raises:
          queue.Empty: there was none within `seconds`.
        """
        return self._answers.get(timeout=max(seconds, 0))

    def ended(self) -> str:
        """How a process that sends no more messages ended."""
        code = self.process.wait(10)
        return f"the process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"

    def stop(self) -> None:
        """Ends the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Budget:
    """Seconds that may be spent, from now on."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


def expected(wave: Wave) -> float:
    """Seconds that a wave is expected to take."""
    compiles = [entry.compiles for entry in wave]
    together = max(max(compiles, default=0.0), sum(compiles) / THREADS)
    return together + sum(entry.runs for entry in wave)


class Runner:
    """Runs waves one after the other until the budget is spent."""

    def __init__(
        self, start: Callable[[str], Worker], budget: Budget, record: Callable[[dict], None]
    ):
        """Args: starts a worker of a kind; the budget; takes every result as it comes."""
        self._start, self._budget, self._record = start, budget, record
        self._kind: str | None = None
        self._worker: Worker | None = None

    def run(self, waves: Sequence[Wave]) -> None:
        """Every entry is recorded once: with values, as failed or as skipped."""
        try:
            for wave in waves:
                again = self._run_wave(self._fitting(wave))
                for entry in again:
                    self._run_wave(self._fitting([entry]))
        finally:
            self._stop()

    def _fitting(self, wave: Wave) -> Wave:
        """The first entries of a wave for which there is time; the others are skipped."""
        count = len(wave)
        while count and expected(wave[:count]) > self._budget.left:
            count -= 1
        for entry in wave[count:]:
            need = f"needs about {entry.compiles + entry.runs:.0f} s"
            self._record({"entry": entry.name, "status": "skipped", "reason": need})
        return wave[:count]

    def _run_wave(self, wave: Wave) -> Wave:
        """Runs a wave in a worker; returns entries to be tried again, where the worker died."""
        if not wave:
            return []
        left, begun = {entry.name: entry for entry in wave}, None
        worker = self._worker_of(wave[0].worker)
        worker.send(list(left))
        while left:
            try:
                message = worker.receive(self._budget.left)
            except queue.Empty:
                self._fail(left, "out of time")
                self._stop()
                return []
            if message is None:
                culprit = begun if begun in left else next(iter(left)) if len(left) == 1 else None
                if culprit:
                    self._fail([left.pop(culprit).name], worker.ended())
                self._stop()
                return list(left.values())
            if "hello" in message:
                self._record({"worker": self._kind, **message["hello"]})
            elif "begin" in message:
                begun = message["begin"]
            else:
                del left[message["entry"]]
                failed = "reason" in message
                self._record(message | {"status": "failed" if failed else "done"})
        return []

    def _fail(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self._record({"entry": name, "status": "failed", "reason": reason})

    def _worker_of(self, kind: str) -> Worker:
        if self._worker is None or kind != self._kind:
            self._stop()
            self._kind, self._worker = kind, self._start(kind)
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
        self._worker = None
