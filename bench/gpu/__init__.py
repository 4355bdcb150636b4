"""The programs that check a GPU: ``check`` (make gpu-check) and ``sanitize`` (make gpu-sanitize)."""
