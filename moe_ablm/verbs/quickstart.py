"""`moe-ablm quickstart`: trains a small model on embedded data and reports it, in any folder."""

import json
from importlib.util import find_spec
from pathlib import Path

WORKDIR = "runs/quickstart"
HELP = f"""Trains configs/quickstart.py on simulated antibodies; prints and draws what it learned.

    moe-ablm quickstart [--workdir={WORKDIR}] [--config.KEY=VALUE ...]

Minutes on two cores. The same command resumes it; flags are those of the trainer."""


def main(argv: list[str]) -> int:
    """Runs the trainer, then `report`, each as the command that it is; returns the exit code."""
    from moe_ablm import __main__, outcome, train
    from moe_ablm.command_line import taken

    given = argv[2:]
    if {"-h", "--help"} & set(given):
        print(HELP)
        return 0
    config = find_spec("configs.quickstart")  # beside the package, in a checkout and in a wheel
    assert config is not None and config.origin is not None
    flags = [f"--config={config.origin}", f"--workdir={WORKDIR}", *given]
    code = train.main([argv[0], *flags])
    workdir = Path(taken("workdir", flags)[0] or WORKDIR)
    if code or json.loads((workdir / "run.json").read_text())["status"] != outcome.COMPLETE:
        return code  # it has not ended: the trainer said how it goes on
    return __main__.main([argv[0], "report", "--run", str(workdir)])
