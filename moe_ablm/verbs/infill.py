"""`python -m moe_ablm infill`: masked residues (`_`, `*` or `<mask>`) filled in."""

import argparse

from moe_ablm.errors import UserError
from moe_ablm.verbs.asking import Question, add_asking_arguments, ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_asking_arguments(parser)
    parser.add_argument(
        "--level",
        choices=("antibody", "residue"),
        default="antibody",
        help="completed chains, or each residue filled in with its candidates",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="draw N completions of each antibody by probability (default: the most probable one)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the draws")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="candidates told with --level residue"
    )


def run(args: argparse.Namespace) -> None:
    """Writes completed antibodies, or what was filled in."""
    if args.samples < 0:
        raise UserError(f"--samples {args.samples}: expected 0 (the most probable) or more")
    if not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature}: expected more than 0")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: expected 0 or more")
    if not 1 <= args.top <= 20:
        raise UserError(f"--top {args.top}: expected 1 to 20 amino acids")
    from moe_ablm.inference.infill import INFILLED, Sampling, table

    sampling = Sampling(args.samples, args.temperature, args.seed, args.top)

    def cost(engine, antibody):
        masks = (antibody.heavy + antibody.light).count("_")
        samples = max(args.samples, 1)
        return samples * max(masks, 1), samples * (masks * 1024 + 1024)

    question = Question(
        {"level": args.level, **vars(sampling)},
        lambda engine, antibodies: table(engine, antibodies, args.level, sampling),
        cost,
        INFILLED,
    )
    ask(args, question)
