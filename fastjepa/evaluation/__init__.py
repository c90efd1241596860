"""Judging what was learned: probes, rank, pictures."""

from fastjepa.evaluation.features import extract_features, normalise, whole_picture
from fastjepa.evaluation.pictures import plot_curves, plot_features
from fastjepa.evaluation.probes import (
    Evaluation,
    LabelledImages,
    evaluate,
    knn_probe,
    linear_probe,
    low_shot_probe,
)
from fastjepa.evaluation.rank import feature_std, rankme

__all__ = [
    "Evaluation",
    "LabelledImages",
    "evaluate",
    "extract_features",
    "feature_std",
    "knn_probe",
    "linear_probe",
    "low_shot_probe",
    "normalise",
    "plot_curves",
    "plot_features",
    "rankme",
    "whole_picture",
]
