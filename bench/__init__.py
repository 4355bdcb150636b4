"""Benchmarks: figures are ratios, in one run, to a copy of the logits; parity is checked before anything is timed."""
