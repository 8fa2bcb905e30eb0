"""The trainer: configuration, engine, loop, EMA, checkpoints and metrics."""
