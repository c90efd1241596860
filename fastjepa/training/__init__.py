"""The training loop behind `fastjepa train`."""

from fastjepa.training.engine import TrainResult, train
from fastjepa.training.models import build_models, parameter_groups

__all__ = ["TrainResult", "build_models", "parameter_groups", "train"]
