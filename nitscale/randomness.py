"""Keyed randomness: every random choice is a pure function of a key such as (seed, "noise", step, pack).

No generator state is ever saved or shared. Rank, worker and world size are never part of a key, so that the same
images meet the same noise on any number of processes (DESIGN: "Data: the plan is stateless").
"""

import hashlib
from typing import TypeAlias

import numpy as np
import torch

Key: TypeAlias = int | str


def key_digest(*key: Key) -> int:
    """63-bit hash of a key. Integers and strings never collide by their spelling: (1, "2") differs from ("1", 2)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(*key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded by the key. CPU and CUDA generators give different streams."""
    return torch.Generator(device=device).manual_seed(key_digest(*key))


def random_words(n: int, *key: Key) -> np.ndarray:
    """`n` uniform 64-bit words, (n,) uint64: raw Philox output, which NumPy keeps the same in every version."""
    return np.random.Philox(key=key_digest(*key)).random_raw(n)


def permutation(n: int, *key: Key) -> np.ndarray:
    """A random order of range(n), (n,) int64: the stable argsort of random words."""
    return np.argsort(random_words(n, *key), kind="stable")


def bernoulli(n: int, probability: float, *key: Key) -> np.ndarray:
    """`n` independent coin flips, (n,) bool, true with the given probability."""
    return (
        random_words(n, *key) < np.uint64(min(int(probability * 2.0**64), 2**64 - 1))
        if probability > 0
        else np.zeros(n, bool)
    )
