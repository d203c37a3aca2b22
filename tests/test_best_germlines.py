"""Which of several germlines fit a row best, by a table that is written out."""

import numpy as np
import pyarrow as pa

from moe_ablm.data.best_germlines import best_fitting


def annotated_by(name: str, heavy: list, light: list, reasons: list[str]):
    columns = {"v_gene_heavy": [name] * len(heavy)}
    columns |= {"v_identity_aa_heavy": heavy, "v_identity_aa_light": light}
    types = {"v_gene_heavy": pa.string()}
    arrays = [pa.array(values, types.get(n, pa.float64())) for n, values in columns.items()]
    return pa.record_batch(arrays, list(columns)), np.array(reasons, object)


def test_the_highest_mean_identity_wins_and_the_first_of_equal_ones():
    # mean of both; one chain alone; equal; one that rejects; both reject; annotation was given
    human = annotated_by(
        "human",
        [0.9, 0.8, 0.7, 0.9, None, 0.5],
        [0.5, None, 0.7, 0.9, None, None],
        ["", "", "", "heavy: no_fr4", "light: wrong_chain", ""],
    )
    mouse = annotated_by(
        "mouse",
        [0.8, 0.9, 0.6, 0.2, None, 0.5],
        [0.7, None, 0.8, None, None, None],
        ["", "", "", "", "heavy: truncated_end", ""],
    )
    computed = np.array([True] * 5 + [False])
    done, reasons = best_fitting([human, mouse], ("human", "germlines/mouse"), computed)
    assert done["germlines"].to_pylist() == ["mouse", "mouse", "human", "mouse", "mouse", ""]
    assert done["v_gene_heavy"].to_pylist()[:4] == ["mouse", "mouse", "human", "mouse"]
    assert done["v_identity_aa_heavy"].to_pylist()[:4] == [0.8, 0.9, 0.7, 0.2]
    # of two reasons that of a chain that is recognised says more
    assert reasons.tolist() == ["", "", "", "", "heavy: truncated_end", ""]
