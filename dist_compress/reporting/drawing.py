"""A picture as rectangles and texts, written twice: as SVG for the page, coloured by its style sheet, as PNG for W&B.

Kinds name colours: a class of the style sheet there, `_PALETTE` here.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from html import escape

from PIL import Image, ImageDraw, ImageFont

_PALETTE = {
    "kept": "#2b63d9", "gone": "#d9722e", "track": "#e3e6ea", "rule": "#d9dbe0", "tick": "#686e79", "name": "#17191d",
}  # fmt: skip
_SCALE = 2  # pixels of the PNG for a unit of the picture
_CHAR = 6.2  # width of a character of the labels


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    width: float
    height: float
    kind: str
    tip: str = ""
    opacity: float = 1.0


@dataclass(frozen=True)
class Text:
    x: float
    y: float  # of the base line
    text: str
    anchor: str = "start"  # start | middle | end
    kind: str = "tick"


@dataclass
class Drawing:
    width: float
    height: float
    label: str  # what is shown, for those who cannot see it
    items: list[Rect | Text] = field(default_factory=list)

    def rect(
        self, x: float, y: float, width: float, height: float, kind: str, tip: str = "", opacity: float = 1.0
    ) -> None:
        self.items.append(Rect(x, y, width, height, kind, tip, opacity))

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> None:
        self.items.append(Text(x, y, text, anchor, kind))

    def svg(self) -> str:
        size = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        parts = [f'<svg class="drawing" {size} role="img" aria-label="{escape(self.label)}">']
        for item in self.items:
            if isinstance(item, Text):
                parts.append(
                    f'<text class="d-{item.kind}" x="{item.x:.1f}" y="{item.y:.1f}" text-anchor="{item.anchor}">'
                    f"{escape(item.text)}</text>"
                )
                continue
            shape = f'x="{item.x:.1f}" y="{item.y:.1f}" width="{item.width:.2f}" height="{item.height:.1f}"'
            faint = "" if item.opacity == 1 else f' fill-opacity="{item.opacity:.2f}"'
            tip = f"><title>{escape(item.tip)}</title></rect>" if item.tip else "/>"
            parts.append(f'<rect class="d-{item.kind}" {shape}{faint}{tip}')
        return "".join([*parts, "</svg>"])

    def png(self) -> bytes:
        """On white, twice the size."""
        image = Image.new("RGB", (round(self.width * _SCALE), round(self.height * _SCALE)), "white")
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(11 * _SCALE)
        for item in self.items:
            colour = _PALETTE[item.kind]
            if isinstance(item, Text):
                at = (item.x * _SCALE, item.y * _SCALE)
                draw.text(at, item.text, colour, font, {"start": "ls", "middle": "ms", "end": "rs"}[item.anchor])
                continue
            left, top = item.x * _SCALE, item.y * _SCALE
            right, bottom = left + item.width * _SCALE - 1, top + item.height * _SCALE - 1
            if item.opacity < 1:
                colour = _over_white(colour, item.opacity)
            if right >= left and bottom >= top:
                draw.rectangle((left, top, right, bottom), colour)
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        return file.getvalue()


def text_width(text: str) -> float:
    return _CHAR * len(text)


def _over_white(colour: str, opacity: float) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - part) * opacity):02x}" for part in parts)
