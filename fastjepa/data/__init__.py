"""Pictures to training batches: uint8 crops and masks, each a function of (seed, step) alone."""

from fastjepa.data.augment import Augment, random_resized_crop
from fastjepa.data.batches import Batch, TrainingBatches
from fastjepa.data.engines import choose_engine
from fastjepa.data.folder import ImageFolder
from fastjepa.data.pictures import Pictures, UnreadableImage
from fastjepa.data.sources import find_images

__all__ = [
    "Augment",
    "Batch",
    "ImageFolder",
    "Pictures",
    "TrainingBatches",
    "UnreadableImage",
    "choose_engine",
    "find_images",
    "random_resized_crop",
]
