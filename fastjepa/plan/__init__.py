"""`fastjepa plan`: what a training run would take, by a written model, and what each figure rests on."""

from fastjepa.plan.check import ALLOWED, Compared, check, comparison
from fastjepa.plan.field import FIELD, Published, field_table, flops_per_image
from fastjepa.plan.measured import PACKAGED, Measured, read_runs, steps_of
from fastjepa.plan.planning import Order, find_chip, plan
from fastjepa.plan.recipe import recipe
from fastjepa.plan.text import render, render_check

__all__ = [
    "ALLOWED",
    "FIELD",
    "PACKAGED",
    "Compared",
    "Measured",
    "Order",
    "Published",
    "check",
    "comparison",
    "field_table",
    "find_chip",
    "flops_per_image",
    "plan",
    "read_runs",
    "recipe",
    "render",
    "render_check",
    "steps_of",
]
