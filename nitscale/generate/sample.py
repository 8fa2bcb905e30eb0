"""Images on request by a trained model and its codec, pack by pack."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from nitscale.autoencoders import Codec
from nitscale.errors import UserError
from nitscale.flow.sampling import (
    SamplerConfig,
    SampleRequest,
    check_request,
    guided_tokens,
    packs_of_requests,
    sample_latents,
)
from nitscale.models.transformer import PackedTransformer


def sample_images(
    model: PackedTransformer,
    codec: Codec,
    requests: Sequence[SampleRequest],
    config: SamplerConfig,
    progress: bool = True,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(position of the request, latent (c, h, w), image (3, H, W) in [-1, 1] on the CPU), as packs are finished."""
    multiple = codec.factor * model.config.patch_size
    for request in requests:
        check_request(request, multiple, model.config.num_classes)
        if (tokens := guided_tokens(request, multiple)) > config.token_budget:
            raise UserError(
                f"sample: size {request.height}x{request.width} needs {tokens:,} tokens with guidance, more than "
                f"token_budget={config.token_budget:,}; use --token-budget {tokens}"
            )
    with tqdm(total=len(requests), desc="sample", unit="image", disable=not progress) as bar:
        for pack in packs_of_requests(requests, multiple, config.token_budget):
            chosen = [requests[i] for i in pack]
            latents = sample_latents(
                model,
                [request.grid(multiple) for request in chosen],
                [request.label for request in chosen],
                [request.seed for request in chosen],
                config,
                channels=model.config.in_channels,
                null_label=model.config.num_classes,
                patch_size=model.config.patch_size,
                device=next(model.parameters()).device,
            )
            for position, latent in zip(pack, latents, strict=True):
                if not torch.isfinite(latent).all():
                    raise UserError("sample: the model gave values that are not finite; its weights are broken")
                image = codec.decode(latent[None])[0].clamp(-1, 1).float().cpu()
                yield position, latent.cpu(), image
                bar.update()
