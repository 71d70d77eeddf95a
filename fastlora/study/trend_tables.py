"""The tables of a study of trends, and what they say of the paper's findings."""

from fastlora.analysis.tables import number
from fastlora.study.results import size_note
from fastlora.tables import Table

# Of the paper's table 7 (GPT-3's layer 48, ΔWq): ‖UᵀWV‖ for the directions of ΔW, W and random ones, and the factor.
PAPER_AMPLIFICATION = {4: (0.32, 21.67, 0.02, 21.5), 64: (1.90, 37.71, 0.33, 1.9)}
PAPER_SIMILARITY = 0.5  # φ(1, 1) of ranks 8 and 64, its figure 3: "greater than"
NEAR = 0.5  # of the paper's factor: that counts as reproduced
GROWS = 1.2  # times the value of the kept step before: that counts as on its way
REPRODUCED, ON_ITS_WAY, NOT_HERE = "reproduced", "on its way", "not at this size"


def rates_table(report: dict) -> Table:
    """Held-out loss of each candidate learning rate at each kept step."""
    trends = report["trends"]
    steps = [point["step"] for point in trends["points"]]
    lines = []
    for entry in trends["rates"]:
        losses = {state["step"]: state["held_out_loss"] for state in entry["states"]}
        chosen = " (chosen)" if entry["learning_rate"] == trends["rate"] else ""
        cells = [f"{losses[step]:.4f}" if step in losses else entry["failure"] for step in steps]
        lines.append([f"{entry['learning_rate']:g}{chosen}", *cells])
    note = f"Rank {trends['rates'][0]['rank']}, held-out loss after so many steps. {size_note(report)}"
    return Table("Learning rate", note, ["learning rate", *(f"step {step}" for step in steps)], lines)


def runs_table(report: dict) -> Table:
    """Held-out loss and the change of A through each run."""
    trends = report["trends"]
    steps = [point["step"] for point in trends["points"]]
    lines = [
        [
            f"r = {run['rank']}, seed {run['seed']}",
            *(f"{state['held_out_loss']:.4f}; {number(state['relative_change_of_a'], 2)}" for state in run["states"]),
        ]
        for run in trends["runs"]
    ]
    note = f"At learning rate {trends['rate']:g}. Held-out loss; ‖A − A₀‖ / ‖A₀‖, the mean over the layers."
    return Table("Training", note, ["adapter of Wq+Wv", *(f"step {step}" for step in steps)], lines)


def similarity_trend_table(report: dict) -> Table:
    """φ(1, 1) and φ(r, r) at each kept step, beside what chance gives."""
    points, directions = report["trends"]["points"], report["directions"]
    lines = []
    for index, row in enumerate(points[-1]["similarity"]):
        compared = directions[row["pair"]]
        cells = [f"{number(p['similarity'][index]['first'])}; {number(p['similarity'][index]['all'])}" for p in points]
        chance = f"{number(row['first_chance'], 2)}; {number(row['all_chance'], 2)}"
        names = [f"{compared['i']} against {compared['j']}", row["type"], row["side"].upper()]
        lines.append([*names, *cells, chance])
    columns = ["adapters", "type", "of", *(f"step {point['step']}" for point in points), "random"]
    note = "φ(1, 1); φ(r, r), r the smaller rank. Means over the layers. Every adapter began with another random A."
    return Table("Similarity through training", note, columns, lines)


def amplification_trend_table(report: dict) -> Table:
    """Of the middle layer: ‖UᵀWV‖ for ΔW, W and random directions, and the factor, at each kept step."""
    points = report["trends"]["points"]
    lines = []
    for index, last in enumerate(points[-1]["amplification"]):
        rows = [point["amplification"][index] for point in points]
        cells = [
            f"{number(row['middle']['delta_projection'])}; {number(row['middle']['factor'])}; "
            f"{number(row['mean']['factor'])}"
            for row in rows
        ]
        middle = last["middle"]
        lines.append(
            [
                last["type"], str(last["rank"]), *cells,
                number(middle["weight_projection"]), number(middle["random_projection"]), number(middle["weight_norm"]),
            ]
        )  # fmt: skip
    paper = "; ".join(
        f"r = {rank}: {delta} of ΔW, {weight} of W, {chance} of random, {factor}-fold"
        for rank, (delta, weight, chance, factor) in PAPER_AMPLIFICATION.items()
    )
    note = (
        f"Layer {points[-1]['amplification'][0]['layer']}. ‖UᵀWV‖ along ΔW's top r directions; factor "
        f"‖ΔW‖ / ‖UᵀWV‖; the factor's mean over the layers. The paper's Wq: {paper}."
    )
    columns = ["type", "r", *(f"step {point['step']}" for point in points), "‖UᵀWV‖ of W", "of random", "‖W‖"]
    return Table("Amplification through training", note, columns, lines)


def findings_table(report: dict) -> Table:
    """The paper's findings on directions, each with its values through training and what they come to."""
    points = report["trends"]["points"]
    lines = []
    for claim, paper, values, reached in _findings(points):
        lines.append([claim, paper, " → ".join(number(value) for value in values), _verdict(values, reached)])
    note = (
        f"Values at the steps {', '.join(str(point['step']) for point in points)}; means over the layers. "
        f"{ON_ITS_WAY}: the last value is at least {GROWS:g} times the one before."
    )
    return Table("The paper's findings on directions", note, ["finding", "paper", "measured", "verdict"], lines)


def trend_tables(report: dict) -> list[Table]:
    """All of them."""
    tables = (findings_table, rates_table, runs_table, similarity_trend_table, amplification_trend_table)
    return [table(report) for table in tables]


def _findings(points: list[dict]) -> list[tuple[str, str, list[float], float]]:
    """Claim, the paper's figure, the values at the kept steps, and the value from which on the claim holds."""
    found = []
    for index, row in enumerate(points[-1]["similarity"]):
        values = [point["similarity"][index]["first"] for point in points]
        pair = "two ranks" if row["pair"] == "ranks" else "two seeds"
        claim = f"the strongest direction of {row['side'].upper()} is shared by {pair}, {row['type']}: φ(1, 1)"
        paper = f"> {PAPER_SIMILARITY:g}" if row["pair"] == "ranks" else "shared, no figure"
        found.append((claim, paper, values, PAPER_SIMILARITY))
    for index, row in enumerate(points[-1]["amplification"]):
        if row["rank"] in PAPER_AMPLIFICATION:
            factor = PAPER_AMPLIFICATION[row["rank"]][-1]
            values = [point["amplification"][index]["mean"]["factor"] for point in points]
            claim = f"ΔW amplifies what W has there, {row['type']}, r = {row['rank']}: factor"
            found.append((claim, f"{factor:g}", values, NEAR * factor))
            ratios = [_over_chance(point["amplification"][index]["mean"]) for point in points]
            claim = f"ΔW's directions hold more of W than random ones, {row['type']}, r = {row['rank']}: times"
            delta, _, chance, _ = PAPER_AMPLIFICATION[row["rank"]]
            found.append((claim, f"{delta / chance:.3g}", ratios, 2.0))
    return found


def _over_chance(row: dict) -> float:
    return row["delta_projection"] / row["random_expected"]


def _verdict(values: list[float], reached: float) -> str:
    if values[-1] >= reached:
        return REPRODUCED
    return ON_ITS_WAY if len(values) > 1 and values[-1] >= GROWS * values[-2] else NOT_HERE
