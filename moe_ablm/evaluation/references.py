"""What the studies published, to be read beside one's own numbers.

Other models, other test sets: they say what size of number to expect, and nothing is tested
against them.
"""

from dataclasses import dataclass

PAIRING = "Burbach & Briney 2024, Patterns 5, 100967"
SCALING = "brineylab/AbLMs-scaling-laws, full data"


@dataclass(frozen=True)
class Headline:
    """The number of an evaluation that its line of the summary tells.

    Attributes:
      metric, labels: of the number; it may have other labels beside.
      text: what it is, in words.
      published: values of reference models, and where they are from; "" where there are none.
    """

    metric: str
    labels: tuple[tuple[str, str], ...]
    text: str
    published: str = ""


HEADLINES = {
    "perplexity": (
        Headline(
            "loss", (("test set", "paired"), ("region", "all")), "loss on pairs, all residues"
        ),
    ),
}
