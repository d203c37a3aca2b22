"""Tables with the headers that public tools write, small and right, to be mutated by tests."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

H = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC"
    "AKDRGYYFDYWGQGTLVTVSS"
)
L = (
    "DIQMTQSPSSLSASVGDRVTITCRASQSISSYLNWYQQKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYC"
    "QQSYSTPLTFGQGTKVEIK"
)
CODON = {
    **{"A": "GCC", "C": "TGC", "D": "GAC", "E": "GAG", "F": "TTC", "G": "GGC", "H": "CAC"},
    **{"I": "ATC", "K": "AAG", "L": "CTG", "M": "ATG", "N": "AAC", "P": "CCC", "Q": "CAG"},
    **{"R": "CGG", "S": "AGC", "T": "ACC", "V": "GTG", "W": "TGG", "Y": "TAC"},
}
CUTS = {H: (0, 25, 33, 50, 58, 96, 107, 117), L: (0, 26, 32, 49, 52, 88, 97, 107)}
REGIONS = ("fwr1", "cdr1", "fwr2", "cdr2", "fwr3", "cdr3", "fwr4")


def coded(protein: str) -> str:
    """A protein in codons of the standard genetic code."""
    return "".join(CODON[letter] for letter in protein)


def _values(chain: str, cell: int) -> dict[str, str]:
    """Values by kind of column of one chain."""
    locus, v = ("IGH", "IGHV3-23*01") if chain == H else ("IGK", "IGKV1-39*01")
    regions = zip(REGIONS, zip(CUTS[chain][:-1], CUTS[chain][1:], strict=True), strict=True)
    return {name: chain[a:b] for name, (a, b) in regions} | {
        **{"aa": chain, "nt": coded(chain), "locus": locus, "v": v, "imgt": f"Homsap {v} F"},
        **{"c": f"{locus}{'G1' if locus == 'IGH' else 'C'}", "cell": f"AAC{cell}-1"},
        **{"id": f"AAC{cell}-1_contig_{locus}", "yes": "T", "true": "true", "n": "7", "m": "90"},
        **{"donor": f"D{cell}", "sample": "s1", "empty": ""},
    }


# A row for each chain: {format: {column: kind}}, as written by Cell Ranger 7 (CSV, AIRR), IgBLAST
# 1.21, Change-O 1, IMGT/HighV-QUEST (AIRR), BD Rhapsody, OAS.
CHAIN_TABLES = {
    "10x": dict.fromkeys(("length", "d_gene", "raw_clonotype_id"), "empty")
    | {"barcode": "cell", "is_cell": "true", "contig_id": "id", "high_confidence": "true"}
    | {"chain": "locus", "v_gene": "v", "c_gene": "c", "full_length": "true", "productive": "true"}
    | {name: name for name in REGIONS}
    | {"reads": "m", "umis": "n", "donor": "donor", "origin": "sample", "sample": "sample"},
    "10x-airr": {"cell_id": "cell", "sequence_id": "id", "sequence": "nt", "sequence_aa": "aa"}
    | {"productive": "yes", "v_call": "v", "c_call": "c", "consensus_count": "m"}
    | {"duplicate_count": "n", "is_cell": "yes"},
    "igblast": {"sequence_id": "id", "sequence": "nt", "locus": "locus", "productive": "yes"}
    | {"v_call": "v", "sequence_alignment": "nt", "sequence_alignment_aa": "aa", "np1": "empty"},
    "change-o": {"SEQUENCE_ID": "id", "SEQUENCE_INPUT": "nt", "FUNCTIONAL": "yes", "V_CALL": "v"}
    | {"SEQUENCE_IMGT": "nt", "CELL": "cell", "LOCUS": "locus", "UMICOUNT": "n", "CONSCOUNT": "m"},
    "v-quest": {"sequence_id": "id", "sequence": "nt", "productive": "yes", "v_call": "imgt"}
    | {"sequence_alignment_aa": "aa", "cell_id": "cell", "locus": "empty"},
    "rhapsody": {"cell_id": "cell", "locus": "locus", "v_call": "v", "sequence_alignment_aa": "aa"}
    | {"umi_count": "n", "consensus_count": "m", "high_confidence": "true"},
    "oas-unpaired": {"sequence": "nt", "locus": "locus", "v_call": "v", "productive": "yes"}
    | {"sequence_alignment_aa": "aa", "Redundancy": "n"},
}
# A row for each antibody: {format: header}, columns by what they hold, as CoV-AbDab, Thera-SAbDab,
# FLAb, OAS, classification sets and the studies have them.
PAIR_TABLES = {
    "cov-abdab": {"Name": "id", "Ab or Nb": "sample", "VHorVHH": "H", "VL": "L", "CDRH3": "empty"},
    "thera-sabdab": {"Therapeutic": "id", "Format": "sample", "HeavySequence": "H"}
    | {"LightSequence": "L"},
    "flab": {"heavy": "H", "light": "L", "fitness": "n"},
    "nanobodies": {"VHH_sequence": "H", "fitness": "n"},
    "oas-paired": {"sequence_id_heavy": "id", "productive_heavy": "yes", "v_call_heavy": "empty"}
    | {"sequence_alignment_aa_heavy": "H", "sequence_alignment_aa_light": "L"}
    | {"productive_light": "yes"},
    "classes": {"name": "id", "h_sequence": "H", "l_sequence": "L", "label": "sample"},
    "study": {"sequence_id": "id", "sequence_aa_heavy": "H", "sequence_aa_light": "L"}
    | {"donor": "donor", "cluster": "n"},
    "joined": {"sequence_id": "id", "sequence": "H|L"},
}


def table(name: str, cells: int = 3) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a format with a heavy and a light chain of each cell."""
    rows = []
    for cell in range(cells):
        if name in CHAIN_TABLES:
            for chain in (H, L):
                values = _values(chain, cell)
                rows.append([values[kind] for kind in CHAIN_TABLES[name].values()])
        else:
            values = _values(H, cell) | {"H": H, "L": L, "H|L": f"{H}|{L}"}
            rows.append([values[kind] for kind in PAIR_TABLES[name].values()])
    return list(CHAIN_TABLES.get(name) or PAIR_TABLES[name]), rows


WORDS = ("", "NA", "nan", "None", "ND", "N/A", "-", " ", "null", "not determined")
BOOLEANS = ("TRUE", "False", "t", "F", "1", "0", "yes", "no", "true", "None", "NA", "maybe")


def mutated(rng: np.random.Generator, header: list[str], rows: list[list[str]]) -> list[list[str]]:
    """Columns, name first, of a table as people and programs leave it: blanks, words, booleans,
    columns moved, renamed or lost, rows twice or cut short."""
    columns = [[name, *(row[i] for row in rows)] for i, name in enumerate(header)]
    for _ in range(rng.integers(1, 5)):
        column = columns[rng.integers(len(columns))]
        at = int(rng.integers(1, max(len(column), 2)))
        what = rng.integers(9)
        if what == 0:
            column[at % len(column)] = str(rng.choice(WORDS))
        elif what == 1:
            column[1:] = [str(rng.choice(WORDS)) for _ in column[1:]]
        elif what == 2:
            column[1:] = [str(rng.choice(BOOLEANS)) for _ in column[1:]]
        elif what == 3:
            rng.shuffle(columns)
        elif what == 4:
            column[0] = str(
                rng.choice([column[0].upper(), column[0].title(), "x", column[0] + "_"])
            )
        elif what == 5:
            columns.append(list(column))
        elif what == 6 and len(columns) > 1:
            columns.remove(column)
        elif what == 7:
            again = int(rng.integers(1, len(column)))
            for each in columns:
                each.append(each[again])
        else:
            text, cut = column[at % len(column)], int(rng.integers(0, 150))
            column[at % len(column)] = text[:cut] + str(rng.choice(["nan", "X", "*", " ", ""]))
    return columns


KINDS = ("text", "text", "text", "parquet", "json", "fasta")


def write_mutated(rng: np.random.Generator, path: Path, name: str) -> tuple[str, set[int]]:
    """Writes a mutated table as text, parquet, a JSON of contigs or FASTA.

    Returns:
      The kind, and how many rows a reader may count: of text, the header and blank lines included
      or not.
    """
    columns = mutated(rng, *table(name, cells=int(rng.integers(1, 4))))
    rows, kind = len(columns[0]) - 1, str(rng.choice(KINDS))
    if kind == "parquet":
        values = [pa.array(column[1:], pa.string()) for column in columns]
        pq.write_table(pa.Table.from_arrays(values, [column[0] for column in columns]), path)
    elif kind == "json":
        named = {"contig_id": "contig_name", "umis": "umi_count", "reads": "read_count"}
        contigs = [{named.get(c[0], c[0]): c[i] for c in columns} for i in range(1, rows + 1)]
        for contig in contigs:
            contig |= {r: {"aa_seq": contig[r]} for r in REGIONS if contig.get(r, "") != ""}
        path.write_text(json.dumps(contigs))
    elif kind == "fasta":
        ends = ("|H", "|L", "_VH", "", " x")
        records = [
            (str(i), str(rng.choice(ends)), c[i]) for i in range(1, rows + 1) for c in columns
        ]
        path.write_text("".join(f">{name}{end}\n{text}\n" for name, end, text in records))
        rows = len(records)
    if kind != "text":
        return kind, {rows}
    comma = str(rng.choice([",", "\t", ";"]))
    lines = [[each[i] for each in columns] for i in range(rows + 1)]
    if rng.random() < 0.1:
        lines[rng.integers(len(lines))].pop()
    lines = [comma.join(line) for line in lines]
    path.write_text("\n".join(lines) + "\n")
    # in a table of one column a line of spaces is a blank cell, or no row
    return kind, {sum(map(bool, some)) for some in (lines, [line.strip() for line in lines])}
