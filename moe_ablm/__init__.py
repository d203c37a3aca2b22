"""Mixture-of-experts antibody language models in JAX; `moe_ablm.api` is the way in from Python."""


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("moe_ablm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
