"""Pictures with text: sources of samples, how they become tokens and tiles, and loaders of them."""

from moesaic.data.images.code_lines import CodeLines
from moesaic.data.images.folders import ImageDataset, ImageFolder
from moesaic.data.images.glyphs import Glyphs
from moesaic.data.images.keys import PictureKeys, Place
from moesaic.data.images.layout import Layout, pixel_values
from moesaic.data.images.loaders import PictureEvaluationLoader, PictureTrainingLoader
from moesaic.data.images.sample import TRAIN, ImageText, Picture, Samples, Text
from moesaic.data.images.sheets import Sheets

__all__ = [
    "PICTURES",
    "TRAIN",
    "CodeLines",
    "Glyphs",
    "ImageDataset",
    "ImageFolder",
    "ImageText",
    "Layout",
    "Picture",
    "PictureEvaluationLoader",
    "PictureKeys",
    "PictureTrainingLoader",
    "Place",
    "Samples",
    "Sheets",
    "Text",
    "pixel_values",
]

PICTURES: dict[str, type[PictureKeys]] = {
    "glyphs": Glyphs,
    "sheets": Sheets,
    "code_lines": CodeLines,
    "image_folder": ImageFolder,
    "image_dataset": ImageDataset,
}
"""By `data.source`."""
