"""The benchmark suite: what a step costs, and what it costs elsewhere."""
