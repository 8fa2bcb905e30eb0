"""Codecs between images and latents, all behind one small interface.

An image is (3, H, W) in [-1, 1] with sides that are multiples of the codec's `factor`; its latent is
(channels, H / factor, W / factor), standardised to about zero mean and unit variance. `PretrainedCodec` is a published
autoencoder through diffusers: DC-AE (arXiv 2410.10733), SD-VAE, SDXL-VAE; `DCTCodec` needs no weights. A codec's
`spec()` is stored in a dataset's manifest, and `codec_from_spec` builds the same codec from it, or refuses.
"""

import hashlib
import inspect
import json
import math
import os
from contextlib import suppress
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
IDS = {"AutoencoderDC": "autoencoder-dc", "AutoencoderKL": "autoencoder-kl"}
"""Classes of diffusers, and the ids of their codecs."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model.safetensors"
STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Entries of config.json that standardise latents; all others are the architecture."""
WHOLE_PIXELS = 2048 * 2048
TILE_SIDE = 1024


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
    """An autoencoder of diffusers, with standardised latents: (z - shift) · scale. Made by `load_codec`.

    Of the posterior of SD-VAE and SDXL-VAE the mean is taken, so that encoding is a function of the image, and encoding
    again gives the same shard. (The NiT code's helper for SD-VAE draws a sample; the FiT code reads latents that were
    made before. DC-AE, with which NiT was trained, has no posterior.)
    """

    whole_pixels: int
    """Images of more pixels are encoded and decoded one by one in overlapping tiles whose seams are blended, so that
    memory does not grow with them; up to here the result is exactly that of the whole."""
    tile_side: int
    """Pixels of a tile's side."""

    def __init__(self, model: Any, source: str, weights_sha256: str, whole_pixels: int, tile_side: int) -> None:
        """`model` is an AutoencoderDC or AutoencoderKL in evaluation mode; `source` is where it came from.

        UserError if it is not for colour images, its statistics are no numbers, or tiles of `tile_side` cannot overlap.
        """
        config = model.config
        self.id = IDS[type(model).__name__]
        levels = config.encoder_block_out_channels if self.id == "autoencoder-dc" else config.block_out_channels
        self.factor, self.channels = 2 ** (len(levels) - 1), int(config.latent_channels)
        if config.in_channels != 3:
            raise UserError(f"autoencoders: {source} is for images of {config.in_channels} channels, not of 3")
        if tile_side < 1 or tile_side % (8 * self.factor):
            raise UserError(
                f"autoencoders: tile_side={tile_side} must be a multiple of 8 x factor = {8 * self.factor} pixels"
            )
        self.shift, self.scale = _statistics(config, self.channels, source)
        self.config_sha256 = _architecture_digest(model)
        self.source, self.weights_sha256 = source, weights_sha256
        self.whole_pixels, self.tile_side = whole_pixels, tile_side
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
        z = encoded.latent if self.id == "autoencoder-dc" else encoded.latent_dist.mean
        return ((z.float() - self._like(self.shift, z)) * self._like(self.scale, z)).contiguous()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, channels, h, w) → images (b, 3, h · factor, w · factor) float32, not clamped.

        ValueError for another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"autoencoders: expected latents (b, {self.channels}, h, w), got {tuple(latents.shape)}")
        self._tile(latents.shape[2] * latents.shape[3] * self.factor**2)
        z = latents.float() / self._like(self.scale, latents) + self._like(self.shift, latents)
        return self.model.decode(z.to(self.model.dtype)).sample.float().contiguous()

    def to(self, device: torch.device | str) -> Self:
        """The same codec, moved to `device`."""
        self.model.to(device)
        return self

    def spec(self) -> dict[str, Any]:
        """JSON for the manifest. The digest covers everything that latents depend on, but not `source`."""
        parameters = {
            "id": self.id,
            "factor": self.factor,
            "channels": self.channels,
            "scale": self.scale,
            "shift": self.shift,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "whole_pixels": self.whole_pixels,
            "tile_side": self.tile_side,
            "config_sha256": self.config_sha256,
            "weights_sha256": self.weights_sha256,
        } | ({"posterior": "mean"} if self.id == "autoencoder-kl" else {})
        return parameters | {"source": self.source, "digest": _json_digest(parameters)}

    def _like(self, values: float | list[float], latents: Tensor) -> float | Tensor:
        """Scalars as they are; values of channels (channels,) → (1, channels, 1, 1) on the device of `latents`."""
        if isinstance(values, list):
            return torch.tensor(values, device=latents.device).view(1, -1, 1, 1)
        return values

    def _tile(self, pixels: int) -> None:
        """Prepare diffusers' model for images of so many pixels."""
        model, side = self.model, self.tile_side
        model.use_tiling = model.use_slicing = pixels > self.whole_pixels
        if self.id == "autoencoder-dc":
            model.tile_sample_min_height = model.tile_sample_min_width = side
            model.tile_sample_stride_height = model.tile_sample_stride_width = side * 7 // 8
            model.tile_latent_min_height = model.tile_latent_min_width = side // self.factor
        else:
            model.tile_sample_min_size, model.tile_latent_min_size = side, side // self.factor


def load_codec(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    whole_pixels: int = WHOLE_PIXELS,
    tile_side: int = TILE_SIDE,
    channels_last: bool = False,
    compiled: bool = False,
) -> PretrainedCodec:
    """A published autoencoder: a short name in PUBLISHED, a hub id, or a local folder with config.json and safetensors.

    It computes in `dtype`, float32 or bfloat16. `channels_last` and `compiled` (torch.compile of encoder and decoder,
    for sizes of all kinds) may be faster on a GPU, and round differently. What is in the hub's cache needs no network;
    no code of the hub is run and no pickle is read. UserError if diffusers is missing, the name is no autoencoder of a
    known kind, its weights are missing, damaged or others than its configuration says, or the hub does not answer.
    """
    if dtype not in DTYPES.values():
        raise UserError(f"autoencoders: {name!r} cannot compute in {dtype}; choose float32 or bfloat16")
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"autoencoders: {name!r} needs diffusers ({error}); pip install 'nitscale[autoencoders]'"
        ) from error
    folder = _find_folder(name)
    kind = _check_config(folder)
    with open(folder / WEIGHTS, "rb") as file:
        weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        # low_cpu_mem_usage=True would need accelerate.
        model, found = getattr(diffusers, kind).from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # what a config.json of somebody else's making can make diffusers raise is anything
        raise UserError(
            f"autoencoders: {folder} cannot be loaded ({_line(error)}); copy config.json and {WEIGHTS} again"
        ) from error
    if wrong := [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]:
        raise UserError(
            f"autoencoders: the weights in {folder} are not those of its config.json: {len(wrong)} tensors are "
            f"missing, surplus or of another shape, such as {wrong[0]}; copy the folder again"
        )
    codec = PretrainedCodec(model.requires_grad_(False).eval(), name, weights_sha256, whole_pixels, tile_side)
    model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    if compiled:
        model.encoder.compile(dynamic=True)
        model.decoder.compile(dynamic=True)
    return codec


def codec_from_spec(spec: dict[str, Any], folder: str | None = None) -> Codec:
    """The codec that a manifest describes, loaded from `folder`, or where NITSCALE_CODEC says, or from where it was
    loaded before. UserError if this build does not know it, it cannot be loaded, or it is not the one of the spec."""
    if spec.get("id") == "dct":
        return dct_from_spec(spec)
    if spec.get("id") not in IDS.values():
        raise UserError(
            f"autoencoders: this build knows the codecs 'dct', {', '.join(map(repr, IDS.values()))}; the dataset was "
            f"made with {spec.get('id')!r}"
        )
    if "digest" not in spec and "source" in spec:  # of imported weights: what their publisher says, and no more
        return load_codec(folder or os.environ.get(MOVED) or str(spec["source"]))
    try:
        source, dtype = str(spec["source"]), DTYPES[spec["dtype"]]
        whole_pixels, tile_side = int(spec["whole_pixels"]), int(spec["tile_side"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"autoencoders: the codec's description is damaged ({error!r}): {spec}") from error
    place = folder or os.environ.get(MOVED) or source
    way_out = f"set {MOVED} to the folder of the autoencoder that the dataset was made with"
    try:
        codec = load_codec(place, dtype, whole_pixels=whole_pixels, tile_side=tile_side)
    except UserError as error:
        raise UserError(f"{error}; or {way_out}") from error
    codec.source = source
    now = codec.spec()
    if differing := [name for name in now if now[name] != spec.get(name)]:
        raise UserError(
            f"autoencoders: {place} is not the autoencoder that the dataset was made with: it differs in "
            f"{', '.join(differing)}; {way_out}"
        )
    return codec


def _find_folder(name: str) -> Path:
    """The local folder of an autoencoder: itself, or in the hub's cache, where it is downloaded to if need be."""
    source = PUBLISHED.get(name, name)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    files = ["config.json", WEIGHTS]
    try:
        with suppress(OSError):  # without network first: many jobs do not ask the hub, nor get a newer version halfway
            folder = Path(snapshot_download(source, allow_patterns=files, local_files_only=True))
        if not all((folder / file).is_file() for file in files):
            folder = Path(snapshot_download(source, allow_patterns=files))
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise FileNotFoundError(f"what it gave has no {' and no '.join(missing)}")
        return folder
    except Exception as error:  # of the connection, of the hub, of the name; the client's classes vary by its version
        raise UserError(
            f"autoencoders: {name!r} is no local folder, and the hub did not give {source} ({_line(error)}); download "
            "it on a machine with network (`hf download`) and give its folder, or set HF_HOME to a cache that has it; "
            f"short names: {', '.join(PUBLISHED)}"
        ) from error


def _check_config(folder: Path) -> str:
    """The class of the autoencoder in `folder`. UserError if it is none, or none whose latents are known."""
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = config.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        hint = f"; you may mean {folder / 'vae'}" if (folder / "vae" / "config.json").exists() else ""
        raise UserError(
            f"autoencoders: {folder} is not the folder of an autoencoder: it has no readable config.json "
            f"({_line(error)}){hint}"
        ) from error
    if kind not in IDS:
        raise UserError(
            f"autoencoders: {folder} has a model of class {kind!r}; give an AutoencoderDC (DC-AE) or an AutoencoderKL "
            "(SD-VAE, SDXL-VAE)"
        )
    # SD-VAE's config.json is older than the entry, and diffusers' default is SD-VAE's. For DC-AE there is no default
    # that is right for anything.
    if kind == "AutoencoderDC" and not isinstance(config.get("scaling_factor"), (int, float)):
        raise UserError(
            f"autoencoders: {folder}/config.json has no scaling_factor, without which the latents of a DC-AE mean "
            "nothing; add that of the published model (DC-AE of Sana: 0.41407)"
        )
    if not (folder / WEIGHTS).is_file() or (folder / f"{WEIGHTS}.index.json").exists():
        raise UserError(
            f"autoencoders: {folder} must have its weights in the one file {WEIGHTS}; weights of other formats can be "
            "converted by diffusers' save_pretrained"
        )
    return str(kind)


def _statistics(config: Any, channels: int, source: str) -> tuple[float | list[float], float | list[float]]:
    """Shift and scale of (z - shift) · scale, as diffusers' pipelines use the configuration: latents_mean and
    latents_std for each channel where it has them, else shift_factor."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    factor = config.scaling_factor
    try:
        if (mean is None) != (std is None) or (mean is not None and not len(mean) == len(std) == channels):
            raise ValueError(f"latents_mean and latents_std must both have {channels} values")
        if mean is None:
            shift, scale = [float(config.get("shift_factor") or 0)], [float(factor)]
        else:
            shift, scale = [float(value) for value in mean], [float(factor) / float(value) for value in std]
        if not all(map(math.isfinite, shift + scale)) or min(scale) <= 0:
            raise ValueError("they must be finite, and the scale positive")
    except (TypeError, ValueError, ZeroDivisionError) as error:
        found = {name: config.get(name) for name in STATISTICS}
        raise UserError(f"autoencoders: the statistics of {source} cannot be used ({error}): {found}") from error
    return (shift[0], scale[0]) if mean is None else (shift, scale)


def _architecture_digest(model: Any) -> str:
    """Of the configuration where it is not diffusers' default, so that a version with further options, or a folder
    saved again, gives the same. UserError for options that this diffusers would ignore."""
    parameters = inspect.signature(type(model).__init__).parameters
    given = {name: value for name, value in model.config.items() if not name.startswith("_")}
    if unknown := [name for name in given if name not in parameters]:
        raise UserError(
            f"autoencoders: config.json has options that the installed diffusers ignores: {', '.join(unknown)}; "
            "install a newer one, or remove them if they do not matter"
        )
    special = {
        name: value
        for name, value in given.items()
        if name not in STATISTICS
        and json.dumps(value) != json.dumps(parameters[name].default)  # lists are tuples there
    }
    return _json_digest({"class": type(model).__name__} | special)


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _line(error: Exception) -> str:
    """What an error says, in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
