"""`nitscale evaluate`: how far a folder of samples is from a dataset of real images."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from data_prep.folders import find_images
from data_prep.images import UnreadableImage, decode_image
from data_prep.prepare import EncodeConfig
from nitscale.autoencoders import Codec
from nitscale.data.manifest import Dataset, load_dataset
from nitscale.errors import UserError
from nitscale.evaluate.frechet import frechet_distance, latent_features


def evaluate_folder(samples: Path, data: Path) -> str:
    """The report of `nitscale evaluate`, one line. UserError if either has too few images for a distance."""
    dataset = load_dataset(data)
    real = dataset_latents(dataset)
    found = [image.path for image in find_images(samples).images if image.path.name != "contact_sheet.png"]
    codec = dataset.codec()
    made = [image_latent(path, codec) for path in found]
    distance = frechet_distance(latent_features(made), latent_features(real))
    return (
        f"evaluate: Fréchet distance {distance:.3f} in latents, {len(made):,} samples against {len(real):,} real images"
    )


def dataset_latents(dataset: Dataset, limit: int | None = None) -> list[Tensor]:
    """The first `limit` latents (c, h, w) of a dataset, unflipped, fp32."""
    count = min(limit or dataset.index.num_samples, dataset.index.num_samples)
    return [dataset.latent(i).float() for i in range(count)]


def image_latent(path: Path, codec: Codec) -> Tensor:
    """The latent (c, h, w) of an image file whose sides are multiples of the codec's factor."""
    image = read_image(path)
    height, width = image.shape[1:]
    if height % codec.factor or width % codec.factor:
        raise UserError(f"evaluate: {path} is {height}x{width}; sides must be multiples of {codec.factor} pixels")
    return codec.encode(image[None])[0]


def read_image(path: Path) -> Tensor:
    """An image file → (3, H, W) in [-1, 1]."""
    try:
        pixels = torch.from_numpy(np.array(decode_image(path, EncodeConfig.max_input_pixels)))
    except UnreadableImage as error:
        raise UserError(f"evaluate: {path} cannot be read: {error}") from error
    return rearrange(pixels.float() / 127.5 - 1, "h w c -> c h w")
