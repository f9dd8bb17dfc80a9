"""The queue as a page: one file that works offline, next to the pictures that it shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from nnunet_ssl.data.queue import FIRST, LOOK, PAGE_FILE, RELIABLE, VERDICTS, Queue, Row, case_files
from nnunet_ssl.files import ELSEWHERE, write_text
from nnunet_ssl.ranking.pictures import DISAGREEMENT, HEIGHT, structure_colors

_MEANINGS = {
    FIRST: "the models contradict each other; a label from a person teaches most here",
    LOOK: "something is unusual, see the reason",
    RELIABLE: "the models agree and the volumes are usual",
}
_CLASSES = {FIRST: "first", LOOK: "look", RELIABLE: "reliable"}
_STYLE = f"""
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem; color: #1c1c1c; background: #fff; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .3rem; }}
p, ul {{ max-width: 60rem; margin: .4rem 0; }}
button {{ font: inherit; border: 1px solid #888; background: #f4f4f4; border-radius: 4px; padding: .2rem .7rem; }}
button[aria-pressed=true] {{ background: #1c1c1c; color: #fff; }}
.table {{ overflow-x: auto; margin-top: .8rem; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .35rem .6rem; text-align: left; vertical-align: top; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
td.reason {{ min-width: 14rem; max-width: 18rem; }}
td.case {{ overflow-wrap: anywhere; min-width: 14rem; font-weight: 600; }}
th {{ position: sticky; top: 0; background: #fff; white-space: nowrap; }}
th button {{ border: 0; background: none; padding: 0; font-weight: 600; cursor: pointer; }}
img {{ height: {HEIGHT}px; max-width: none; display: block; background: #eee; }}
.verdict {{ white-space: nowrap; border-radius: 4px; padding: .1rem .45rem; color: #fff; }}
.first {{ background: #b3261e; }} .look {{ background: #8a6100; }} .reliable {{ background: #1b6e3c; }}
.color {{ display: inline-block; width: .8em; height: .8em; margin-right: .3em; border: 1px solid #0003; }}
.legend span {{ margin-right: 1rem; }}
"""
_SCRIPT = """
const body = document.querySelector("tbody");
const filters = [...document.querySelectorAll("[data-filter]")];
for (const button of filters) button.onclick = () => {
  filters.forEach(one => one.setAttribute("aria-pressed", one === button));
  const wanted = button.dataset.filter;
  for (const row of body.rows) row.hidden = wanted !== "" && row.dataset.verdict !== wanted;
};
document.querySelectorAll("th button").forEach(button => {
  const index = button.parentElement.cellIndex;
  button.onclick = () => {
    const up = button.parentElement.getAttribute("aria-sort") !== "ascending";
    document.querySelectorAll("th").forEach(one => one.removeAttribute("aria-sort"));
    button.parentElement.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[index].dataset.sort;
    const empty = value => value === "";
    const rows = [...body.rows].sort((one, other) => {
      const a = key(one), b = key(other);
      if (empty(a) || empty(b)) return empty(a) - empty(b);  // what is not known comes last
      const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      return up ? order : -order;
    });
    body.append(...rows);
  };
});
"""


def write_page(folder: Path, queue: Queue, rows: Sequence[Row], problems: Mapping[str, str]) -> None:
    """Write ``index.html``, whole or not at all.

    Args:
        folder: of the queue.
        queue: what was ranked.
        rows: in the order to show them.
        problems: reasons by case, of cases that could not be predicted.

    Raises:
        UserError: it cannot be written.
    """
    counts = Counter(row.verdict for row in rows)
    colors = structure_colors(list(queue.structures))
    title = f"{queue.dataset}: unlabeled cases, ranked"
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>',
        f"<h1>{escape(title)}</h1>",
        _introduction(queue, rows, problems),
        '<p class="legend">'
        + "".join(f"<span>{_swatch(color)}{escape(name)}</span>" for name, color in colors.items())
        + f"<span>{_swatch(DISAGREEMENT)}the models disagree</span></p>",
        f'<p><button data-filter="" aria-pressed="true">all ({len(rows)})</button> '
        + " ".join(
            f'<button data-filter="{verdict}" aria-pressed="false">{verdict} ({counts[verdict]})</button>'
            for verdict in VERDICTS
        )
        + "</p>",
        '<div class="table"><table>\n<thead><tr>' + _header(queue) + "</tr></thead>\n<tbody>",
        *(_row(row, number, queue) for number, row in enumerate(rows)),
        f"</tbody></table></div>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n",
    ]
    write_text(folder / PAGE_FILE, "\n".join(parts), otherwise=ELSEWHERE)


def _introduction(queue: Queue, rows: Sequence[Row], problems: Mapping[str, str]) -> str:
    models = Counter(model.trainer for model in queue.models)
    named = ", ".join(f"{trainer} ({count})" for trainer, count in models.items())
    verdicts = "".join(
        f'<li><span class="verdict {_CLASSES[verdict]}">{verdict}</span> {meaning}</li>'
        for verdict, meaning in _MEANINGS.items()
    )
    entropy = "mean of the regions' binary entropies" if queue.regions_class_order else "of the class probabilities"
    text = (
        f"<p>{len(queue.models)} model(s) of {escape(queue.configuration)} have segmented {len(rows)} of "
        f"{len(queue.cases)} unlabeled case(s): {escape(named)}. Click on a column's name to sort.</p>"
        f"<ul>{verdicts}</ul>"
        "<p>A picture shows the contours of the consensus in the slices on which the models disagree most. "
        "<b>Dice</b> is the mean over all pairs of models: 1 where they agree. <b>Entropy</b> "
        f"({entropy}, 0 to 1) is a mean over the foreground. Volumes are in ml.</p>"
    )
    if problems:
        listed = "".join(f"<li><b>{escape(case)}</b>: {escape(why)}</li>" for case, why in problems.items())
        text += f"<p>Not predicted:</p><ul>{listed}</ul>"
    return text


def _swatch(color: str) -> str:
    return f'<span class="color" style="background:{color};margin-right:.3em"></span>'


def _header(queue: Queue) -> str:
    names = ["#", "case", "verdict", "reason", "Dice", "entropy", "picture"]
    for name in queue.structures:
        names += [f"Dice {name}", f"ml {name}", f"parts {name}"]
    return "".join(
        "<th>picture</th>" if name == "picture" else f'<th><button type="button">{escape(name)}</button></th>'
        for name in names
    )


def _row(row: Row, number: int, queue: Queue) -> str:
    picture = case_files(Path(), row.case, queue.file_ending).picture.as_posix()
    case, verdict = escape(row.case), row.verdict
    cells = [
        f'<td class="number" data-sort="{number}">{number + 1}</td>',
        f'<td class="case" data-sort="{case}">{case}</td>',
        f'<td data-sort="{VERDICTS.index(verdict)}"><span class="verdict {_CLASSES[verdict]}">{verdict}</span></td>',
        f'<td class="reason" data-sort="{escape(row.reason)}">{escape(row.reason)}</td>',
        _number(row.dice),
        _number(row.entropy),
        f'<td><img loading="lazy" src="{escape(quote(picture))}" alt="slices of {case}"></td>',
    ]
    for name in queue.structures:
        one = row.structures[name]
        cells += [_number(one.dice), _number(one.volume), f'<td class="number" data-sort="{one.components}">']
        cells[-1] += f"{one.components}</td>"
    return f'<tr data-verdict="{verdict}">{"".join(cells)}</tr>'


def _number(value: float) -> str:
    if math.isnan(value):
        return '<td class="number" data-sort="">–</td>'
    return f'<td class="number" data-sort="{value:.6g}">{value:.3f}</td>'
