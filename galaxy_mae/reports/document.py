"""What reports, pages and cards are made of, and how they are rendered from `templates/`.

A document is a list of sections, a section a list of blocks. `report.md` and the page show the same blocks; those that
are for the page alone are dictionaries with a `kind`, for which `page.html` has a macro.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from galaxy_mae.files import atomic_file

TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL = 64  # width in pixels
_QUALITY = 80  # of WebP


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind = "text"


@dataclass(frozen=True)
class Table:
    """A header, and rows of as many texts."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind = "table"

    def __str__(self) -> str:
        """As Markdown; the cells may hold any text."""
        lines = (self.header, ("---",) * len(self.header), *self.rows)
        escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]
    kind = "bullets"

    def __str__(self) -> str:
        return "\n".join(f"- {item}" for item in self.items)


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        name: of the PNG, without suffix.
        function: of `galaxy_mae.figures`.
        arguments: of that function, after the path.
        text: what is seen, for those who cannot see it.
    """

    name: str
    function: Callable[..., None]
    arguments: tuple
    text: str
    kind = "figure"

    def write(self, folder: Path) -> None:
        """Draw the PNG into a folder."""
        self.function(folder / f"{self.name}.png", *self.arguments)

    @property
    def image(self) -> str:
        """The PNG as a data URI."""
        buffer = io.BytesIO()
        self.function(buffer, *self.arguments)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def as_percent(fraction: float, digits: int = 0) -> str:
    """A fraction of 1 in percent, as in `57.5 %`."""
    return f"{100 * fraction:.{digits}f} %"


Block = Text | Table | Bullets | Figure | dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of a document.

    Attributes:
        title: above it.
        blocks: in order.
        id: the anchor of its link, without spaces.
        in_matrices: whether a page shows this as confusion matrices whose cells open their galaxies.
    """

    title: str
    blocks: Sequence[Block]
    id: str
    in_matrices: bool = False


class Thumbnails:
    """The galaxies that a page shows. A galaxy is added once, and named by its number from then on.

    Args:
        pixels: (N, S, S, 3) uint8, one image per row of the data set; None if there are none.
    """

    def __init__(self, pixels: np.ndarray | None):
        self._pixels = pixels
        self._numbers: dict[int, int] = {}
        self._lines: list[list[str]] = []

    def add(self, row: int, lines: Sequence[str]) -> int:
        """The number of the galaxy in a row; the first call also sets the lines below its image."""
        number = self._numbers.setdefault(int(row), len(self._numbers))
        if number == len(self._lines):
            self._lines.append(list(lines))
        return number

    def lines(self, number: int) -> list[str]:
        """The lines below an image."""
        return self._lines[number]

    def as_json(self) -> list[dict[str, Any]]:
        """For the page's script: image and lines of each galaxy."""
        images = (None if self._pixels is None else data_uri(self._pixels[row], THUMBNAIL) for row in self._numbers)
        return [{"image": image, "lines": lines} for image, lines in zip(images, self._lines, strict=True)]


def data_uri(image: np.ndarray | Image.Image, max_width: int) -> str:
    """An image as a WebP data URI.

    Args:
        image: (H, W, 3) uint8, or an image of PIL.
        max_width: in pixels; a wider one is reduced.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    if image.width > max_width:
        size = (max_width, round(image.height * max_width / image.width))
        image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_page(
    path: Path,
    title: str,
    about: Sequence[str],
    alerts: Sequence[str],
    sections: Sequence[Section],
    thumbnails: Thumbnails,
) -> None:
    """Write a page atomically. It opens from disk and loads nothing from elsewhere.

    Args:
        path: the HTML file.
        title: of the page.
        about: lines below it.
        alerts: lines that a reader must not miss.
        sections: in order; at most one holds a map, whose plot Bokeh draws with its scripts inline.
        thumbnails: all galaxies of the sections.
    """
    plots = [block["plot"] for section in sections for block in section.blocks if _is_map(block)]
    bokeh, script, div = "", "", ""
    if plots:
        from bokeh.embed import components  # only a map needs it
        from bokeh.resources import Resources

        script, div = components(plots[0])
        bokeh = Resources(mode="inline", components=["bokeh"]).render()
    html = _template("page.html", autoescape=True).render(
        title=title,
        about=about,
        alerts=alerts,
        sections=sections,
        thumbnails=thumbnails.as_json(),
        bokeh=bokeh,
        script=script,
        div=div,
    )
    with atomic_file(path) as tmp_path:
        tmp_path.write_text(html, encoding="utf-8")


def _is_map(block: Block) -> bool:
    return isinstance(block, dict) and block["kind"] == "map"


def render_markdown(template: str, **content: Any) -> str:
    """The Markdown of a template."""
    return _template(template, autoescape=False).render(**content).rstrip() + "\n"


def _template(name: str, autoescape: bool) -> Template:
    options = {"undefined": StrictUndefined, "trim_blocks": True}
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=autoescape, **options).get_template(name)
