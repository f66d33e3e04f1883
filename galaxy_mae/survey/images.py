"""The images of a HATS catalogue: where they are, and how they become 8-bit colors of the model's size."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from galaxy_mae.catalogue.models import CatalogueModel
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.images import check_square, decode_rgb
from galaxy_mae.data.readers import COLUMN_NAMES, UnreadableImage, find_column
from galaxy_mae.data.sources import area_average
from galaxy_mae.errors import UserError

BANDS = ("g", "r", "z")  # of multi-band images, that become blue, green and red


@dataclass(frozen=True)
class ImageReader:
    """Where the images of a table are, and how they become 8-bit colors of the model's size.

    Attributes:
        column: of encoded images (binary, or a struct with `bytes`), or a struct of `band` and `flux`.
        columns: what is read of it.
        is_flux: whether it holds fluxes.
        bands: names of those that become blue, green and red.
        stretch: of fluxes.
        image_size: of the model.
        enlarges: whether smaller images are left to the model's batches.
    """

    column: str
    columns: tuple[str, ...]
    is_flux: bool
    bands: tuple[str, ...]
    stretch: Stretch
    image_size: int
    enlarges: bool

    def images(self, table: pa.Table | pa.RecordBatch) -> list[np.ndarray | UnreadableImage]:
        """The image of each row, (S, S, 3) uint8, or why it cannot be used. Called within `images.decoding`."""
        values = table[self.column]
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        if not self.is_flux:
            encoded = pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values
            return [self._usable(lambda row=row: _decode(row)) for row in encoded]
        bands, flux = (pc.struct_field(values, name) for name in ("band", "flux"))
        return [self._usable(lambda row=row: self._rgb(bands[row], flux[row])) for row in range(len(values))]

    def _usable(self, read) -> np.ndarray | UnreadableImage:
        try:
            image = read()
            size = check_square(image)
            if size < self.image_size and not self.enlarges:
                wanted = f"{self.image_size} x {self.image_size}"
                raise UnreadableImage(f"is {size} x {size} pixels, and the model takes {wanted} or more")
        except UnreadableImage as problem:
            return problem
        return area_average(image[None], self.image_size)[0] if size > self.image_size else image

    def _rgb(self, names: pa.Scalar, flux: pa.Scalar) -> np.ndarray:
        """The stretched fluxes of three bands; the first row of flux is the lowest, as in FITS."""
        if not names.is_valid or not flux.is_valid:
            raise UnreadableImage("is missing")
        found = {_band(str(name)): i for i, name in enumerate(names.as_py())}
        if missing := [band for band in self.bands if _band(band) not in found]:
            raise UnreadableImage(f"has no band {missing[0]}, only {', '.join(map(str, names.as_py()))}")
        if len(flux.values) != len(names.values):
            raise UnreadableImage("has more names of bands than fluxes, or fewer")
        planes = [_plane(flux.values[found[_band(band)]]) for band in self.bands]
        if len({plane.shape for plane in planes}) > 1:
            raise UnreadableImage("has bands of different shapes")
        return self.stretch.rgb(np.stack(planes))[::-1]


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
    kinds = {name: kind for name in schema.names if (kind := _kind(schema.field(name).type))}
    if column is None:
        known = [find_column([name for name in kinds if kinds[name] == kind], "image") for kind in ("encoded", "flux")]
        column = known[0] or known[1]
    if column is None or column not in kinds:
        what = f"{column!r} of images" if column else f"of images ({', '.join(COLUMN_NAMES['image'])})"
        raise UserError(f"{source}: no column {what}, only {', '.join(schema.names)}; set --image_column")
    is_flux = kinds[column] == "flux"
    fields = ("band", "flux") if is_flux else ("bytes",)
    is_struct = pa.types.is_struct(schema.field(column).type)
    columns = tuple(f"{column}.{field}" for field in fields) if is_struct else (column,)
    return ImageReader(column, columns, is_flux, tuple(bands), stretch, model.image_size, model.enlarges)


def _kind(kind: pa.DataType) -> str:
    """`encoded` or `flux` if a column of this type holds images, else empty."""
    if pa.types.is_struct(kind):
        names = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if "bytes" in names:
            return "encoded"
        return "flux" if "band" in names and "flux" in names and pa.types.is_nested(names["flux"]) else ""
    return "encoded" if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else ""


def _decode(value: pa.Scalar) -> np.ndarray:
    if not value.is_valid:
        raise UnreadableImage("is missing")
    return decode_rgb(value.as_py(), Counter())


def _band(name: str) -> str:
    """The letter of a band; that of `des-g` is `g`."""
    return name.lower().rpartition("-")[2]


def _plane(band: pa.Scalar) -> np.ndarray:
    """(H, W) floats of a list of rows."""
    rows = band.values
    if rows is None or len(rows) == 0 or rows.null_count:
        raise UnreadableImage("has an empty band")
    values = rows.flatten().to_numpy(zero_copy_only=False)
    if len(values) % len(rows) or np.ptp(rows.value_lengths().to_numpy()):
        raise UnreadableImage("has a band whose rows differ in length")
    return values.reshape(len(rows), -1)
