"""nitscale: train native-resolution diffusion transformers (NiT, FiTv2) at scale."""

__version__ = "0.1.0"
