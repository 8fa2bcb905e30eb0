"""Sampling: requests → packs → latents → images."""
