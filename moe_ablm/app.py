"""The page of `moe-ablm app`: one antibody, seen through a model.

`look` computes what is shown, without Panel; the rest lays it out and draws it with Bokeh. Panel
serves its scripts itself, so that the page works where there is no network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from moe_ablm.data.antibody import Antibody, row_of
from moe_ablm.data.positions import SCHEMES, selection
from moe_ablm.data.tokenizer import AMINO_ACID_TOKENS, AMINO_ACIDS
from moe_ablm.errors import ArgumentError, UserError, counted
from moe_ablm.page import table_html

if TYPE_CHECKING:
    from moe_ablm.inference.buckets import Engine

# trastuzumab: an antibody that nobody has to look up
HEAVY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVY"
    "YCSRWGGDGFYAMDYWGQGTLVTVSS"
)
LIGHT = (
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTT"
    "PPTFGQGTKVEIK"
)
ROWS = "AVILMGPCSTNQDEHKRFWY"  # of the scan, as in the figures of the verb scan
STYLE = """<style>
.regions{display:flex;flex-wrap:wrap;gap:.4rem}
.regions div{padding:.2rem .4rem;border-radius:4px;background:#eceff1;color:#1c2430;
max-width:100%;overflow-wrap:anywhere}
.regions .cdr{background:#ffe0b2}.regions small{display:block;color:#455a64}
.regions code{font-size:1rem;background:none}
.wide{overflow-x:auto}table{font-variant-numeric:tabular-nums}td,th{padding:.2rem .6rem}
</style>"""


@dataclass(frozen=True)
class Seen:
    """What a model says of an antibody; R residues, heavy chain first, M layers with experts.

    Attributes:
      labels: columns of `inference.numbers.numbered_labels`, lists of R.
      log_likelihoods: float32 `[R]`, nats; NaN where a residue is none of the 20 amino acids.
      log_odds: float32 `[R, 20]` of each amino acid against the residue.
      experts: int `[R, M]`, the one of the largest weight, -1 for none; None: a dense model.
      layers: numbers of the layers with experts.
    """

    labels: dict[str, list]
    log_likelihoods: np.ndarray
    log_odds: np.ndarray
    experts: np.ndarray | None
    layers: tuple[int, ...]


def look(engine: "Engine", antibody: Antibody, numbering: str, one_pass: bool = False) -> Seen:
    """Everything the page shows of an antibody, before any infilling.

    Perplexity and scan come from the same passes: each residue masked in turn, or none with
    `one_pass`.
    """
    from moe_ablm.inference.numbers import numbered_labels
    from moe_ablm.inference.score import masked_log_probabilities, unmasked_log_probabilities

    row = row_of(antibody, engine.model.layout)
    compute = unmasked_log_probabilities if one_pass else masked_log_probabilities
    (found,) = compute(engine, [row])
    own = np.take_along_axis(found, row.tokens[row.places, None].astype(int), axis=1)
    return Seen(
        numbered_labels([antibody], numbering, engine.germlines),
        own[:, 0],
        found[:, AMINO_ACID_TOKENS] - own,
        strongest(engine, antibody) if engine.model.spec.moe_layers else None,
        tuple(engine.model.spec.moe_layers),
    )


def strongest(engine: "Engine", antibody: Antibody) -> np.ndarray:
    """The expert of the largest weight of each residue and layer, int `[R, M]`; -1 for none."""
    from moe_ablm.inference.route import Choices, route

    (routing,) = route(engine, [antibody])
    if not isinstance(routing, Choices):
        return routing.combine.sum(-1).argmax(-1)
    best = routing.gates.argmax(-1)[..., None]
    expert = np.take_along_axis(routing.experts, best, axis=-1)[..., 0]
    taken = np.take_along_axis(routing.gates, best, axis=-1)[..., 0] > 0
    return np.where(taken, expert, -1)


def completions(
    engine: "Engine", antibody: Antibody, where: str, numbering: str, samples: int
) -> list[list[str]]:
    """Rows of the chosen residues redesigned, and the log-probability; the first is the likeliest.

    Args:
      engine: the model.
      antibody: whose residues are masked.
      where: regions and positions, "CDRH3" or "H105-H117,CDRL3".
      numbering: scheme of the positions.
      samples: draws after the first.

    Raises:
      UserError: nothing is chosen, or a name is none.
    """
    from moe_ablm.inference.infill import infill
    from moe_ablm.inference.numbers import chosen, masked, nothing_chosen
    from moe_ablm.inference.sampling import Sampling

    parts = [part.strip() for part in where.split(",") if part.strip()]
    regions = [part for part in parts if part.upper().startswith(("CDR", "FR"))]
    positions = [part for part in parts if part not in regions]
    picked = selection(regions or None, positions or None, numbering, engine.germlines)
    if picked is None:
        raise UserError("nothing to redesign: name regions or positions, CDRH3 or H105-H117")
    if reason := nothing_chosen(antibody, picked):
        raise UserError(reason)
    places = np.flatnonzero(chosen(antibody, picked))
    hidden = [masked(antibody, picked)]
    found = infill(engine, hidden) + infill(engine, hidden, Sampling(samples))
    rows = []
    for completion in found if samples else found[:1]:
        letters = completion.antibody.heavy + completion.antibody.light
        text = "".join(letters[place] for place in places)
        rows.append([text, f"{completion.log_probability:.2f}"])
    return rows


def regions_html(labels: dict[str, list]) -> str:
    """Regions as boxes: name, first and last number, residues with their numbers as titles."""
    lines = zip(*(labels[n] for n in ("chain", "region", "number", "residue")), strict=True)
    boxes = []
    for (chain, region), group in groupby(lines, key=lambda line: line[:2]):
        inside = list(group)
        kind = ' class="cdr"' if region.startswith("CDR") else ""
        numbers = f"{inside[0][2]}-{inside[-1][2]}" if region else "no number"
        letters = "".join(f'<span title="{escape(n)}">{escape(r)}</span>' for *_, n, r in inside)
        boxes.append(
            f"<div{kind}><small>{escape(region or chain)} {escape(numbers)}</small>"
            f"<code>{letters}</code></div>"
        )
    return f'{STYLE}<div class="regions">{"".join(boxes)}</div>'


def summary_html(seen: Seen) -> str:
    """Perplexity of the antibody and its regions as a table."""
    from moe_ablm.inference.score import perplexity

    regions = np.array(seen.labels["region"])
    named = list(dict.fromkeys(region for region in regions.tolist() if region))
    values = [("antibody", perplexity(seen.log_likelihoods))]
    values += [(name, perplexity(seen.log_likelihoods[regions == name])) for name in named]
    known = [(name, value) for name, value in values if np.isfinite(value)]
    return STYLE + table_html([n for n, _ in known], [[f"{v:.2f}" for _, v in known]])


def figures(seen: Seen) -> list[Any]:
    """Perplexity, experts and scan over one axis of residues, which zoom together."""
    drawn = [_perplexity_figure(seen), _scan_figure(seen)]
    if seen.experts is not None:
        drawn.insert(1, _expert_figure(seen.experts, seen.layers, seen.labels))
    for figure in drawn:
        figure.x_range = drawn[0].x_range
        _number_axis(figure, seen.labels)
    return drawn


def _columns(labels: dict[str, list], residues: np.ndarray) -> dict[str, Any]:
    """Columns of a Bokeh source, with the labels that are shown on hovering."""
    shown = {name: np.array(labels[name])[residues] for name in ("residue", "number", "region")}
    return shown | {"x": residues}


HOVER = [("residue", "@residue @number"), ("region", "@region")]


def _figure(title: str, height: int, tips: list[tuple[str, str]], **ranges: Any) -> Any:
    from bokeh.plotting import figure

    return figure(
        title=title,
        height=height,
        sizing_mode="stretch_width",
        tooltips=HOVER + tips,
        tools="xpan,xwheel_zoom,xbox_zoom,reset",
        **ranges,
    )


def _number_axis(figure: Any, labels: dict[str, list]) -> None:
    """Every tenth residue of a chain by its number, with the chain's letter."""
    places = [i for i, position in enumerate(labels["position"]) if position % 10 == 0]
    figure.xaxis.ticker = places
    figure.xaxis.major_label_overrides = {
        i: f"{labels['chain'][i][0].upper()}{labels['number'][i]}" for i in places
    }
    figure.xaxis.major_label_orientation = 0.8
    figure.xgrid.visible = False


def _perplexity_figure(seen: Seen) -> Any:
    from bokeh.models import ColumnDataSource

    known = np.flatnonzero(np.isfinite(seen.log_likelihoods))
    columns = _columns(seen.labels, known)
    columns["perplexity"] = np.exp(-seen.log_likelihoods[known].astype(float))
    cdr = [str(region).startswith("CDR") for region in columns["region"]]
    columns["colour"] = np.where(cdr, "#e67e22", "#607d8b")
    drawn = _figure(
        "Perplexity by residue (orange: CDRs)", 230, [("perplexity", "@perplexity{0.00}")],
        y_axis_type="log",
    )  # fmt: skip
    drawn.vbar(
        x="x", top="perplexity", bottom=1, width=0.9, color="colour",
        source=ColumnDataSource(columns),
    )  # fmt: skip
    return drawn


def _expert_figure(experts: np.ndarray, layers: tuple[int, ...], labels: dict[str, list]) -> Any:
    from bokeh.models import ColumnDataSource
    from bokeh.palettes import Category20_20, Turbo256

    residue, layer = (axis.reshape(-1) for axis in np.indices(experts.shape))
    columns = _columns(labels, residue)
    numbers = experts.reshape(-1)
    most = int(numbers.max(initial=0)) + 1
    palette = [Turbo256[(97 * i) % 256] if most > 20 else Category20_20[i] for i in range(most)]
    columns |= {"row": layer, "layer": np.array(layers)[layer]}
    columns |= {"expert": np.where(numbers < 0, "none", numbers.astype(str))}
    columns["colour"] = np.array([*palette, "#ffffff"])[numbers]
    drawn = _figure(
        "Expert of the largest weight, by layer", 90 + 40 * experts.shape[1],
        [("layer", "@layer"), ("expert", "@expert")],
    )  # fmt: skip
    drawn.rect(
        x="x", y="row", width=1, height=0.9, color="colour", source=ColumnDataSource(columns)
    )
    drawn.yaxis.ticker = list(range(len(layers)))
    drawn.yaxis.major_label_overrides = {i: str(layer) for i, layer in enumerate(layers)}
    return drawn


def _scan_figure(seen: Seen) -> Any:
    from bokeh.models import ColumnDataSource
    from bokeh.palettes import RdBu11
    from bokeh.transform import linear_cmap

    odds = seen.log_odds[:, [AMINO_ACIDS.index(letter) for letter in ROWS]]
    residue, mutant = np.nonzero(np.isfinite(odds))
    columns = _columns(seen.labels, residue)
    columns |= {"mutant": np.array(list(ROWS))[mutant], "score": odds[residue, mutant]}
    limit = float(np.abs(columns["score"]).max(initial=1e-6))
    drawn = _figure(
        "Scan: log-odds (red: likelier than the residue)", 380,
        [("mutant", "@mutant"), ("log-odds", "@score{0.00}")], y_range=list(reversed(ROWS)),
    )  # fmt: skip
    drawn.rect(
        x="x", y="mutant", width=1, height=1, line_color=None, source=ColumnDataSource(columns),
        fill_color=linear_cmap("score", RdBu11, -limit, limit),
    )  # fmt: skip
    return drawn


def page(engine: "Engine") -> Any:
    """The page of a visitor: inputs, a button for each question, and what was found."""
    import panel as pn

    heavy = pn.widgets.TextAreaInput(name="Heavy chain", value=HEAVY, sizing_mode="stretch_width")
    light = pn.widgets.TextAreaInput(name="Light chain", value=LIGHT, sizing_mode="stretch_width")
    numbering = pn.widgets.Select(name="Numbers", options=list(SCHEMES), width=120)
    exact = pn.widgets.Checkbox(name="mask every residue in turn (exact, slower)", value=True)
    ask = pn.widgets.Button(name="Look", button_type="primary")
    where = pn.widgets.TextInput(name="Redesign (regions, positions)", value="CDRH3")
    samples = pn.widgets.IntInput(name="Draws", value=5, start=0, end=100, width=90)
    redesign = pn.widgets.Button(name="Infill", button_type="primary")
    told = pn.pane.Alert("Paste an antibody, or look at trastuzumab.", alert_type="light")
    seen_column = pn.Column(sizing_mode="stretch_width")
    filled = pn.Column(sizing_mode="stretch_width")

    def antibody() -> Antibody:
        from moe_ablm.inference.antibodies import given

        first, second = ("".join(chain.value.split()) for chain in (heavy, light))
        (found,) = given([(first, second)], engine.model.layout, engine.model.length)
        return found

    def answer(button: Any, column: Any, question: Callable[[], list]) -> None:
        def clicked(_: Any) -> None:
            with button.param.update(loading=True):
                try:
                    column.objects = question()
                    told.param.update(object="Done.", alert_type="light")
                except UserError as error:
                    column.objects = []
                    text = error.in_python if isinstance(error, ArgumentError) else str(error)
                    told.param.update(object=escape(text), alert_type="danger")

        button.on_click(clicked)

    def seen() -> list:
        found = look(engine, antibody(), numbering.value, not exact.value)
        residues = counted(len(found.labels["residue"]), "residue")
        parts = ["## Numbered regions", regions_html(found.labels)]
        parts += [f"## Perplexity of {residues}", summary_html(found)]
        if found.experts is None:
            parts.append("A dense model: it has no experts to show.")
        wide = {"sizing_mode": "stretch_width"}
        return [
            pn.pane.HTML(p, **wide) if p[0] == "<" else pn.pane.Markdown(p, **wide) for p in parts
        ] + [pn.pane.Bokeh(figure, **wide) for figure in figures(found)]

    def redesigned() -> list:
        rows = completions(engine, antibody(), where.value, numbering.value, samples.value)
        head = [f"{where.value}, the likeliest first", "log-probability"]
        return [pn.pane.HTML(STYLE + table_html(head, rows), sizing_mode="stretch_width")]

    answer(ask, seen_column, seen)
    answer(redesign, filled, redesigned)
    return pn.Column(
        pn.pane.Markdown(f"# An antibody, seen through {escape(engine.model.source)}"),
        heavy, light, pn.FlexBox(numbering, exact, ask), told, seen_column,
        "## Infill", pn.FlexBox(where, samples, redesign), filled,
        sizing_mode="stretch_width", max_width=1200,
    )  # fmt: skip


def serve(engine: "Engine", address: str, port: int) -> NoReturn:
    """Serves the page until Ctrl-C, which ends it with KeyboardInterrupt.

    Raises:
      UserError: the port is taken, or the address is not of this machine.
    """
    import panel as pn

    pn.extension()
    origins = [f"{name}:{port}" for name in {address, "127.0.0.1", "localhost"}]
    try:
        server = pn.serve(
            {"/": lambda: page(engine)}, address=address, port=port, show=False, start=False,
            title="moe_ablm", websocket_origin=["*"] if address == "0.0.0.0" else origins,
            verbose=False,
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"--address {address} --port {port}: {error.strerror or error}; give another --port"
        ) from error
    print(f"http://{address}:{port}   (Ctrl-C ends it)", flush=True)
    server.start()
    server.io_loop.start()  # Panel takes Ctrl-C and ends the loop
    raise KeyboardInterrupt
