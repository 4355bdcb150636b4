"""Detectors trained with the IoU-balanced losses: data, models, training, evaluation, reports."""
