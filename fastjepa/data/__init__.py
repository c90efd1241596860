"""Pictures to training batches: uint8 crops and masks, each a function of (seed, step) alone."""

from fastjepa.data.augment import Augment, random_resized_crop
from fastjepa.data.batches import Batch, TrainingBatches
from fastjepa.data.folder import ImageFolder, UnreadableImage, find_images

__all__ = [
    "Augment",
    "Batch",
    "ImageFolder",
    "TrainingBatches",
    "UnreadableImage",
    "find_images",
    "random_resized_crop",
]
