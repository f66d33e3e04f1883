"""The images of a HATS catalogue at the model's size."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from galaxy_mae.catalogue.models import CatalogueModel
from galaxy_mae.data.arrow import ImageColumn, image_column
from galaxy_mae.data.fits import Stretch, UnreadableImage
from galaxy_mae.data.images import Encoded, area_average, check_square, decode
from galaxy_mae.errors import UserError


@dataclass(frozen=True)
class ImageReader:
    """Where the images of a table are, and how they become 8-bit colors of the model's size.

    Attributes:
        found: the column.
        stretch: of fluxes.
        image_size: of the model.
        enlarges: whether smaller images are left to the model's batches.
    """

    found: ImageColumn
    stretch: Stretch
    image_size: int
    enlarges: bool

    def images(self, table: pa.Table | pa.RecordBatch) -> list[np.ndarray | UnreadableImage]:
        """The image of each row, (S, S, 3) uint8, or why it cannot be used. Called within `images.decoding`."""
        return [self._usable(value) for value in self.found.encoded(table[self.found.name])]

    def _usable(self, value: Encoded) -> np.ndarray | UnreadableImage:
        try:
            image = decode(value, self.stretch)
            size = check_square(image)
            if size < self.image_size and not self.enlarges:
                wanted = f"{self.image_size} x {self.image_size}"
                raise UnreadableImage(f"is {size} x {size} pixels, and the model takes {wanted} or more")
        except UnreadableImage as problem:
            return problem
        return area_average(image[None], self.image_size)[0] if size > self.image_size else image


def image_reader(
    schema: pa.Schema, column: str | None, bands: Sequence[str], stretch: Stretch, model: CatalogueModel, source: str
) -> ImageReader:
    """Find the images of a catalogue.

    Args:
        schema: of the catalogue.
        column: the name; None takes the first column of encoded images, or else of fluxes.
        bands, stretch: of fluxes.
        model: whose image size is made.
        source: flag and name of the catalogue, for messages.

    Raises:
        UserError: there is no such column.
    """
    if len(bands) != 3 or len(set(bands)) != 3:
        raise UserError(f"--bands {' '.join(bands)}: give three different bands, for blue, green and red")
    return ImageReader(image_column(source, schema, column, bands), stretch, model.image_size, model.enlarges)
