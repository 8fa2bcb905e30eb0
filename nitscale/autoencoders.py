"""Codecs between images and latents, all behind one small interface.

An image is (3, H, W) in [-1, 1] with sides that are multiples of the codec's `factor`; its latent is
(channels, H / factor, W / factor), standardised to about zero mean and unit variance. `PretrainedCodec` is a published
autoencoder through diffusers: DC-AE, SD-VAE, SDXL-VAE; `DCTCodec` needs no weights. A codec's `spec()` is stored in a
dataset's manifest, and `codec_from_spec` builds the same codec from it, or refuses.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from nitscale.dct import DCTCodec, dct_from_spec
from nitscale.errors import UserError

__all__ = ["Codec", "DCTCodec", "PretrainedCodec", "codec_from_spec", "load_codec"]

PUBLISHED = {
    "dc-ae-f32c32": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "sdxl-vae": "stabilityai/sdxl-vae",
}
"""Short names and the hub's: the autoencoders of NiT (DC-AE of Sana 1.1) and of FiTv2 (SD-VAE)."""
MOVED = "NITSCALE_CODEC"
"""Environment variable: the folder of a dataset's autoencoder, where it does not lie any more where it was."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHOLE_PIXELS = 2048 * 2048
"""Larger images are encoded and decoded in overlapping tiles, whose seams are blended: memory stays bounded."""


class Codec(Protocol):
    """What data preparation and generation need of an autoencoder."""

    factor: int
    """Pixels of one latent cell's side."""
    channels: int

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] → latents (b, channels, H / factor, W / factor), standardised."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, channels, h, w) → images (b, 3, h · factor, w · factor), not clamped."""

    def spec(self) -> dict[str, Any]:
        """JSON for the manifest: id, parameters, digest."""

    def to(self, device: torch.device | str) -> Self:
        """The codec with its tensors on `device`."""


class PretrainedCodec:
    """An autoencoder of diffusers, with standardised latents: (z - shift) · scale.

    Of SD-VAE's and SDXL-VAE's posterior the mean is taken, so that encoding is a function of the image; the published
    FiT code draws a sample.
    """

    def __init__(self, model: Any, source: str, weights_sha256: str, whole_pixels: int = WHOLE_PIXELS) -> None:
        """`model` is an AutoencoderDC or AutoencoderKL in evaluation mode; `source` is where it came from."""
        config = model.config
        self.id = {"AutoencoderDC": "autoencoder-dc", "AutoencoderKL": "autoencoder-kl"}[type(model).__name__]
        levels = config.encoder_block_out_channels if self.id == "autoencoder-dc" else config.block_out_channels
        self.factor = 2 ** (len(levels) - 1)
        self.channels = int(config.latent_channels)
        self.scale, self.shift = float(config.scaling_factor), float(config.get("shift_factor") or 0)
        self.source, self.weights_sha256, self.whole_pixels = source, weights_sha256, whole_pixels
        self.model = model

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] → latents (b, channels, H / factor, W / factor) float32, computed in the
        codec's dtype. ValueError if a side is not a multiple of `factor`."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(
                f"autoencoders: expected images (b, 3, H, W) with H and W multiples of {self.factor}, "
                f"got {tuple(images.shape)}"
            )
        self._tile(images.shape[2] * images.shape[3])
        encoded = self.model.encode(images.to(self.model.dtype))
        latents = encoded.latent if self.id == "autoencoder-dc" else encoded.latent_dist.mean
        return (latents.float() - self.shift) * self.scale

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, channels, h, w) → images (b, 3, h · factor, w · factor) float32, not clamped."""
        self._tile(latents.shape[2] * latents.shape[3] * self.factor**2)
        return self.model.decode((latents.float() / self.scale + self.shift).to(self.model.dtype)).sample.float()

    def to(self, device: torch.device | str) -> Self:
        """The same codec, moved to `device`."""
        self.model.to(device)
        return self

    def spec(self) -> dict[str, Any]:
        """JSON for the manifest. The digest does not depend on `source`."""
        parameters = {
            "id": self.id,
            "factor": self.factor,
            "channels": self.channels,
            "scale": self.scale,
            "shift": self.shift,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "weights_sha256": self.weights_sha256,
        } | ({"posterior": "mean"} if self.id == "autoencoder-kl" else {})
        canonical = json.dumps(parameters, sort_keys=True, separators=(",", ":"))
        return parameters | {"source": self.source, "digest": hashlib.sha256(canonical.encode()).hexdigest()}

    def _tile(self, pixels: int) -> None:
        """Work in tiles, image by image, above `whole_pixels` pixels an image, and at once below."""
        if pixels > self.whole_pixels:
            self.model.enable_tiling()
            self.model.enable_slicing()
        else:
            self.model.disable_tiling()
            self.model.disable_slicing()


def load_codec(name: str, dtype: torch.dtype = torch.float32) -> PretrainedCodec:
    """A published autoencoder: a short name in PUBLISHED, a hub id, or a local folder with config.json and
    safetensors. It computes in `dtype`.

    UserError if diffusers is missing, the name is no autoencoder of a known kind, its weights are missing, damaged or
    others than its configuration says, or the hub does not answer.
    """
    source = PUBLISHED.get(name, name)
    try:
        import diffusers
        from safetensors import SafetensorError
    except ImportError as error:
        raise UserError(
            f"autoencoders: {name!r} needs diffusers ({error}); pip install 'nitscale[autoencoders]'"
        ) from None
    try:
        config: dict[str, Any] = diffusers.AutoencoderKL.load_config(source)  # type: ignore[assignment]
    except (OSError, ValueError) as error:
        raise UserError(_cannot_load(name, source, error)) from error
    kind = config.get("_class_name")
    if kind not in ("AutoencoderDC", "AutoencoderKL"):
        raise UserError(
            f"autoencoders: {source} is of class {kind!r}; give an AutoencoderDC (DC-AE) or an AutoencoderKL "
            "(SD-VAE, SDXL-VAE)"
        )
    if not isinstance(config.get("scaling_factor"), (int, float)):
        raise UserError(
            f"autoencoders: the config.json of {source} has no scaling_factor, without which its latents mean nothing; "
            "add the one of the published model (DC-AE of Sana: 0.41407, SD-VAE: 0.18215, SDXL-VAE: 0.13025)"
        )
    try:
        model, found = getattr(diffusers, kind).from_pretrained(
            source, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(_cannot_load(name, source, error)) from error
    if wrong := [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]:
        raise UserError(
            f"autoencoders: the weights of {source} are not those of its config.json: {len(wrong)} tensors are "
            f"missing, surplus or of another shape, such as {wrong[0]}; copy the folder again"
        )
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    model.requires_grad_(False).eval()
    return PretrainedCodec(model.to(dtype), name, digest.hexdigest())


def codec_from_spec(spec: dict[str, Any]) -> Codec:
    """The codec that a manifest describes. UserError if this build does not know it, it cannot be loaded, or it is not
    the one that the spec's digest names."""
    if spec.get("id") == "dct":
        return dct_from_spec(spec)
    if spec.get("id") not in ("autoencoder-dc", "autoencoder-kl"):
        raise UserError(
            "autoencoders: this build knows the codecs 'dct', 'autoencoder-dc' and 'autoencoder-kl', the dataset was "
            f"made with {spec.get('id')!r}"
        )
    try:
        source, dtype, digest = os.environ.get(MOVED) or str(spec["source"]), DTYPES[spec["dtype"]], spec["digest"]
    except (KeyError, TypeError) as error:
        raise UserError(f"autoencoders: the codec's description is damaged ({error!r}): {spec}") from error
    codec = load_codec(source, dtype)
    codec.source = spec["source"]
    now = codec.spec()
    if now["digest"] != digest:
        differing = [name for name in now if name not in ("digest", "source") and now[name] != spec.get(name)]
        raise UserError(
            f"autoencoders: {source} is not the autoencoder that the dataset was made with: it differs in "
            f"{', '.join(differing) or 'its digest'}; set {MOVED} to the folder of the right one"
        )
    return codec


def _cannot_load(name: str, source: str, error: Exception) -> str:
    """Why, in a line, and the way out."""
    reason = " ".join(str(error).split())[:300]
    if Path(source).is_dir():
        return f"autoencoders: {source} cannot be loaded ({reason}); it needs config.json and its .safetensors file"
    return (
        f"autoencoders: {name!r} is no local folder, and the hub did not give {source} ({reason}); download it on a "
        "machine with network (`hf download`) and give its folder, or set HF_HOME to the cache that has it; short "
        f"names: {', '.join(PUBLISHED)}"
    )
