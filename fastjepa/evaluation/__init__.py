"""Judging what was learned: probes, rank, pictures."""
