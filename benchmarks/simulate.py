"""The simulator's rate, its marginals against real pairs, and the fit of its constants.

python benchmarks/simulate.py                        rate, pairs per second of CPU time
python benchmarks/simulate.py --against FILE         and the table of simulated against real
python benchmarks/simulate.py --calibrate FILE       prints moe_ablm/data/usage.py fitted to FILE

FILE is a parquet file with the columns of the annotated table.
"""

import argparse
import time

import pyarrow as pa
import pyarrow.parquet as pq
from marginals import marginals, total_variation

from moe_ablm.data.simulate import SimulationParams, pairing_information, simulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=40_960)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", metavar="FILE")
    parser.add_argument("--calibrate", metavar="FILE")
    args = parser.parse_args()
    if args.calibrate:
        import calibrate_simulator

        calibrate_simulator.main(args.calibrate)
        return
    table = measure_rate(args.pairs, args.seed)
    if args.against:
        compare(table, pq.read_table(args.against))
    print_pairing()


def measure_rate(pairs: int, seed: int) -> pa.Table:
    """Simulates, prints the rate by CPU time, returns the pairs."""
    start = time.process_time()
    batches = list(simulate(pairs, seed))
    seconds = time.process_time() - start
    print(
        f"{pairs} annotated pairs in {seconds:.2f} s of CPU: {pairs / seconds:,.0f} pairs/s/core\n"
    )
    return pa.Table.from_batches(batches)


def compare(simulated: pa.Table, real: pa.Table) -> None:
    """Prints every marginal of both, as markdown."""
    ours, theirs = marginals(simulated), marginals(real)
    print(f"| marginal | simulated ({len(simulated):,}) | real ({len(real):,}) |\n|---|--:|--:|")
    for name, value in ours.scalars.items():
        digits = 2 if "length" in name else 4
        print(f"| {name} | {value:.{digits}f} | {theirs.scalars[name]:.{digits}f} |")
    print("\n| distribution | total variation distance |\n|---|--:|")
    for name, shares in ours.distributions.items():
        print(f"| {name} | {total_variation(shares, theirs.distributions[name]):.4f} |")
    print("\n| gene | simulated | real |\n|---|--:|--:|")
    for name in ("heavy V gene", "heavy J gene", "light V gene", "light J gene"):
        usage = theirs.distributions[name]
        for gene in sorted(usage, key=usage.get, reverse=True)[:5]:
            print(f"| {gene} | {ours.distributions[name].get(gene, 0):.4f} | {usage[gene]:.4f} |")


def print_pairing() -> None:
    print("\n| pairing tilt | mutual information of the V genes, bits |\n|--:|--:|")
    for tilt in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0):
        bits = pairing_information(SimulationParams(pairing_tilt=tilt))
        print(f"| {tilt:g} | {bits:.4f} |")


if __name__ == "__main__":
    main()
