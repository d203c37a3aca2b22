"""A trace of a few updates by JAX's profiler, for xprof or TensorBoard."""

from collections.abc import Callable
from pathlib import Path

import jax


class Trace:
    """Records the updates of a window; nothing without one.

    `begin` and `end` stand around the dispatch of every update. A context manager: a trace that is
    still open when training ends, for whatever reason, is written, too.
    """

    def __init__(self, directory: Path, window: tuple[int, int] | None):
        """Args: window, the first and the last update to record, counted from 1."""
        self.directory = directory
        self._window, self._open = window, False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        if self._open:
            self._write()

    def begin(self, update: int, wait: Callable[[], None]) -> None:
        """Starts before the first update of the window that this process makes.

        Args:
          update: number of the update that is about to be dispatched.
          wait: returns when the one before it is done, which is then not in the trace.
        """
        if self._window is None or self._open:
            return
        first, last = self._window
        if first <= update <= last:
            wait()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call: slows the host down, and is large
            jax.profiler.start_trace(str(self.directory), profiler_options=options)
            self._open = True

    def end(self, update: int, wait: Callable[[], None]) -> bool:
        """Writes the trace once the last update of the window is done; True if it did."""
        if not self._open or self._window is None or update < self._window[1]:
            return False
        wait()
        self._write()
        return True

    def _write(self) -> None:
        self._open = False
        jax.profiler.stop_trace()
