"""The vocabulary against ESM-2's table, and what is no amino acid."""

import numpy as np

from moe_ablm.data import tokenizer
from moe_ablm.data.tokenizer import LAYOUTS

# vocab.txt of facebook/esm2_t6_8M_UR50D on Hugging Face
ESM2 = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]


def ascii_codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("latin-1"), np.uint8)


def test_the_vocabulary_is_that_of_esm2():
    assert list(tokenizer.VOCABULARY) == ESM2
    assert (tokenizer.CLS, tokenizer.PAD, tokenizer.EOS, tokenizer.UNK) == (0, 1, 2, 3)
    assert (tokenizer.NULL, tokenizer.MASK) == (31, 32)


def test_letters_become_the_ids_of_the_table():
    letters = "ACDEFGHIKLMNPQRSTVWY"
    assert tokenizer.encode(ascii_codes(letters)).tolist() == [ESM2.index(x) for x in letters]
    assert tokenizer.decode(tokenizer.encode(ascii_codes(letters))) == letters


def test_only_the_twenty_upper_case_letters_are_valid():
    every = np.arange(256, dtype=np.uint8)
    valid = {chr(c) for c in every[~tokenizer.invalid(every)]}
    assert valid == set("ACDEFGHIKLMNPQRSTVWY")
    assert (tokenizer.encode(every)[tokenizer.invalid(every)] == 255).all()


def test_amino_acid_ids_are_4_to_23():
    ids = np.arange(33)
    assert np.flatnonzero(tokenizer.is_amino_acid(ids)).tolist() == list(range(4, 24))


def test_special_tokens_are_shown_as_question_marks():
    assert tokenizer.decode(np.array([0, 4, 32, 2])) == "?L??"


def test_layouts_spell_out_their_special_tokens():
    spelt = {
        name: [[ESM2[t] for t in part] for part in (x.before, x.between, x.after)]
        for name, x in LAYOUTS.items()
    }
    assert spelt == {
        "esm": [["<cls>"], ["<cls>", "<cls>"], ["<eos>"]],
        "balm": [["<cls>"], ["<eos>"], ["<eos>"]],
        "sep": [["<cls>"], ["<null_1>"], ["<eos>"]],
    }
