"""Runs command lines of the package in forked children of one process that has imported it.

Importing jax takes seconds; dozens of command lines that end in an error message should not pay for
it each. Reads a JSON list `[folder, module, argument, ...]` a line and answers
`[code, stdout, stderr]` of the command in that folder.
"""

import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
import tempfile
import traceback

import moe_ablm.__main__
import moe_ablm.train
import moe_ablm.verbs

SECONDS = 300
MAINS = {"moe_ablm": moe_ablm.__main__.main, "moe_ablm.train": moe_ablm.train.main}


def run(folder: str, module: str, arguments: list[str]) -> list:
    """Exit code, stdout and stderr of `python -m module arguments`, from a forked child."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.alarm(SECONDS)  # a command that hangs has failed
            os.chdir(folder)
            sys.argv = [module, *arguments]
            code = 1
            try:
                code = MAINS[module](sys.argv)
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return [os.waitstatus_to_exitcode(status), out.read(), err.read()]


def import_all() -> None:
    """What commands import only as they need it: here once, not in each child anew."""
    importlib.import_module("moe_ablm.trainer")
    for module in pkgutil.iter_modules(moe_ablm.verbs.__path__, "moe_ablm.verbs."):
        importlib.import_module(module.name)
    gc.freeze()  # what stays for ever is not looked through in every child


if __name__ == "__main__":
    import_all()
    for line in sys.stdin:
        folder, module, *arguments = json.loads(line)
        print(json.dumps(run(folder, module, arguments)), flush=True)
