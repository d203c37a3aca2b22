"""The user's cache: where it is, and the compiled functions that JAX keeps in it."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/moe_ablm`, by default `~/.cache/moe_ablm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_ablm"


def keep_compilations() -> None:
    """Keeps compiled functions in the user's cache, unless JAX has another place for them.

    JAX finds them by program, versions, flags and devices (of CPUs: also the instruction set), so
    that one directory serves different machines. Several processes on CPU keep nothing: only the
    first would find its programs, and the others would compile while it waits in a collective.
    """
    import jax  # this module also serves `data`, which does without
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    if jax.config.values["jax_compilation_cache_dir"]:
        return
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    reset_cache()  # what was compiled before has decided that there is no cache
