"""Vision encoders behind one interface: images of mixed sizes in, one vector for each token of a pack out.

The only file that imports transformers. DINOv2 (arXiv 2304.07193), with and without registers, and RADIO
(arXiv 2412.07679) in transformers' own classes run a pack in one forward: the images' sequences end to end, each with
its class and register tokens, through layers whose attention stays within an image. Encoders that transformers does
not know bring their own Python code (older RADIOs do), which runs only if `trust_remote_code` says so, and on
images of one size at a time.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nitscale.errors import UserError
from nitscale.layout import Grid, PackLayout

KINDS = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel", "radio": "RadioModel"}
"""model_type in config.json, and the class of transformers that runs packed."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ATTENTION = "nitscale_packed"
"""Name under which transformers finds our attention."""

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, PackLayout, float], Tensor]
"""q, k, v (N, heads, head_dim), which tokens are one image, scale → (N, heads, head_dim): attention within each image,
such as `nitscale.models.attention.attend`."""


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder. Made by `load_encoder`."""

    run: Callable[[list[Tensor]], list[Tensor]]
    """Batches of images (b, 3, h, w) in [0, 1], each of one size → features of their patches (b, patches, Z)."""
    patch_size: int
    """Pixels of a patch's side."""
    width: int
    """Z: features of a patch."""
    oversample: int = 1
    """Patches a side of one token, over which features are averaged."""

    @torch.no_grad()
    def features(self, images: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """Features of each token, (N, Z): images (3, H, W) uint8 and their grids (rows, columns) in the pack's order.

        Each image is resized, by antialiased bicubic interpolation, so that the encoder has `oversample` x `oversample`
        patches for each token.
        """
        alike: dict[tuple[Grid, torch.Size], list[int]] = defaultdict(list)
        for i, (image, grid) in enumerate(zip(images, grids, strict=True)):
            alike[grid, image.shape].append(i)
        # Sequences of one length stand side by side, so that the attention of all of them is one call.
        groups = sorted(alike.items(), key=lambda group: math.prod(group[0][0]))
        outputs = self.run([self._resize(torch.stack([images[i] for i in of]), grid) for (grid, _), of in groups])
        features: list[Tensor] = [torch.empty(0)] * len(images)
        for ((grid, _), of), output in zip(groups, outputs, strict=True):
            for i, tokens in zip(of, self._pool(output, grid), strict=True):
                features[i] = tokens
        return torch.cat(features)

    def _resize(self, images: Tensor, grid: Grid) -> Tensor:
        """(b, 3, H, W) uint8 → (b, 3, h, w) float32 in [0, 1], of `oversample` patches for each token."""
        side = self.patch_size * self.oversample
        size = (grid[0] * side, grid[1] * side)
        pixels = images.float() / 255
        if images.shape[2:] == size:
            return pixels
        return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)

    def _pool(self, features: Tensor, grid: Grid) -> Tensor:
        """(b, patches, Z) → (b, tokens, Z)."""
        if self.oversample == 1:
            return features
        sides = {"r": grid[0], "c": grid[1], "p": self.oversample, "q": self.oversample}
        return rearrange(features, "b (r p c q) z -> b (r c) (p q) z", **sides).mean(2)


def load_encoder(
    source: str,
    attend: Attend,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    oversample: int = 1,
    trust_remote_code: bool = False,
) -> Encoder:
    """The encoder in a local folder, or of that name on the hub, computing in `dtype` on `device`.

    UserError if transformers is not installed, the encoder cannot be had, its weights do not fit its configuration, or
    it brings code of its own that is not trusted.
    """
    transformers = _transformers()
    folder = _find_folder(source)
    try:
        config = json.loads((folder / "config.json").read_text())
        kind, own_code = KINDS.get(config.get("model_type")), config.get("auto_map", {}).get("AutoModel")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"encoders: {folder} is not the folder of an encoder: it has no readable config.json ({_line(error)})"
        ) from error
    if kind is None and own_code is None:
        raise UserError(
            f"encoders: {source} has a model of type {config.get('model_type')!r}; give one of {', '.join(KINDS)}"
        )
    if kind is None and not trust_remote_code:
        raise UserError(
            f"encoders: {source} is no model that transformers knows: it comes with Python code of its own "
            f"({own_code}). With trust_remote_code=true that code runs in every process of the "
            "training, with all that your account may do there; read it first, and give a local folder, which nobody "
            "else can change"
        )
    try:
        if kind is None:
            model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, use_safetensors=True)
            found: dict[str, Any] = {}
        else:
            model, found = getattr(transformers, kind).from_pretrained(
                folder, attn_implementation=ATTENTION, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # a config.json or code of somebody else's making can raise anything
        raise UserError(f"encoders: {source} cannot be loaded ({_line(error)})") from error
    if wrong := [*found.get("missing_keys", ()), *found.get("mismatched_keys", ())]:
        raise UserError(
            f"encoders: the weights of {source} are not those of its config.json: {len(wrong)} tensors are missing or "
            f"of another shape, such as {wrong[0]}; copy it again"
        )
    model = model.requires_grad_(False).eval().to(device, dtype)
    if kind is not None:
        getattr(model, "input_conditioner", torch.nn.Identity()).float()  # RADIO's mean and deviation of pixels
        return Encoder(_packed(model, attend), model.config.patch_size, model.config.hidden_size, oversample)
    run, patch_size = _one_by_one(model), int(model.patch_size)
    probe = torch.zeros(1, 3, 4 * patch_size, 4 * patch_size, device=device)
    return Encoder(run, patch_size, run([probe])[0].shape[-1], oversample)


def _find_folder(source: str) -> Path:
    """The local folder of an encoder: itself, or in the hub's cache, where it is downloaded to if need be."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.py"]
    try:
        with suppress(OSError):  # without network first: many ranks do not ask the hub, nor get a newer version halfway
            folder = Path(snapshot_download(source, allow_patterns=wanted, local_files_only=True))
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=wanted))
        return folder
    except Exception as error:  # of the connection, of the hub, of the name; the client's classes vary by its version
        raise UserError(
            f"encoders: {source!r} is no local folder, and the hub did not give it ({_line(error)}); download it on a "
            "machine with network (`hf download`) and give its folder, or set HF_HOME to a cache that has it"
        ) from error


def _packed(model: Any, attend: Attend) -> Callable[[list[Tensor]], list[Tensor]]:
    """All images through the layers of a transformers model as one sequence."""
    weight = next(model.parameters())
    mean, std = (torch.tensor(values, device=weight.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    # RADIO takes pixels in [0, 1] and normalises them itself; DINOv2 ends with a norm, and RADIO does not.
    normalize = getattr(model, "input_conditioner", lambda images: (images - mean) / std)
    last_norm = getattr(model, "layernorm", torch.nn.Identity())

    def run(batches: list[Tensor]) -> list[Tensor]:
        embedded = [model.embeddings(normalize(images).to(weight.dtype)) for images in batches]
        lengths = [length for images in embedded for length in [images.shape[1]] * len(images)]
        layout = PackLayout.from_grids([(1, length) for length in lengths]).to(weight.device, non_blocking=True)
        x = torch.cat([images.flatten(0, 1) for images in embedded])[None]
        for layer in model.encoder.layer:
            x = layer(x, attend=attend, layout=layout)
        parts = last_norm(x)[0].split([images.shape[0] * images.shape[1] for images in embedded])
        outputs = []
        for images, part in zip(batches, parts, strict=True):
            patches = images.shape[2] * images.shape[3] // model.config.patch_size**2
            outputs.append(part.unflatten(0, (len(images), -1))[:, -patches:])  # behind class and register tokens
        return outputs

    return run


def _attend_within_images(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    *,
    scaling: float,
    attend: Attend,
    layout: PackLayout,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call: q, k, v (1, heads, N, head_dim) → (1, N, heads, head_dim), and no weights."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return attend(q, k, v, layout, scaling)[None], None


def _one_by_one(model: Any) -> Callable[[list[Tensor]], list[Tensor]]:
    """Images through RADIO's own code, one size after the other. It takes pixels in [0, 1] and gives (summary,
    features)."""
    dtype = next(model.parameters()).dtype

    def run(batches: list[Tensor]) -> list[Tensor]:
        outputs = [model(images.to(dtype)) for images in batches]
        return [output.features if hasattr(output, "features") else output[1] for output in outputs]

    return run


def _transformers() -> Any:
    """The library, with our attention registered. UserError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"encoders: transformers is needed ({error}); pip install 'nitscale[repa]'") from error
    transformers.utils.logging.disable_progress_bar()  # of every rank, on opening a file
    transformers.AttentionInterface.register(ATTENTION, _attend_within_images)
    return transformers


def _line(error: Exception) -> str:
    """What an error says, in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
