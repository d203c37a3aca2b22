"""Trains an antibody language model: `python -m moe_ablm.train --config=FILE.py --workdir=DIR`.

    --config=FILE.py[:ARGUMENTS]   a config file (configs/), with arguments if it takes any
    --config.a.b=VALUE             override of one key (configs/base.py explains them all)
    --workdir=DIR                  where the run lives; the same command again resumes it; an
                                   address in an object store as well (docs/stores.md)
    --extend-to=STEPS              goes on with a run that is there, beyond its last step

Exit codes: 0 done, or saved on SIGTERM or SIGUSR1; 130 saved on Ctrl-C; 2 the input or the machine
is wrong; 1 anything else (also a run that diverged, or collapsed under train.stop_on_collapse).
"""

import importlib.util
import itertools
import logging
import re
import sys
from pathlib import Path

from moe_ablm import outcome
from moe_ablm.allocator import restart_with_huge_pages
from moe_ablm.endings import INTERRUPTED, end, is_full_disk, obstacle
from moe_ablm.errors import Diverged, UserError
from moe_ablm.preemption import Interrupts, again, leave, requeue_job


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    if {"-h", "--help"} & set(argv[1:]):
        return end(lambda: print(f"{__doc__}\n{_keys()}"))
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with Interrupts(after=f"to go on: {again(argv[1:])}") as interrupts:
        return end(lambda: _train(argv, interrupts))


def _keys() -> str:
    """The keys of a config with their defaults, as configs/base.py has them.

    Its text is read, since importing it takes seconds.
    """
    spec = importlib.util.find_spec("configs.base")
    if spec is None or spec.origin is None:
        return ""
    lines = Path(spec.origin).read_text().partition("c = ConfigDict()\n")[2].splitlines()
    sections, found = {"c": "config"}, ["Keys of a config, and what they are without it:", ""]
    for line in itertools.takewhile(lambda line: line.strip() != "return c", lines):
        text = line.strip()
        section = re.fullmatch(r"(\w+)\.(\w+) = (\w+) = ConfigDict\(\)", text)
        key = re.match(r"(\w+)\.(\w+) = (.*)", text)
        if section:
            sections[section[3]] = f"{sections[section[1]]}.{section[2]}"
        elif key:
            value = re.sub(r"placeholder\(\w+\)", "None", key[3])
            found.append(f"    --{sections[key[1]]}.{key[2]}={value}")
        elif text.startswith("#"):
            found.append(f"    {text}")
    return "\n".join(found)


def _train(argv: list[str], interrupts: Interrupts) -> int:
    try:
        summary, collapse = _trained(argv)
    except Diverged as error:
        print(f"moe_ablm: stopped: {error}", file=sys.stderr)
        return 1
    if collapse:
        print(f"moe_ablm: {collapse}", file=sys.stderr)
        return 1
    if summary["status"] != outcome.STOPPED:
        return 0
    if interrupts.heard:  # `train && evaluate` must not go on
        return INTERRUPTED
    from moe_ablm.parallel import multihost

    if multihost.is_first() and (line := requeue_job()):
        print(line)
    return 0


def _trained(argv: list[str]) -> tuple[dict, str]:
    """The content of `run.json`, and a line about the collapse that ended the run, or ""."""
    with outcome.told(_status_of) as told:
        # here, since they take seconds: what is wrong is said, and Ctrl-C obeyed, before
        from moe_ablm.command_line import parse

        config, workdir, steps = parse(argv)
        from moe_ablm import trainer
        from moe_ablm.extension import plan_extension
        from moe_ablm.mirror import mirrored
        from moe_ablm.parallel import multihost

        multihost.start()
        try:
            with mirrored(workdir) as place:
                extension = plan_extension(config, place, steps) if steps else None
                if extension and extension.note and multihost.is_first():
                    print(extension.note)
                longer = extension.config if extension else config
                summary = trainer.run(longer, place, extension, again(argv[1:]))
        except Exception as error:
            if not is_full_disk(error):
                raise
            raise UserError(
                "no space left for the work directory: free some, then run the same command again; "
                "it resumes from the last whole checkpoint"
            ) from error
        collapse = trainer.why_collapsed(summary) if summary["status"] == outcome.COLLAPSED else ""
        if multihost.is_first():
            told(summary["status"], summary["step"], collapse)
        return summary, collapse


def _status_of(error: Exception) -> str:
    """Of the outcome of a run that raised."""
    if isinstance(error, Diverged):
        return outcome.DIVERGED
    return outcome.FAILED if obstacle(error) is None else outcome.REFUSED


if __name__ == "__main__":
    Interrupts.alone = True
    restart_with_huge_pages()
    leave(main(sys.argv))
