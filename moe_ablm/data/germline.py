"""Germline V, D and J genes with their IMGT numbering: human ones, or those of a folder.

The human tables are OGRDB's; see `germlines/human/PROVENANCE.md`.

IMGT unique numbering of a V domain (Lefranc et al. 2003, Dev. Comp. Immunol. 27:55): framework 1 is
positions 1-26, CDR1 27-38, framework 2 39-55, CDR2 56-65, framework 3 66-104, CDR3 105-117,
framework 4 118-129; C23, W41, C104 and W/F118 are conserved.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from moe_ablm.errors import ArgumentError

# First IMGT position of CDR1, framework 2, CDR2, framework 3, CDR3.
REGION_STARTS = (27, 39, 56, 66, 105)
HUMAN = "human"  # the germlines of this package
OGRDB = "https://ogrdb.airr-community.org/germline_sets"  # those of other species
LOCI = ("IGH", "IGK", "IGL")
LOCI_OF_CHAIN = {"heavy": ("IGH",), "light": ("IGK", "IGL")}

# Amino acid of codon 16 a + 4 b + c, with A, C, G, T = 0, 1, 2, 3; "*" is a stop.
CODON_TABLE = "KNKNTTTTRSRSIIMIQHQHPPPPRRRRLLLLEDEDAAAAGGGGVVVV*Y*YSSSS*CWCLFLF"
NUCLEOTIDES = "ACGT"
_NUCLEOTIDE_CODE = np.full(128, -1, np.int8)
_NUCLEOTIDE_CODE[[ord(letter) for letter in NUCLEOTIDES]] = np.arange(4)
_AMINO_ACID_OF_CODON = np.frombuffer(CODON_TABLE.encode(), np.uint8)
_J_MOTIF = re.compile("[FW]G.G")
_ENDINGS = (".fasta", ".fa", ".fna")
# OGRDB writes the name alone, IMGT among others apart by bars; V, D or J and no constant gene.
_ALLELE = re.compile(r"IG[HKL][VDJ][^\s|*,;]*\*\w+")


def encode_nucleotides(sequence: str) -> np.ndarray:
    """Codes 0-3 of A, C, G, T, as int8 `[len(sequence)]`; -1 where the letter is another one."""
    return _NUCLEOTIDE_CODE[np.frombuffer(sequence.encode("ascii"), np.uint8)]


def translate_codes(codes: np.ndarray) -> np.ndarray:
    """Amino-acid letters (ASCII, uint8) of nucleotide codes `[..., 3 n]` in frame: `[..., n]`."""
    codes = codes.astype(np.uint8)
    return _AMINO_ACID_OF_CODON[codes[..., 0::3] * 16 + codes[..., 1::3] * 4 + codes[..., 2::3]]


def translate(sequence: str) -> str:
    """Amino acids of the whole codons of an ungapped nucleotide sequence; "*" is a stop."""
    codes = encode_nucleotides(sequence[: len(sequence) // 3 * 3])
    return translate_codes(codes).tobytes().decode()


@dataclass(frozen=True, eq=False)
class Allele:
    """A germline allele."""

    name: str  # e.g. IGHV3-23*01
    nucleotides: str  # ungapped; a V starts at the first codon of the domain

    @property
    def gene(self) -> str:
        return self.name.split("*")[0]

    @property
    def locus(self) -> str:
        return self.name[:3]


@dataclass(frozen=True, eq=False)
class VAllele(Allele):
    """A functional V allele: C23, W41 and C104 are there, and no stop codon up to C104."""

    amino_acids: str  # of the whole codons; the residues after C104 begin the CDR3
    imgt: np.ndarray  # [len(amino_acids)] int16: the IMGT position of each residue
    c104: int  # index of C104 in `amino_acids`

    def region_starts(self) -> list[int]:
        """Index in `amino_acids` where CDR1, FR2, CDR2, FR3 and CDR3 begin."""
        return np.searchsorted(self.imgt, REGION_STARTS).tolist()


@dataclass(frozen=True, eq=False)
class JAllele(Allele):
    """A J allele with its reading frame and the conserved W118 (heavy) or F118 (light)."""

    frame: int  # nucleotides before the first whole codon
    amino_acids: str  # of the whole codons from `frame` on
    motif: int  # index of W/F118 in `amino_acids`

    @property
    def motif_nucleotide(self) -> int:
        """Index in `nucleotides` of the first nucleotide of W/F118."""
        return self.frame + 3 * self.motif


class DAllele(Allele):
    """A D allele (heavy chain only); any of its three reading frames may be used."""


@dataclass(frozen=True, eq=False)
class Germlines:
    """All usable alleles of one species, in the order of their names."""

    v: tuple[VAllele, ...]
    d: tuple[DAllele, ...]
    j: tuple[JAllele, ...]

    def v_of(self, *loci: str) -> tuple[VAllele, ...]:
        """V alleles of the given loci ("IGH", "IGK", "IGL")."""
        return tuple(allele for allele in self.v if allele.locus in loci)

    def j_of(self, *loci: str) -> tuple[JAllele, ...]:
        """J alleles of the given loci ("IGH", "IGK", "IGL")."""
        return tuple(allele for allele in self.j if allele.locus in loci)


def parse_fasta(text: str) -> dict[str, str]:
    """Allele name -> upper-case sequence of a germline FASTA (`>NAME__species`)."""
    records: dict[str, str] = {}
    name = None
    for line in text.splitlines():
        if line.startswith(">"):
            name = line[1:].split("__")[0].strip()
            records[name] = ""
        elif name is not None:
            records[name] += line.strip().upper()
    return records


def parse_v_allele(name: str, gapped: str) -> VAllele | None:
    """A V allele from its IMGT-gapped nucleotides; None where it is not functional."""
    codons = [gapped[i : i + 3] for i in range(0, len(gapped) - 2, 3)]
    imgt = np.array([k for k, codon in enumerate(codons, 1) if codon != "..."], np.int16)
    nucleotides = gapped.replace(".", "")
    if set(nucleotides) - set(NUCLEOTIDES):
        return None
    amino_acids = translate(nucleotides)
    residue_at = dict(zip(imgt.tolist(), amino_acids, strict=True))
    if (residue_at.get(23), residue_at.get(41), residue_at.get(104)) != ("C", "W", "C"):
        return None
    c104 = int(np.searchsorted(imgt, 104))
    if "*" in amino_acids[:c104]:
        return None
    return VAllele(name, nucleotides, amino_acids, imgt, c104)


def parse_j_allele(name: str, nucleotides: str) -> JAllele | None:
    """A J allele in the reading frame that has the [FW]GxG motif and no stop; None without one."""
    if set(nucleotides) - set(NUCLEOTIDES):
        return None
    for frame in range(3):
        amino_acids = translate(nucleotides[frame:])
        motif = _J_MOTIF.search(amino_acids)
        if motif and "*" not in amino_acids:
            return JAllele(name, nucleotides, frame, amino_acids, motif.start())
    return None


def parse_germlines(text: str) -> tuple[str, ...]:
    """The germlines that `--germlines human,DIR` names, each of them loaded.

    Raises:
      ArgumentError: one that cannot be used, or two folders of one name.
    """
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        load_germlines(name)
    called = [Path(name).resolve().name for name in names]
    if len(set(called)) < len(called):
        raise ArgumentError("germlines", text, "two are called the same; rename a folder")
    return names


@cache
def load_germlines(name: str = HUMAN) -> Germlines:
    """Germline genes (functional alleles only), sorted by name.

    Args:
      name: "human", or a folder (see `alleles_of_folder`).

    Raises:
      ArgumentError: the folder has no germlines that can be used.
    """
    records = _alleles_of_package() if name == HUMAN else alleles_of_folder(Path(name))
    v = (parse_v_allele(allele, gapped) for allele, gapped in records["V"])
    j = (parse_j_allele(allele, sequence) for allele, sequence in records["J"])
    germlines = Germlines(
        v=tuple(allele for allele in v if allele is not None),
        d=tuple(DAllele(allele, sequence) for allele, sequence in records["D"]),
        j=tuple(allele for allele in j if allele is not None),
    )
    if name != HUMAN:
        _require_both(germlines, name, len(records["V"]))
    return germlines


def _alleles_of_package() -> dict[str, list[tuple[str, str]]]:
    folder = resources.files("moe_ablm.data").joinpath("germlines", HUMAN)
    return {
        segment: sorted(
            parse_fasta(folder.joinpath(f"{segment.lower()}.fasta").read_text()).items()
        )
        for segment in "VDJ"
    }


def files_of_germlines(folder: Path) -> list[Path]:
    """The FASTA files of a folder, in the order of their names.

    Raises:
      ArgumentError: no such folder.
    """
    if not folder.is_dir():
        raise ArgumentError(
            "germlines",
            str(folder),
            f"no such folder: only {HUMAN} germlines are part of this package; put the gapped "
            f"FASTA of another species ({OGRDB}) into a folder and give that (docs/annotation.md, "
            "Other species)",
        )
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)


def alleles_of_folder(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """V, D and J alleles of the FASTA files of a folder, (name, sequence) sorted by name.

    Which segment a record is of, its name says, wherever in the header it stands; other records
    are passed over. V genes have IMGT's gaps, as in OGRDB's gapped FASTA.

    Raises:
      ArgumentError: no such folder, no FASTA file, or an allele that is there twice and differs.
    """
    files = files_of_germlines(folder)
    found: dict[str, str] = {}
    for path in files:
        try:
            records = parse_fasta(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            told = f"{path.name} cannot be read: {error}"
            raise ArgumentError("germlines", str(folder), told) from error
        for header, sequence in records.items():
            if named := _ALLELE.search(header):
                sequence = sequence.replace("-", ".")
                if found.setdefault(named[0], sequence) != sequence:
                    raise ArgumentError(
                        "germlines",
                        str(folder),
                        f"{named[0]} is there twice, with two sequences (the second in "
                        f"{path.name}): leave one out",
                    )
    if not found:
        raise ArgumentError(
            "germlines",
            str(folder),
            f"no V and J alleles in {len(files)} FASTA files; expected records called IGHV1-1*01 "
            "and the like, V with IMGT's gaps (OGRDB: FASTA gapped)",
        )
    return {
        segment: [(name, found[name]) for name in sorted(found) if name[3] == segment]
        for segment in "VDJ"
    }


def _require_both(germlines: Germlines, name: str, v_alleles: int) -> None:
    """Raises ArgumentError unless there are V genes, and J genes for each of their loci."""
    if not germlines.v:
        raise ArgumentError(
            "germlines",
            name,
            f"of {v_alleles} V alleles none has C23, W41 and C104 where IMGT's gaps (dots) put "
            "them: give the gapped FASTA",
        )
    for locus in LOCI:
        if germlines.v_of(locus) and not germlines.j_of(locus):
            raise ArgumentError(
                "germlines",
                name,
                f"V alleles of {locus} and no J allele of it: put its J genes into the folder, too",
            )
