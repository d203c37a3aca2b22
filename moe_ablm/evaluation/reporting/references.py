"""Published numbers of the studies, shown beside one's own.

Their models and test sets differ: they show the size to expect, and nothing is tested against them.
"""

from dataclasses import dataclass

from moe_ablm.evaluation.nulls import POSITION, SHUFFLED, UNTRAINED

# Burbach & Briney 2024, Patterns 5, 100967, https://doi.org/10.1016/j.patter.2024.100967
PAIRING = "Burbach & Briney 2024"
# brineylab/AbLMs-scaling-laws, models trained on all of its pairs; frozen base, 5 folds
SCALING = "AbLMs scaling study"


@dataclass(frozen=True)
class Headline:
    """A number of an evaluation that the summary shows.

    Attributes:
      metric, labels: of the number; it may have other labels beside.
      text: what it is, in words.
      published: values of reference models, and where they are from; "" where there are none.
    """

    metric: str
    labels: tuple[tuple[str, str], ...]
    text: str
    published: str = ""


FROZEN = ("predictor", "frozen encoder, head")
ALL = (("test set", "paired"), ("region", "all"))
CDRH3 = (("test set", "paired"), ("region", "CDRH3"))
HEADLINES = {
    "perplexity": (
        Headline("loss", ALL, "loss on pairs", f"35M 0.240, 650M 0.240 ({SCALING}, its data)"),
        Headline("loss", CDRH3, "loss on pairs, CDRH3"),
    ),
    "positions": (
        Headline(
            "cross_entropy",
            (("chain", "heavy"), ("residues", "CDR3")),
            "cross-entropy of CDRH3, each residue masked alone",
        ),
        Headline(
            "cross_entropy",
            (("chain", "heavy"), ("residues", "mutated")),
            "cross-entropy of mutated residues, heavy chains",
        ),
    ),
    "mutations": tuple(
        headline
        for chain, native, germline in (("heavy", 0.067, 0.017), ("light", 0.073, 0.011))
        for headline in (
            Headline(
                "likelihood",
                (("masked", chain), ("partner", "native"), ("residue", "mutated")),
                f"likelihood of the mutated residue, {chain} chain masked, native partner",
                f"BALM-paired {native} (germline partner {germline}; {PAIRING}, Fig. 3)",
            ),
            Headline(
                "gain",
                (("masked", chain), ("partner", "random")),
                f"gain of the native partner over a random one, {chain} chain masked",
            ),
        )
    ),
    "attention": (
        Headline(
            "cdr_over_fr",
            (("direction", "both"), ("partner", "native")),
            "cross-chain attention of a CDR residue over that of an FR residue",
        ),
        # the form of the paper's code, see `evaluation.attention`
        Headline(
            "cdr_over_all",
            (("direction", "both"), ("partner", "native")),
            "cross-chain attention to CDRs over their share of residues",
            f"ft-ESM 2.05, BALM-paired 1.44 ({PAIRING}, Fig. 4)",
        ),
        Headline(
            "native_over_random",
            (("direction", "both"),),
            "attention to CDRs over FRs, native over random partners",
        ),
    ),
    "embeddings": tuple(
        Headline("purity", (("chain", c),), f"neighbours with the same V gene, {c} chains")
        for c in ("heavy", "light")
    ),
    "routing": (
        Headline(
            "cdrh3_excess",
            (("matched", "chain and residue"),),
            "log2 of what CDRH3's expert takes of it over the same residues of the chain",
        ),
        *(
            Headline(
                "beyond_null_excess",
                (("region", "CDRH3"), ("matched", "chain and residue"), ("null", null)),
                f"... beyond {words}",
            )
            for null, words in (
                (POSITION, "smooth random routers by position"),
                (SHUFFLED, "this router with the positions of other antibodies"),
                (UNTRAINED, "this encoder untrained"),
            )
        ),
    ),
    "pairing": (
        Headline("AUC", (("negatives", "random"), FROZEN), "AUC, native against any other pair"),
        Headline(
            "AUC", (("negatives", "matched"), FROZEN), "AUC, other pairs matched on mutations"
        ),
    ),
    "classification": (
        Headline(
            "AUC",
            (("task", "HD-CoV"), FROZEN),
            "AUC of HD against CoV, frozen encoder",
            f"8M 0.742, 350M 0.786, 650M 0.781 ({SCALING})",
        ),
        Headline(
            "MCC",
            (("task", "HD-CoV"), FROZEN),
            "MCC of HD against CoV, frozen encoder",
            f"8M 0.356, 350M 0.431, 650M 0.419 ({SCALING})",
        ),
        Headline(
            "accuracy",
            (("task", "HD-CoV"), FROZEN),
            "accuracy of HD against CoV, frozen encoder",
            f"8M 0.676, 350M 0.715, 650M 0.709 ({SCALING})",
        ),
        Headline(
            "accuracy",
            (("task", "CoV-Flu-HD"), FROZEN),
            "accuracy of three classes, frozen encoder",
            f"8M 0.607, 350M 0.676 ({SCALING})",
        ),
        Headline(
            "MCC",
            (("task", "CoV-Flu-HD"), FROZEN),
            "MCC of three classes, frozen encoder",
            f"8M 0.417, 350M 0.517 ({SCALING})",
        ),
    ),
    "fitness": (Headline("spearman", (), "Spearman's correlation with fitness"),),
    "proteins": (
        Headline("spearman", (), "Spearman's correlation"),
        Headline("accuracy", (), "accuracy"),
    ),
}
