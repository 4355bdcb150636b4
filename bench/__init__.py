"""Benchmarks: every figure is a ratio, in one run, to a copy of the logits; parity is checked before anything is timed."""
