"""`moe-ablm quickstart`: trains a small model on embedded data and reports it, in any folder."""

from importlib.util import find_spec

WORKDIR = "runs/quickstart"
HELP = f"""Trains configs/quickstart.py on simulated antibodies; prints and draws what it learned.

    moe-ablm quickstart [--workdir={WORKDIR}] [--config.KEY=VALUE ...]

Minutes on two cores. The same command resumes it; flags are those of the trainer."""


def main(argv: list[str]) -> int:
    """Runs the trainer, then `report`, each as the command that it is; returns the exit code."""
    from moe_ablm import __main__, train

    given = argv[2:]
    if {"-h", "--help"} & set(given):
        print(HELP)
        return 0
    if not any(flag.startswith("--workdir=") for flag in given):
        given = [*given, f"--workdir={WORKDIR}"]
    workdir = next(f for f in given if f.startswith("--workdir=")).partition("=")[2]
    config = find_spec("configs.quickstart")  # beside the package, in a checkout and in a wheel
    assert config is not None and config.origin is not None
    flags = [f"--config={config.origin}", *given]
    code = train.main([argv[0], *flags])
    return code or __main__.main([argv[0], "report", "--run", workdir])
