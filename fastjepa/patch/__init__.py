"""Other JEPA codebases on our operations: one live model at a time, measured, and taken back at will."""

from fastjepa.patch.gather import patch_gathers
from fastjepa.patch.patching import patch, unpatch
from fastjepa.patch.report import Finding, PatchReport, Verification
from fastjepa.patch.swapping import FallbackWarning

__all__ = ["FallbackWarning", "Finding", "PatchReport", "Verification", "patch", "patch_gathers", "unpatch"]
