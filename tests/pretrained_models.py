"""Tiny random masked language models as transformers saves them, and the text that each reads."""

import json
from dataclasses import dataclass
from pathlib import Path

from moe_ablm.data.tokenizer import AMINO_ACIDS, VOCABULARY

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *AMINO_ACIDS, "X", "U", "B", "Z", "O"]
ANTIBERTA = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *sorted(AMINO_ACIDS), "X", "Ḣ", "Ḷ"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", *AMINO_ACIDS, "X", "<mask>"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "initializer_range": 0.4}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A class of transformers, its settings, and the form of its text as its authors print it."""

    kind: str
    tokenizer: str
    vocabulary: list[str]
    settings: dict
    spaced: bool
    between: str
    marks: tuple[str, str] = ("", "")

    def text(self, heavy: str, light: str) -> str:
        """What its tokenizer is given."""
        join = " ".join if self.spaced else "".join
        chains = [
            join([*([mark] if mark else []), *letters])
            for mark, letters in zip(self.marks, (heavy, light), strict=True)
            if letters
        ]
        return self.between.join(chains)


FAMILIES = {
    "IgBert": Family("Bert", "BertTokenizer", BERT, {}, True, " [SEP] "),
    "AntiBERTa2": Family("RoFormer", "BertTokenizer", ANTIBERTA,
                         {"embedding_size": 16, "max_position_embeddings": 256},
                         True, " [SEP] ", ("Ḣ", "Ḷ")),
    "BALM": Family("Roberta", "RobertaTokenizer", ROBERTA,
                   {"pad_token_id": 1, "max_position_embeddings": 322}, False, "</s>"),
    "ESM-2": Family("Esm", "EsmTokenizer", list(VOCABULARY),
                    {"pad_token_id": 1, "mask_token_id": 32, "token_dropout": True,
                     "position_embedding_type": "rotary", "emb_layer_norm_before": False,
                     "max_position_embeddings": 1026}, False, "<cls><cls>"),
    "ESM-C": Family("Esmc", "EsmcTokenizer", [], {}, False, "|"),
    # no family of antibodies: the pair is the tokenizer's own
    "other": Family("DistilBert", "BertTokenizer", BERT, {"hidden_dim": 32}, True, " [SEP] "),
}  # fmt: skip


def save(family: Family, path: Path, seed: int = 0) -> Path:
    """A directory with random weights and the files of a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(seed)
    size = {"vocab_size": len(family.vocabulary)} if family.vocabulary else {}
    if family.kind == "DistilBert":
        size |= {"dim": 16, "n_layers": 2, "n_heads": 2}
        sizes = {"initializer_range": 0.4}
    else:
        sizes = SIZES
    config = getattr(transformers, f"{family.kind}Config")(**(sizes | family.settings | size))
    getattr(transformers, f"{family.kind}ForMaskedLM")(config).save_pretrained(path)
    about = {"tokenizer_class": family.tokenizer, "do_lower_case": False}
    if family.kind == "RoFormer":  # as published; it needs a library for Chinese
        about["tokenizer_class"] = "RoFormerTokenizer"
    if family.tokenizer == "EsmcTokenizer":
        transformers.EsmcTokenizer().save_pretrained(path)
        return path
    if family.tokenizer == "RobertaTokenizer":
        ids = {token: i for i, token in enumerate(family.vocabulary)}
        (path / "vocab.json").write_text(json.dumps(ids))
        (path / "merges.txt").write_text("#version: 0.2\n")
    else:
        (path / "vocab.txt").write_text("\n".join(family.vocabulary) + "\n", encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    return path
