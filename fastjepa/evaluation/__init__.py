"""Judging what was learned: probes, rank, pictures."""

from fastjepa.evaluation.command import evaluate_checkpoint
from fastjepa.evaluation.features import extract_features, normalise, whole_picture
from fastjepa.evaluation.judge import PROBES, ProbeSettings, judge, render, write_csv
from fastjepa.evaluation.pictures import plot_confusion, plot_curves, plot_features
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
    "PROBES",
    "Evaluation",
    "LabelledImages",
    "ProbeSettings",
    "evaluate",
    "evaluate_checkpoint",
    "extract_features",
    "feature_std",
    "judge",
    "knn_probe",
    "linear_probe",
    "low_shot_probe",
    "normalise",
    "plot_confusion",
    "plot_curves",
    "plot_features",
    "rankme",
    "render",
    "whole_picture",
    "write_csv",
]
