"""What a chain without an antibody's V domain is, where that can be told: a T-cell receptor, ..."""

import re

# Beginnings of human constant domains: CH1 of IgG, IgM and IgA, CH2 and CH3 of IgG, C kappa, C
# lambda (UniProt P01857, P01871, P01876, P01834, P0CG04).
_CONSTANT = re.compile(
    "PSVFPLAP|SAPTLFPLVSC|TSPKVFPLSL|PSVFLFPPKPKDT|GFYPSDIAVEW|PSVFIFPPSDEQL|PSVTLFPPSSEEL"
)
# C104, the CDR3's first residues, framework 4: CAS.. FGxGTxLxVx of beta, CA.. [FW]GxGTxLxVxP of
# alpha chains; and the beginnings of their constant domains (UniProt P01850, P01848).
_T_CELL = re.compile(
    "CA[SIT][SRTGN][A-Z]{2,22}FG.GT.L.V|CA[A-Z]{5,22}[FW]G.GT.[LV].[VI].P"
    "|NVFPPEVAVFEPSEAEI|KVFPPEVAVFEPSEAEI|NPDPAVYQLRDS"
)


def foreign(sequence: str) -> str | None:
    """Of what kind a protein is that has no V domain of an antibody: a reason, or None."""
    if _T_CELL.search(sequence):
        return "t_cell_receptor"
    return "constant_region" if _CONSTANT.search(sequence) else None
