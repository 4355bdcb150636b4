"""Colours of the classes, in pictures of detections."""

CLASS_COLORS = ("#F0C419", "#E8505B", "#2FA8D8", "#27AE60", "#B05CC6", "#F08A24", "#12C2A9", "#F2A2C0")
