"""The programs for a machine with a GPU: ``check`` (make gpu-check), ``speed`` (gpu-bench) and ``sanitize``."""
