"""Claims declared before a suite runs: only these get a verdict when models are compared.

    {"claims": ["specialisation", "pairing"], "routing": {...}, "mutations": {...}}

A question asked after the numbers were seen is exploratory: among many possible questions, one was
bound to stand out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLAIMS = "claims"  # key of a suite, and of an evaluation's files
SPECIALISATION, PAIRING, EXPERTS = "specialisation", "pairing", "experts"
RESTS_ON = {SPECIALISATION: "routing", PAIRING: "mutations", EXPERTS: "perplexity"}  # evaluations


def declared(names: Sequence[str], before: Mapping[str, Any], out: Path) -> list[str]:
    """Claims that count: named now or by an earlier command, before what they rest on was known.

    Args:
      names: those of this command's suite.
      before: what an earlier command kept in `out`.
      out: directory of the evaluation.
    """
    early = [n for n in names if not (out / RESTS_ON[n] / "result.json").exists()]
    return [n for n in RESTS_ON if n in before.get(CLAIMS, []) or n in early]
