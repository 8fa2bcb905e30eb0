"""The packed transformer, its positions and attention, the published presets, and the published weights."""
