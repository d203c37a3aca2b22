"""Numbers and regions of the residues of antibodies, and the residues chosen by them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.germline import HUMAN
from moe_ablm.data.numbering import Numbering, number_chains
from moe_ablm.data.positions import Selection
from moe_ablm.data.regions import CHAINS, FR4, region_names, regions_from_cdr_mask
from moe_ablm.data.tokenizer import MASKED
from moe_ablm.inference.antibodies import labels

_NAMES = np.array((*region_names(), ""))  # the last is that of -1


def regions(
    antibodies: Sequence[Antibody], germlines: Sequence[str] = (HUMAN,)
) -> list[np.ndarray]:
    """Index in `region_names` of the region of each residue, int64 `[residues]`; -1: not known.

    Regions come from the annotation of the source, or else are computed, by the germlines that fit
    an antibody best (see `germline.load_germlines`).
    """
    return [cells for cells, _ in _located(antibodies, "imgt", False, germlines)]


def _located(
    antibodies: Sequence[Antibody], scheme: str, numbers: bool, germlines: Sequence[str]
) -> list[tuple[np.ndarray, list[str]]]:
    """Regions (see `regions`) and numbers ("" outside a V domain) of each antibody's residues."""
    found = [(np.full(a.residues, -1), [""] * a.residues) for a in antibodies]
    numbered = [_numbered(antibodies, scheme, numbers, name) for name in germlines]
    for i, (antibody, (cells, names)) in enumerate(zip(antibodies, found, strict=True)):
        fitting = max((by_chain[i] for by_chain in numbered), key=_fit)
        for code, numbering in fitting.items():
            first = code * len(antibody.heavy) + numbering.start
            last = first + len(numbering.numbers)
            names[first:last] = numbering.numbers
            cells[first:last] = _indices(numbering.regions, code)
        for code, mask in enumerate(antibody.cdr_masks):
            if mask:
                begin = code * len(antibody.heavy)
                region = regions_from_cdr_mask(
                    np.frombuffer(mask.encode(), np.uint8), np.array([0, len(mask)])
                )
                cells[begin : begin + len(mask)] = _indices(region, code)
    return found


def _numbered(
    antibodies: Sequence[Antibody], scheme: str, numbers: bool, germlines: str
) -> list[dict[int, Numbering]]:
    """Of each antibody the numbering of its chains by one set of germlines, by the chain's index.

    Without `numbers` only that of chains whose regions are not known.
    """
    found: list[dict[int, Numbering]] = [{} for _ in antibodies]
    for code, chain in enumerate(CHAINS):
        chains = [(a.heavy, a.light)[code] for a in antibodies]
        wanted = [
            i
            for i, antibody in enumerate(antibodies)
            if chains[i] and (numbers or not antibody.cdr_masks[code])
        ]
        texts = [chains[i] for i in wanted]
        told = number_chains(texts, chain, scheme, unknown=True, germlines=germlines)
        for i, numbering in zip(wanted, told, strict=True):
            if isinstance(numbering, Numbering):
                found[i][code] = numbering
    return found


def _fit(by_chain: dict[int, Numbering]) -> tuple[int, float]:
    """How well germlines fit an antibody: chains that they number, and mean V identity of these."""
    identities = [numbering.v_identity for numbering in by_chain.values()]
    return len(identities), sum(identities) / max(len(identities), 1)


def _indices(region: np.ndarray, code: int) -> np.ndarray:
    """Indices in `region_names` of region codes of a chain; -1 for none."""
    return np.where(region > 0, code * FR4 + region.astype(int) - 1, -1)


def numbered_labels(
    antibodies: Sequence[Antibody], scheme: str, germlines: Sequence[str] = (HUMAN,)
) -> dict[str, list]:
    """`labels` with `number`, by a scheme, and `region`, by IMGT; "" where there is none."""
    columns = labels(antibodies)
    located = _located(antibodies, scheme, True, germlines)
    columns["number"] = [number for _, names in located for number in names]
    columns["region"] = [str(name) for cells, _ in located for name in _NAMES[cells]]
    return columns


@lru_cache(maxsize=4096)  # whether, how many and which are asked one after the other
def chosen(antibody: Antibody, selection: Selection) -> np.ndarray:
    """Which residues a selection chooses, bool `[residues]`, heavy chain first; read-only."""
    ((cells, names),) = _located([antibody], selection.scheme, True, selection.germlines)
    cut = len(antibody.heavy)
    parts = zip(CHAINS, (names[:cut], names[cut:]), (cells[:cut], cells[cut:]), strict=True)
    found = np.concatenate([selection.chosen(c, n, _NAMES[r].tolist()) for c, n, r in parts])
    found.flags.writeable = False
    return found


def masked(antibody: Antibody, selection: Selection) -> Antibody:
    """The antibody with the chosen residues masked."""
    letters = np.array(list(antibody.heavy + antibody.light))
    letters[chosen(antibody, selection)] = MASKED
    text, cut = "".join(letters.tolist()), len(antibody.heavy)
    return replace(antibody, heavy=text[:cut], light=text[cut:])


def nothing_chosen(antibody: Antibody, selection: Selection) -> str | None:
    """Why a selection chooses no residue of an antibody, or None."""
    if chosen(antibody, selection).any():
        return None
    return (
        "nothing chosen: no residue is in --regions or --positions (its chain is missing, is no "
        "whole V domain, or has a gap there)"
    )
