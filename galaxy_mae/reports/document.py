"""What reports, pages and cards are made of, and how they are rendered from `templates/`.

A document is a list of sections, a section a list of blocks, which `report.md` and the page show alike. A text is a
paragraph. Blocks that are for the page alone are dictionaries with a `kind`, for which `page.html` has a macro.
"""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from galaxy_mae.files import atomic_file

TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL = 64  # width in pixels
_QUALITY = 80  # of WebP


@dataclass(frozen=True)
class Table:
    """A header, and rows of as many texts."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind = "table"

    def __str__(self) -> str:
        """As Markdown; the cells may hold any text."""
        lines = (self.header, ("---",) * len(self.header), *self.rows)
        return "\n".join(f"| {' | '.join(map(plain, line))} |" for line in lines)


class Bullets(list):
    """A list of sentences."""

    kind = "bullets"

    def __str__(self) -> str:
        return "\n".join(f"- {plain(item)}" for item in self)


@dataclass(frozen=True)
class Figure:
    """A PNG that a function of `galaxy_mae.figures` draws from arguments, and in words what is seen."""

    name: str
    function: Callable[..., None]
    arguments: tuple
    text: str
    kind = "figure"

    def __str__(self) -> str:
        return f"![{self.text}]({self.name}.png)"

    @cached_property
    def png(self) -> bytes:
        """The PNG: report and page show the same."""
        self.function(buffer := io.BytesIO(), *self.arguments)
        return buffer.getvalue()

    @property
    def image(self) -> str:
        """The PNG as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def as_percent(fraction: float, digits: int = 0) -> str:
    """A fraction of 1 in percent, as in `57.5 %`."""
    return f"{100 * fraction:.{digits}f} %"


def plain(text: str) -> str:
    """A text with names from the data on one line, without Markdown's meaning."""
    return " ".join(re.sub(r"[\\`*\[\]<>#|]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text).split())


Block = str | Table | Bullets | Figure | dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of a document, with the anchor of its link. What is `markdown_only` a page shows in a way of its own."""

    title: str
    blocks: Sequence[Block]
    id: str
    markdown_only: bool = False


def data_uri(image: np.ndarray | Image.Image, max_width: int) -> str:
    """An image, (H, W, 3) uint8 or of PIL, as a WebP data URI; it is reduced to so many pixels, if it is wider."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    image = image.convert("RGB")
    image.thumbnail((max_width, image.height), Image.Resampling.LANCZOS, reducing_gap=None)
    image.save(buffer := io.BytesIO(), "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_page(
    path: Path,
    title: str,
    about: Sequence[str],
    alerts: Sequence[str],
    sections: Sequence[Section],
    lines: Mapping[int, Sequence[str]],
    pixels: np.ndarray | None,
) -> None:
    """Write a page atomically. It opens from disk and loads nothing from elsewhere.

    Args:
        path, title: of the page.
        about: lines below the title.
        alerts: lines that a reader must not miss.
        sections: in order; at most one holds a map, whose plot Bokeh draws with its scripts inline.
        lines: of each galaxy of the sections, by its row: what is written below its image.
        pixels: (N, S, S, 3) uint8, the images of all rows; None if there are none.
    """
    blocks = [block for section in sections for block in section.blocks if isinstance(block, dict)]
    bokeh, script, div = "", "", ""
    if plots := [block["plot"] for block in blocks if block["kind"] == "map"]:
        from bokeh.embed import components  # only a map needs it
        from bokeh.resources import Resources

        script, div = components(plots[0])
        bokeh = Resources(mode="inline", components=["bokeh"]).render()
    images = {row: None if pixels is None else data_uri(pixels[row], THUMBNAIL) for row in lines}
    html = _render(
        "page.html",
        autoescape=True,
        title=title,
        about=about,
        alerts=alerts,
        sections=sections,
        thumbnails={row: {"image": images[row], "lines": list(lines[row])} for row in lines},
        bokeh=bokeh,
        script=script,
        div=div,
    )
    with atomic_file(path) as tmp_path:
        tmp_path.write_text(html, encoding="utf-8")


def render_markdown(template: str, **content: Any) -> str:
    """The Markdown of a template."""
    return _render(template, autoescape=False, **content).rstrip() + "\n"


def _render(template: str, autoescape: bool, **content: Any) -> str:
    options = {"undefined": StrictUndefined, "trim_blocks": True, "autoescape": autoescape}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), **options)
    environment.filters |= {"plain": plain, "as_percent": as_percent}
    return environment.get_template(template).render(**content)
