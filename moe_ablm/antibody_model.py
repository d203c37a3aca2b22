"""A model with the verbs as methods, which take data frames and give such: `moe_ablm.load`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

import numpy as np
import pyarrow as pa

from moe_ablm import api
from moe_ablm.data.antibody import Antibody
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.frames import FrameT, as_frame_of, is_frame, renamed_by_number
from moe_ablm.inference.torch_engine import TorchEngine

if TYPE_CHECKING:
    from anndata import AnnData


class Residues(TypedDict, total=False):
    """Which residues, as in `api.infill`."""

    regions: str | Sequence[str] | None
    positions: str | Sequence[str] | None
    numbering: str


class Draws(Residues, total=False):
    """How residues are filled in, as in `api.infill`."""

    temperature: float
    seed: int
    top: int


class AntibodyModel(Engine):
    """A model that is asked about antibodies, and that the functions of `moe_ablm.api` take.

    Each method takes what the function of its name takes. Of a data frame (pandas, polars, or a
    pyarrow table) the answer is a data frame of the same kind, with the columns that the verb
    writes, those of vectors numbered as in CSV. Lines are in the order of the rows; an index of
    pandas is kept, and repeated where an antibody has several lines.
    Anything else (pairs, single chains, dicts) is answered with arrays, by the function.

    Example:
      >>> import moe_ablm, pandas
      >>> model = moe_ablm.load("runs/8m")
      >>> pairs = pandas.DataFrame(
      ...     {"heavy": ["EVQLVES", "QVQLQESGPG"], "light": ["DIQM", None]},
      ...     index=["mab1", "mab2"],
      ... )
      >>> pairs.join(model.score(pairs)).loc[["mab2"], ["heavy", "residues"]]
                 heavy  residues
      mab2  QVQLQESGPG        10
    """

    @overload
    def embed(self, antibodies: FrameT, level: str = ..., layer: int = ...) -> FrameT: ...
    @overload
    def embed(
        self, antibodies: Any, level: str = ..., layer: int = ...
    ) -> np.ndarray | list[np.ndarray]: ...
    @api.in_python
    def embed(self, antibodies: Any, level: str = "antibody", layer: int = -1) -> Any:
        """Hidden states of a layer: `api.embed`; of a frame columns embedding_0, embedding_1, ...

        Example:
          >>> model.embed([("EVQLVES", "DIQM")]).shape
          (1, 16)
          >>> model.embed(pairs).columns[-1], model.embed(pairs, level="chain").shape
          ('embedding_15', (3, 18))
        """
        if not is_frame(antibodies):
            return api.embed(self, antibodies, level, layer)
        return self._embedded(antibodies, level, layer)

    def _embedded(self, antibodies: FrameT, level: str, layer: int) -> FrameT:
        from moe_ablm.inference import embed as embeddings

        api.one_of("level", level, embeddings.LEVELS)

        def answer(given: list[Antibody]) -> pa.Table:
            return embeddings.table(self, given, level, layer)

        return self._framed(antibodies, answer, alone=level == "antibody")

    @api.in_python
    def anndata(self, antibodies: Any, level: str = "antibody", layer: int = -1) -> "AnnData":
        """Embeddings as AnnData: vectors in `X`; the columns and the index of a frame in `obs`.

        Raises:
          UserError: anndata is not installed.

        Example:
          >>> pairs.assign(donor=["d1", "d2"]).pipe(model.anndata).obs["donor"].to_list()
          ['d1', 'd2']
        """
        from moe_ablm.inference import embed as embeddings
        from moe_ablm.inference.annotated_matrix import embedded, require_anndata

        require_anndata("AntibodyModel.anndata")
        api.one_of("level", level, embeddings.LEVELS)
        return embedded(self, api.given_of(self, antibodies), level, layer, antibodies)

    @overload
    def score(
        self, antibodies: FrameT, level: str = ..., one_pass: bool = ..., by_region: bool = ...
    ) -> FrameT: ...
    @overload
    def score(
        self, antibodies: Any, level: str = ..., one_pass: bool = ..., by_region: bool = ...
    ) -> dict[str, np.ndarray] | list[np.ndarray]: ...
    @api.in_python
    def score(
        self,
        antibodies: Any,
        level: str = "antibody",
        one_pass: bool = False,
        by_region: bool = False,
    ) -> Any:
        """Pseudo-log-likelihoods in nats, and perplexities: `api.score`.

        Example:
          >>> model.score(pairs)[["residues", "pll", "perplexity"]].shape
          (2, 3)
          >>> list(model.score(pairs, level="residue").columns[:5])
          ['sequence_id', 'chain', 'position', 'residue', 'number']
        """
        if not is_frame(antibodies):
            return api.score(self, antibodies, level, one_pass, by_region)
        from moe_ablm.inference import score as scores

        api.one_of("level", level, scores.LEVELS)

        def answer(given: list[Antibody]) -> pa.Table:
            named = self.germlines
            return scores.table(self, given, level, one_pass, by_region, germlines=named)

        return self._framed(antibodies, answer, alone=level == "antibody")

    @overload
    def infill(self, antibodies: FrameT, samples: int = ..., **draws: Unpack[Draws]) -> FrameT: ...
    @overload
    def infill(self, antibodies: Any, samples: int = ..., **draws: Unpack[Draws]) -> list[dict]: ...
    @api.in_python
    def infill(
        self,
        antibodies: Any,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
        top: int = 5,
        regions: str | Sequence[str] | None = None,
        positions: str | Sequence[str] | None = None,
        numbering: str = "imgt",
    ) -> Any:
        """Masked residues (`_`, `*` or `<mask>`) filled in: `api.infill`.

        Of a frame a line for each completion, without the candidates of each residue.

        Example:
          >>> done = model.infill(("EVQ__ES", "DIQM"), samples=2, seed=1)
          >>> len(done), len(done[0]["heavy"]), len(done[0]["filled"])
          (2, 7, 2)
          >>> masked = pairs.assign(heavy=["EVQ__ES", "QVQ___SGPG"])
          >>> list(model.infill(masked)["filled"])
          [2, 3]
        """
        drawn, chosen = (samples, temperature, seed, top), (regions, positions, numbering)
        if not is_frame(antibodies):
            return api.infill(self, antibodies, *drawn, *chosen)
        from moe_ablm.inference import infill as infilling
        from moe_ablm.inference.sampling import Sampling

        sampling = Sampling(*drawn)

        def answer(given: list[Antibody]) -> pa.Table:
            masked = api.masked_at(self, given, *chosen)
            return infilling.table(self, masked, "antibody", sampling)

        return self._framed(antibodies, answer, letters=infilling.INFILLED)

    @overload
    def scan(
        self, antibodies: FrameT, method: str = ..., **residues: Unpack[Residues]
    ) -> FrameT: ...
    @overload
    def scan(
        self, antibodies: Any, method: str = ..., **residues: Unpack[Residues]
    ) -> list[np.ndarray]: ...
    @api.in_python
    def scan(
        self,
        antibodies: Any,
        method: str = "masked-marginal",
        regions: str | Sequence[str] | None = None,
        positions: str | Sequence[str] | None = None,
        numbering: str = "imgt",
    ) -> Any:
        """Log-odds of single mutants against the wild type: `api.scan`; of a frame a line each.

        Example:
          >>> model.scan(("EVQLVESGGG", ""))[0].shape  # residues, amino acids
          (10, 20)
          >>> mutants = model.scan(pairs, "wild-type-marginal")
          >>> len(mutants.loc["mab2"]) == 10 * 19
          True
        """
        if not is_frame(antibodies):
            return api.scan(self, antibodies, method, regions, positions, numbering)
        from moe_ablm.inference import scan as scans

        api.one_of("method", method, scans.METHODS)

        def answer(given: list[Antibody]) -> pa.Table:
            given, chosen = api.chosen_of(self, given, regions, positions, numbering)
            found = scans.scan(self, given, method, chosen)
            return scans.table(given, found, numbering, self.germlines)

        return self._framed(antibodies, answer)

    @overload
    def route(self, antibodies: FrameT) -> FrameT: ...
    @overload
    def route(self, antibodies: Any) -> list[dict[str, np.ndarray]]: ...
    @api.in_python
    def route(self, antibodies: Any) -> Any:
        """Experts of every residue and layer, with gates: `api.route`; of a frame a line each.

        Example:
          >>> model.route("EVQLVESGGG")[0]["experts"].shape  # residues, layers, choices
          (10, 1, 2)
          >>> list(model.route(pairs).columns[-3:])
          ['layer', 'expert', 'gate']
        """
        if not is_frame(antibodies):
            return api.route(self, antibodies)
        from moe_ablm.inference import route as routing

        def answer(given: list[Antibody]) -> pa.Table:
            return routing.table(self, given, germlines=self.germlines)

        return self._framed(antibodies, answer)

    @overload
    def attention(self, antibodies: FrameT, layer: int = ...) -> FrameT: ...
    @overload
    def attention(self, antibodies: Any, layer: int = ...) -> list[dict]: ...
    @api.in_python
    def attention(self, antibodies: Any, layer: int = -1) -> Any:
        """Attention between the chains of pairs, `[heads, queries, keys]`: `api.attention`.

        Of a frame the mean over heads, a line for each pair of residues.

        Example:
          >>> model.attention(("EVQLVES", "DIQM"))[0]["heavy_to_light"].shape
          (2, 7, 4)
          >>> len(model.attention(pairs[:1])) == 2 * 7 * 4
          True
        """
        if not is_frame(antibodies):
            return api.attention(self, antibodies, layer)
        from moe_ablm.inference import attention as attentions

        def answer(given: list[Antibody]) -> pa.Table:
            return attentions.table(self, given, layer, heads=False)

        return self._framed(antibodies, answer)

    def _framed(
        self,
        frame: FrameT,
        answer: Callable[[list[Antibody]], pa.Table],
        alone: bool = False,
        letters: str | None = None,
    ) -> FrameT:
        """The answer about the antibodies of a frame, as a frame of its kind.

        Args:
          frame: of the caller.
          answer: the table of a verb.
          alone: whether it has one line an antibody, which needs no name then.
          letters: allowed in sequences.
        """
        given = api.given_of(self, frame, letters)
        return as_frame_of(frame, given, answer(renamed_by_number(given)), alone)


class PretrainedAntibodyModel(AntibodyModel, TorchEngine):
    """The same of a model that transformers computes."""


KINDS = (AntibodyModel, PretrainedAntibodyModel)
