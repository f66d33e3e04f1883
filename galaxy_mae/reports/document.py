"""A page is a Jinja2 template, Bokeh's plots with its scripts inline, and thumbnails, each of them once in the file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.models import Model
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from galaxy_mae.files import atomic_file

THUMBNAIL = 64  # width in pixels
_QUALITY = 80  # of WebP


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


def write_page(path: Path, plots: dict[str, Model], thumbnails: Thumbnails, **content: Any) -> None:
    """Render the template and write the page atomically.

    Args:
        path: the HTML file.
        plots: Bokeh's, by the names under which the content refers to them.
        thumbnails: all galaxies of the content.
        content: the variables of `templates/page.html`; text is escaped there.
    """
    environment = Environment(
        loader=PackageLoader("galaxy_mae.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script, divs = components(plots) if plots else ("", {})
    html = environment.get_template("page.html").render(
        bokeh=Resources(mode="inline", components=["bokeh"]).render() if plots else "",
        script=script,
        divs=divs,
        thumbnails=thumbnails.as_json(),
        **content,
    )
    with atomic_file(path) as tmp_path:
        tmp_path.write_text(html, encoding="utf-8")
