"""Chains that are no V domain of an antibody are named where they can be; UniProt's sequences."""

import pytest
from test_annotate import CONSTANT, OTHER_FOLDS, TRASTUZUMAB_VH, TRASTUZUMAB_VL

from moe_ablm.data.annotate import annotate_chains
from moe_ablm.data.foreign import foreign

# BLV1H12 (PDB 4K3D), a bovine antibody with a CDRH3 of 63 residues
BOVINE = (
    "QVQLRESGPSLVKPSQTLSLTCTASGFSLSDKAVGWVRQAPGKALEWLGGIDTGGSTGYNPGLKSRLSITKDNSKSQVSLSVSSVTTEDSATYYC"
    "TTVHQETRKTCSDGYIAVDSCGRGQSDGCVNDCNSCYYGWRNCRRQPAIQSYEFHVDAWGRGLLVTVSS"
)


def test_parts_of_other_molecules_are_named():
    kinds = [foreign(sequence) for sequence in OTHER_FOLDS]
    assert kinds == [None, "t_cell_receptor", "t_cell_receptor", None]
    assert {foreign(sequence) for sequence in CONSTANT.values()} == {"constant_region"}


@pytest.mark.parametrize("domain", [TRASTUZUMAB_VH, TRASTUZUMAB_VL])
def test_a_v_domain_is_not(domain):
    assert foreign(domain) is None


@pytest.mark.parametrize("chain", ["heavy", "light"])
def test_the_annotator_says_so(chain):
    assert annotate_chains(list(CONSTANT.values()), chain) == ["constant_region"] * 3


def test_a_cdr3_of_cattle_is_named():
    assert annotate_chains([BOVINE], "heavy") == ["ultralong_cdr3"]
