"""The trainer behind `ioubal`: data, models, training, evaluation, checkpoints, report. Needs the extra [train]."""
