"""Paths, timestep laws, losses, guidance and samplers: pure functions that take the model as a callable."""
