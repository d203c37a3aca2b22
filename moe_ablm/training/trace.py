"""A trace of a few updates by JAX's profiler, for xprof or TensorBoard."""

from collections.abc import Callable
from pathlib import Path

import jax


class Trace:
    """Records the updates of a window; without a window it does nothing.

    Call `begin` before and `end` after the dispatch of every update. Used as a context manager, it
    also writes a trace that is still open when training ends, for whatever reason.
    """

    def __init__(self, directory: Path, window: tuple[int, int] | None):
        """Args: window, the first and last update to record, counted from 1; None: no trace."""
        self.directory = directory
        self._window, self._open = window, False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        if self._open:
            self._write()

    def begin(self, update: int, wait: Callable[[], None]) -> None:
        """Starts the trace before the first update of the window that this process makes.

        Args:
          update: number of the update that is about to be dispatched.
          wait: blocks until the update before is done, so that it is not in the trace.
        """
        if self._window is None or self._open:
            return
        first, last = self._window
        if first <= update <= last:
            wait()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing every Python call is slow and large
            jax.profiler.start_trace(str(self.directory), profiler_options=options)
            self._open = True

    def end(self, update: int, wait: Callable[[], None]) -> bool:
        """Writes the trace after the last update of the window, and returns whether it did.

        Args:
          update: number of the update that was dispatched.
          wait: blocks until this update is done.
        """
        if not self._open or self._window is None or update < self._window[1]:
            return False
        wait()
        self._write()
        return True

    def _write(self) -> None:
        self._open = False
        jax.profiler.stop_trace()
