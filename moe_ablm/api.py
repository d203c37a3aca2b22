"""The verbs in Python: `model = moe_ablm.load("runs/8m")`, then `model.score([(heavy, light)])`.

Each method of the model is a function here, too: `api.score(model, [(heavy, light)])` is the same.
A data frame is answered with a data frame by methods (`antibody_model.AntibodyModel`), with arrays
by functions.

Antibodies are pairs `(heavy, light)`, of which one may be "", or single chains as strings: one of
them, or a list. Tables are taken as well: data frames of pandas or polars, pyarrow tables, dicts of
columns, lists of dicts, with columns named as in files (heavy and light, sequence_aa_heavy ...).
Lower case becomes upper case; what is no amino acid, or too long for the model, raises
`UserError`. All results are held in memory: for files of any size there are the verbs.

    import moe_ablm
    model = moe_ablm.load("runs/quickstart")
    model.score(pandas.read_csv("pairs.csv"))["perplexity"]
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from moe_ablm.errors import ArgumentError, UserError

if TYPE_CHECKING:  # jax, and numpy, when there is something to compute
    import numpy as np

    from moe_ablm.antibody_model import AntibodyModel
    from moe_ablm.data.antibody import Antibody
    from moe_ablm.data.positions import Selection
    from moe_ablm.inference.buckets import Engine

__all__ = ["UserError", "attention", "embed", "infill", "load", "route", "scan", "score"]

P = ParamSpec("P")
R = TypeVar("R")


def in_python(function: Callable[P, R]) -> Callable[P, R]:
    """Errors about an argument in the words of a caller, not in those of the command line."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ArgumentError as error:
            raise UserError(error.in_python) from None

    return call


@in_python
def load(
    run: Path | str,
    precision: str = "float32",
    devices: int = 1,
    batch_tokens: int | None = None,
    germlines: str | Sequence[str] = "human",
) -> "AntibodyModel":
    """A model of a trained run, of what `import` or `upcycle` wrote, or of the Hugging Face hub.

    Args:
      run: its directory, or its address in an object store; `hf:ORG/NAME[@REVISION]`; or
        `transformers:DIR`, a masked language model that transformers loads.
      precision: "float32", "bfloat16_operands" (faster on CPUs with AMX) or "bfloat16".
      devices: how many share the work.
      batch_tokens: at most so many tokens at once, padding included.
      germlines: by which chains are told apart and residues numbered: "human", a folder of FASTA
        files of another species, or several ("human,DIR" or a list), of which those that fit an
        antibody best are taken.

    Raises:
      UserError: there is no model, or it is damaged; the germlines cannot be used.

    Example:
      model = load("runs/quickstart", precision="bfloat16_operands")
    """
    from moe_ablm.data.germline import parse_germlines

    named = parse_germlines(germlines if isinstance(germlines, str) else ",".join(germlines))
    from moe_ablm.antibody_model import KINDS, AntibodyModel
    from moe_ablm.inference.engines import engine_of
    from moe_ablm.store_copies import fetched_run

    model = engine_of(fetched_run(run, "run"), precision, devices, batch_tokens, "run", KINDS)
    assert isinstance(model, AntibodyModel)  # both kinds are
    model.germlines = named
    return model


def given_of(model: "Engine", antibodies: Any, letters: str | None = None) -> list["Antibody"]:
    """The antibodies that a caller passes, checked; `letters` None: those of amino acids."""
    from moe_ablm.inference.antibodies import LETTERS, given
    from moe_ablm.inference.frames import items_of

    items = items_of(antibodies)
    about = model.model
    return given(items, about.layout, about.length, letters or LETTERS, model.germlines)


def chosen_of(
    model: "Engine",
    given: "list[Antibody]",
    regions: str | Sequence[str] | None,
    positions: str | Sequence[str] | None,
    numbering: str,
) -> "tuple[list[Antibody], Selection | None]":
    """The antibodies, and the selection of residues, which chooses some of each."""
    from moe_ablm.data.positions import selection
    from moe_ablm.inference.numbers import nothing_chosen

    chosen = selection(regions, positions, numbering, model.germlines)
    for antibody in given:
        if chosen and (reason := nothing_chosen(antibody, chosen)):
            raise UserError(f"antibodies: {antibody.where}: {reason}")
    return given, chosen


def masked_at(
    model: "Engine",
    given: "list[Antibody]",
    regions: str | Sequence[str] | None,
    positions: str | Sequence[str] | None,
    numbering: str,
) -> "list[Antibody]":
    """The antibodies with the chosen residues masked; as they are where none are chosen."""
    from moe_ablm.inference.numbers import masked

    given, chosen = chosen_of(model, given, regions, positions, numbering)
    return given if chosen is None else [masked(a, chosen) for a in given]


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """UserError unless the value of an argument is one of those known."""
    if value not in known:
        raise ArgumentError(name, value, f"expected one of {', '.join(known)}")


@in_python
def embed(
    model: "Engine", antibodies: Any, level: str = "antibody", layer: int = -1
) -> "np.ndarray | list[np.ndarray]":
    """Hidden states of a layer (0: token embedding, -1: last), special tokens left out.

    Args:
      model: of `load`.
      antibodies: see above.
      level: "antibody" (means over residues), "chain" (means over those of each chain), "residue".
      layer: its number.

    Returns:
      float32 `[antibodies, D]`; else a list of `[chains, D]` or `[residues, D]`, heavy chain first.

    Example:
      embed(model, [("EVQLVES...", "DIQMTQS...")]).shape == (1, model.model.spec.d_model)
    """
    import numpy as np

    from moe_ablm.inference import embed as embeddings

    one_of("level", level, embeddings.LEVELS)
    embedded = embeddings.embed(model, given_of(model, antibodies), level, layer)
    if level != "antibody":
        return embedded
    return np.concatenate([np.zeros((0, model.model.spec.d_model), np.float32), *embedded])


@in_python
def score(
    model: "Engine",
    antibodies: Any,
    level: str = "antibody",
    one_pass: bool = False,
    by_region: bool = False,
) -> "dict[str, np.ndarray] | list[np.ndarray]":
    """Pseudo-log-likelihoods in nats, masking every residue in turn (see `inference.score`).

    Args:
      model: of `load`.
      antibodies: see above.
      level: "antibody" or "residue".
      one_pass: score without masks: faster, but too optimistic.
      by_region: of antibodies, perplexities of frameworks and CDRs, too.

    Returns:
      Columns `[antibodies]`: residues, pll, perplexity, the same for each chain, and by region; or
      a list of log-likelihoods `[residues]`. NaN where there is none.

    Example:
      score(model, {"heavy": ["EVQLVES..."], "light": ["DIQMTQS..."]})["perplexity"]
    """
    import numpy as np

    from moe_ablm.inference import score as scores

    one_of("level", level, scores.LEVELS)
    found = given_of(model, antibodies)
    likelihoods = scores.score(model, found, one_pass)
    if level == "residue":
        return likelihoods
    columns = scores.summary(found, likelihoods, by_region, model.germlines)
    columns.pop("sequence_id")
    return {name: np.array(values) for name, values in columns.items()}


@in_python
def infill(
    model: "Engine",
    antibodies: Any,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    top: int = 5,
    regions: str | Sequence[str] | None = None,
    positions: str | Sequence[str] | None = None,
    numbering: str = "imgt",
) -> list[dict]:
    """Fills in masked residues (`_`, `*` or `<mask>`), the most certain one first.

    Args:
      model: of `load`.
      antibodies: see above.
      samples: completions of each antibody drawn by probability; 0: the most probable residues.
      temperature: of the draws.
      seed: of the draws.
      top: number of candidates.
      regions: mask these regions (IMGT) before, "CDRH3,CDRL3" or a list of names.
      positions: mask these positions before, "H105-H117,L50" or a list of such.
      numbering: scheme of the positions: "imgt", "kabat", "chothia", "martin" or "aho".

    Returns:
      For each completion heavy, light, sample, log_probability and `filled`: place (index among
      all residues, heavy chain first), residue, probability and candidates.

    Example:
      infill(model, ("EVQLV___SGGG...", ""), samples=10, temperature=0.8, seed=1)[0]["heavy"]
    """
    from moe_ablm.inference import infill as infilling
    from moe_ablm.inference.sampling import Sampling

    sampling = Sampling(samples, temperature, seed, top)  # refused before the model is asked
    given = given_of(model, antibodies, infilling.INFILLED)
    given = masked_at(model, given, regions, positions, numbering)
    return [
        {
            "heavy": c.antibody.heavy,
            "light": c.antibody.light,
            "sample": c.sample,
            "log_probability": c.log_probability,
            "filled": [vars(f) for f in c.filled],
        }
        for c in infilling.infill(model, given, sampling)
    ]


@in_python
def scan(
    model: "Engine",
    antibodies: Any,
    method: str = "masked-marginal",
    regions: str | Sequence[str] | None = None,
    positions: str | Sequence[str] | None = None,
    numbering: str = "imgt",
) -> "list[np.ndarray]":
    """Log-odds of every amino acid against the wild type, float32 `[residues, 20]` each.

    In the order of `data.tokenizer.AMINO_ACIDS`; NaN where the wild type is none of the 20, and
    where a residue is not among those chosen.

    Args:
      model: of `load`.
      antibodies: see above.
      method: "masked-marginal", "wild-type-marginal" or "mutant-marginal" (ESM-1v's).
      regions, positions, numbering: the residues to mutate, as in `infill`; None: all.

    Example:
      scan(model, "EVQLVES...", "wild-type-marginal")[0].argmax(axis=1)
    """
    from moe_ablm.inference import scan as scans

    one_of("method", method, scans.METHODS)
    found = given_of(model, antibodies)
    given, chosen = chosen_of(model, found, regions, positions, numbering)
    return scans.scan(model, given, method, chosen)


@in_python
def route(model: "Engine", antibodies: Any) -> "list[dict[str, np.ndarray]]":
    """Which experts compute for each residue, in the M layers that have experts.

    Returns:
      For each antibody `layers [M]`, and `experts` (E for none) and `gates`, `[residues, M, K]`;
      of soft-MoE `dispatch` and `combine`, `[residues, M, E, S]`.

    Example:
      route(model, "EVQLVES...")[0]["experts"][:, 0, 0]
    """
    import numpy as np

    from moe_ablm.inference import route as routing

    layers = np.array(model.model.spec.moe_layers)
    found = routing.route(model, given_of(model, antibodies))
    return [{"layers": layers, **routed._asdict()} for routed in found]


@in_python
def attention(model: "Engine", antibodies: Any, layer: int = -1) -> list[dict]:
    """Attention between the chains of pairs in a layer (0: the first, -1: the last).

    Returns:
      For each antibody `heavy_to_light [H, heavy residues, light residues]` and `light_to_heavy`,
      queries before keys.

    Example:
      attention(model, (heavy, light))[0]["heavy_to_light"].mean(axis=0)
    """
    from moe_ablm.inference import attention as attentions

    found = attentions.attention(model, given_of(model, antibodies), layer)
    return [weights._asdict() for weights in found]
