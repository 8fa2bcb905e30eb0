"""Offline jobs: from images to latent shards."""
