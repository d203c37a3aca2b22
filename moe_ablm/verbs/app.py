"""`moe-ablm app`: a page in the browser to look at one antibody through a model."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from moe_ablm.data.germline import parse_germlines
from moe_ablm.errors import ArgumentError, UserError
from moe_ablm.model.spec import PRECISIONS
from moe_ablm.verbs.reading import ASKED, add_germlines

PORTS = range(1, 1 << 16)
HERE = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--run", type=Path, required=True, help=ASKED)
    parser.add_argument("--port", type=int, default=5006, help="of the page (default %(default)s)")
    parser.add_argument(
        "--address",
        default=HERE,
        help="who reaches it: %(default)s (default) this machine alone, 0.0.0.0 the whole network, "
        "without a password",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="float32",
        help="of the computation; bfloat16_operands is quicker on CPUs with AMX",
    )
    add_germlines(parser)


def run(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C.

    Raises:
      UserError: Panel, the model or the germlines are missing, or the port is taken.
    """
    if args.port not in PORTS:
        raise ArgumentError("port", args.port, f"expected 1 to {PORTS[-1]:,}")
    if find_spec("panel") is None:
        raise UserError(
            "app draws its page with Panel, which is missing: pip install 'moe_ablm[app]'"
        )
    germlines = parse_germlines(args.germlines)
    from moe_ablm.app import serve
    from moe_ablm.inference.engines import engine_of

    engine = engine_of(args.run, args.precision)
    engine.germlines = germlines
    serve(engine, args.address, args.port)
