"""The coupling groups of a model as SVG: layers from top to bottom, a line from the makers of units to their readers.

Groups that do not overlap share a lane, as branches do in a drawing of commits. No script, no external resource.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dist_compress.target import Coupling, UnitGroup

_ROW, _LANE, _TOP, _CHAR = 20, 22, 46, 6.6
_COLOURS = ("#2b63d9", "#d9722e", "#1a8754", "#7a4fd0", "#168a96", "#c23b22", "#b8860b", "#d1479b")
_GREY = "#9aa1ab"
_STYLE = """<style>
.cg { font: 11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.cg text { fill: #3c424c; } .cg .soft { fill: #868d98; }
.cg .row { stroke: #8a93a3; stroke-opacity: .22; }
.cg .lane { fill: none; stroke-width: 3; stroke-linecap: round; }
.cg .blocked { stroke-dasharray: 2 5; }
.cg .hollow { fill: #fff; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
 .cg text { fill: #d5d9df; } .cg .soft { fill: #98a0ac; } .cg .hollow { fill: #181b20; }
}
</style>"""


def coupling_chart(coupling: Coupling, modules: Sequence[str]) -> str:
    """An <svg> of all groups. `modules`: names of all modules of the model, in its order."""
    order = {name: i for i, name in enumerate(modules)}
    groups = [g for g in coupling.groups if g.members]
    rows = _rows(groups, order)
    place = {name: i for i, name in enumerate(rows)}
    spans = [_span(g, place, order, rows) for g in groups]
    lanes = _lanes(spans)
    left = 14 + _CHAR * max((len(_label(name)) for name in rows), default=0)
    right = left + 22 + _LANE * (max(lanes, default=0) + 1)
    notes = _notes(groups, spans, coupling)
    width = right + 12 + _CHAR * max((len(text) for texts in notes.values() for _, text in texts), default=0)
    height = _TOP + _ROW * len(rows) + 14
    shape = f'viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" class="cg" {shape} role="img" aria-label="coupling groups">']
    parts += [_STYLE, _legend()]
    for name, i in place.items():
        y = _y(i)
        parts.append(f'<line class="row" x1="{left:.0f}" x2="{right:.0f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8:.0f}" y="{y + 4}" text-anchor="end">{escape(_label(name))}</text>')
    for number, (group, span, lane) in enumerate(zip(groups, spans, lanes, strict=True)):
        colour = _GREY if group.blocked else _COLOURS[number % len(_COLOURS)]
        parts.append(_group(group, span, left + 24 + _LANE * lane, colour, place, order, rows))
    for i, texts in notes.items():
        told = "".join(f'<tspan class="{kind}">{escape(text)}</tspan>' for kind, text in texts)
        parts.append(f'<text x="{right + 8:.0f}" y="{_y(i) + 4}">{told}</text>')
    return "".join([*parts, "</svg>"])


def _rows(groups: Sequence[UnitGroup], order: dict[str, int]) -> list[str]:
    """The modules that make or read units."""
    names = {m.module for g in groups for m in g.members if m.role != "affine"}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _position(module: str, place: dict[str, int], order: dict[str, int], rows: Sequence[str]) -> float:
    """The row of a module; norms lie half a row behind the layer before them."""
    if module in place:
        return place[module]
    before = [i for i, name in enumerate(rows) if order.get(name, 0) < order.get(module, 0)]
    return (before[-1] if before else -1) + 0.5


def _span(group: UnitGroup, place: dict[str, int], order: dict[str, int], rows: Sequence[str]) -> tuple[float, float]:
    at = [_position(m.module, place, order, rows) for m in group.members]
    return min(at), max(at)


def _lanes(spans: Sequence[tuple[float, float]]) -> list[int]:
    """A lane for each span, the leftmost that is free there; long spans first, so that they stay left."""
    taken: list[list[tuple[float, float]]] = []
    lanes = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: (spans[i][0] - spans[i][1], spans[i][0])):
        low, high = spans[i]
        lane = next((n for n, own in enumerate(taken) if all(high < a or low > b for a, b in own)), len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((low, high))
        lanes[i] = lane
    return lanes


def _group(
    group: UnitGroup, span: tuple[float, float], x: float, colour: str, place: dict[str, int],
    order: dict[str, int], rows: Sequence[str],
) -> str:  # fmt: skip
    tip = f"{group.name}: {group.num_units} units" + (f", blocked: {group.blocked}" if group.blocked else "")
    kind = "lane blocked" if group.blocked else "lane"
    marks = []
    for role, module in dict.fromkeys((m.role, m.module) for m in group.members):
        y, said = _y(_position(module, place, order, rows)), escape(f"{module} {_VERBS[role]} them")
        if role == "producer":
            mark = f'<circle cx="{x:.0f}" cy="{y}" r="5.5" fill="{colour}"'
        elif role == "affine":
            mark = f'<circle class="hollow" cx="{x:.0f}" cy="{y}" r="3" stroke="{colour}"'
        else:
            mark = f'<path class="hollow" d="M{x - 5:.0f} {y - 4}h10l-5 9z" stroke="{colour}"'
        marks.append(f"{mark}><title>{escape(tip)}. {said}</title></{'path' if mark[1] == 'p' else 'circle'}>")
    ends = f'x1="{x:.0f}" x2="{x:.0f}" y1="{_y(span[0])}" y2="{_y(span[1])}"'
    return f'<g><title>{escape(tip)}</title><line class="{kind}" {ends} stroke="{colour}"/>{"".join(marks)}</g>'


_VERBS = {"producer": "makes", "affine": "scales", "consumer": "reads", "reader": "reads"}


def _notes(
    groups: Sequence[UnitGroup], spans: Sequence[tuple[float, float]], coupling: Coupling
) -> dict[int, list[tuple[str, str]]]:
    """{row: [(class, text)]}: beside the row in which a group begins, how many units it has."""
    total = sum(layer.macs for layer in coupling.layers) or 1
    numbers = {id(g): i for i, g in enumerate(coupling.groups)}
    notes: dict[int, list[tuple[str, str]]] = {}
    for group, (first, _) in zip(groups, spans, strict=True):
        own = numbers[id(group)]
        touched = sum(c.macs for c in coupling.layers if any(i == own for _, parts in c.factors for i, _ in parts))
        text = f"{group.num_units} units, {touched / total:.0%} of the MACs"
        if group.blocked:
            text = f"{group.num_units} stay: {group.blocked}"
        texts = notes.setdefault(max(int(first + 0.5), 0), [])
        texts.append(("soft" if group.blocked else "", f"{' | ' if texts else ''}{text}"))
    return notes


def _legend() -> str:
    y, parts, x = 18, [], 14
    marks = (
        ("makes units", '<circle cx="{x}" cy="{y}" r="5.5" fill="#2b63d9"/>'),
        ("scales them", '<circle class="hollow" cx="{x}" cy="{y}" r="3" stroke="#2b63d9"/>'),
        ("reads them", '<path class="hollow" d="M{l} {t}h10l-5 9z" stroke="#2b63d9"/>'),
        ("cannot go", f'<line class="lane blocked" x1="{{l}}" x2="{{r}}" y1="{{y}}" y2="{{y}}" stroke="{_GREY}"/>'),
    )
    for text, mark in marks:
        parts.append(mark.format(x=x, y=y, l=x - 5, r=x + 6, t=y - 4))
        parts.append(f'<text class="soft" x="{x + 12}" y="{y + 4}">{text}</text>')
        x += 34 + round(_CHAR * len(text))
    return "".join(parts)


def _label(name: str) -> str:
    name = name or "(the model)"
    return name if len(name) <= 60 else f"...{name[-57:]}"


def _y(row: float) -> int:
    return round(_TOP + _ROW * (row + 0.5))
