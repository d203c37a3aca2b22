"""Likelihood of every residue with it alone masked; written to disk as it is computed."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_ablm.data.antibody import Antibody, row_of
from moe_ablm.data.tokenizer import encode
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.subject import Subject
from moe_ablm.files import json_text
from moe_ablm.inference.antibodies import windows
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.output import Output
from moe_ablm.inference.score import masked_log_probabilities

# rows through the encoder between two parts on disk - some four antibodies, a fraction of a minute
# of a small model on two cores - and bytes held for them
WINDOW = (1024, 64 << 20)


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """Of all residues, antibody by antibody, heavy chain first; arrays `[n]`.

    Attributes:
      log_likelihood: float64, nats, of the residue that is there.
      germline: the same of the germline's residue.
      right: bool, whether the most probable token is the residue that is there.
    """

    log_likelihood: np.ndarray
    germline: np.ndarray
    right: np.ndarray


def exact_likelihoods(subject: Subject, everyone: Sequence[Annotated]) -> tuple[Likelihoods, str]:
    """Masks each residue of each antibody in turn.

    What is computed is kept in `subject.work` window by window: the same antibodies and the same
    model go on after the last whole window, with the same result.

    Returns:
      The likelihoods, and a line on how quickly they were computed this time.
    """
    command = {
        "what": "log-likelihood of each residue while it alone is masked",
        "model": subject.engine.model.digest(),
        "precision": subject.engine.precision,
        "antibodies": _digest(everyone),
    }
    name = hashlib.sha256(json_text(command).encode()).hexdigest()[:12]
    file, start = subject.work / f"positions-{name}.parquet", time.monotonic()
    computed: list[Annotated] = []
    with Output(file, command) as output:
        left = [] if output.complete else everyone[output.done :]
        for window in windows([a.antibody for a in left], _cost, WINDOW):
            members = everyone[output.done :][: len(window)]
            output.add(_part(subject.engine, members, output.done), len(members))
            computed += members
        if not output.complete:
            output.finish()
    seconds = time.monotonic() - start
    table = pq.read_table(file)
    likelihoods = Likelihoods(
        table["log_likelihood"].to_numpy().astype(np.float64),
        table["germline_log_likelihood"].to_numpy().astype(np.float64),
        table["right"].to_numpy(),
    )
    return likelihoods, _rate(computed, seconds, len(everyone))


def _cost(antibody: Antibody) -> tuple[int, int]:
    # each residue is a row of some 300 bytes, and gives a log-probability for each of 33 tokens
    return antibody.residues, antibody.residues * 512


def _part(engine: Engine, members: Sequence[Annotated], first: int) -> pa.Table:
    rows = [row_of(a.antibody, engine.model.layout) for a in members]
    columns: dict[str, list] = {
        name: [] for name in ("antibody", "log_likelihood", "germline_log_likelihood", "right")
    }
    by_row = masked_log_probabilities(engine, rows)
    for i, (annotated, row, log_probabilities) in enumerate(
        zip(members, rows, by_row, strict=True)
    ):
        truth = row.tokens[row.places].astype(int)
        letters = "".join(chain.germline for _, chain in annotated.chains())
        germline = encode(np.frombuffer(letters.encode(), np.uint8)).astype(int)
        columns["antibody"].append(np.full(len(truth), first + i, np.int32))
        for name, tokens in (("log_likelihood", truth), ("germline_log_likelihood", germline)):
            columns[name].append(np.take_along_axis(log_probabilities, tokens[:, None], 1)[:, 0])
        columns["right"].append(log_probabilities.argmax(1) == truth)
    return pa.table({name: np.concatenate(parts) for name, parts in columns.items()})


def _digest(everyone: Sequence[Annotated]) -> str:
    digest = hashlib.sha256()
    for a in everyone:
        digest.update(f"{a.heavy.letters} {a.light.letters} ".encode())
        digest.update(f"{a.heavy.germline} {a.light.germline}\n".encode())
    return digest.hexdigest()


def _rate(computed: Sequence[Annotated], seconds: float, everyone: int) -> str:
    kept = everyone - len(computed)
    earlier = (
        f"{kept:,} of {everyone:,} antibodies were kept from an earlier command" if kept else ""
    )
    if not computed:
        return earlier
    positions = sum(a.antibody.residues for a in computed)
    rate = (
        f"{positions:,} masked positions of {len(computed):,} antibodies in {seconds:.1f} s: "
        f"{positions / seconds:,.0f} positions/s, {len(computed) / seconds:.2f} antibodies/s, "
        "compilation included"
    )
    return f"{rate}; {earlier}" if earlier else rate
