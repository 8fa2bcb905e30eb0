import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nitscale.autoencoders import PretrainedCodec, codec_from_spec, load_codec
from nitscale.errors import UserError

diffusers = pytest.importorskip("diffusers")


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def dc_ae(tmp_path_factory):
    """A small DC-AE with the kinds of blocks that the one of Sana has; factor 8."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 16),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    folder = tmp_path_factory.mktemp("dc_ae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    """A small VAE of SD's kind, factor 4, with a shift."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
        shift_factor=0.1,
    )
    folder = tmp_path_factory.mktemp("kl")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["dc_ae", "kl"])
def folder(request):
    return request.getfixturevalue(request.param)


def changed(folder, tmp_path, **values):
    """A copy of a model's folder with other values in its config.json; None removes one."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | values
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return copy


def test_latents_of_dc_ae_are_those_of_diffusers_times_the_scale(dc_ae):
    codec, x = load_codec(str(dc_ae)), images(2, 3, 32, 48)
    model = diffusers.AutoencoderDC.from_pretrained(dc_ae)
    assert (codec.factor, codec.channels) == (8, 4)
    with torch.no_grad():
        z = model.encode(x).latent
        torch.testing.assert_close(codec.encode(x), z * 0.41407)
        torch.testing.assert_close(codec.decode(z * 0.41407), model.decode(z).sample, rtol=1e-4, atol=1e-5)


def test_latents_of_a_vae_are_the_mean_shifted_and_scaled(kl):
    codec, x = load_codec(str(kl)), images(2, 3, 32, 48)
    model = diffusers.AutoencoderKL.from_pretrained(kl)
    assert (codec.factor, codec.channels) == (4, 4)
    with torch.no_grad():
        z = model.encode(x).latent_dist.mean
        torch.testing.assert_close(codec.encode(x), (z - 0.1) * 0.18215)
        torch.testing.assert_close(codec.decode((z - 0.1) * 0.18215), model.decode(z).sample, rtol=1e-4, atol=1e-5)


def test_a_batch_has_the_latents_of_its_images(folder):
    codec, x = load_codec(str(folder)), images(3, 3, 16, 24)
    torch.testing.assert_close(codec.encode(x), torch.cat([codec.encode(image[None]) for image in x]))


def test_bfloat16_is_near(folder):
    x = images(2, 3, 32, 32)
    half, full = load_codec(str(folder), torch.bfloat16), load_codec(str(folder))
    assert half.model.dtype == torch.bfloat16
    assert half.encode(x).dtype == half.decode(half.encode(x)).dtype == torch.float32
    assert (half.encode(x) - full.encode(x)).abs().max() < 0.05 * full.encode(x).abs().max()
    assert half.spec()["weights_sha256"] == full.spec()["weights_sha256"]
    assert half.spec()["digest"] != full.spec()["digest"]


def test_a_codec_is_found_again_by_its_json(folder, tmp_path, monkeypatch):
    codec, x = load_codec(str(folder)), images(1, 3, 16, 16)
    spec = json.loads(json.dumps(codec.spec()))
    again = codec_from_spec(spec)
    assert again.spec() == spec
    assert torch.equal(again.encode(x), codec.encode(x))
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert load_codec(str(moved)).spec() == spec | {"source": str(moved)}
    monkeypatch.setenv("NITSCALE_CODEC", str(moved))
    assert codec_from_spec(spec | {"source": "/nowhere"}).spec()["digest"] == spec["digest"]


def test_other_weights_or_another_scale_are_refused(folder, tmp_path):
    spec = load_codec(str(folder)).spec()
    copy = changed(folder, tmp_path, scaling_factor=0.5)
    with pytest.raises(UserError, match="differs in scale; set NITSCALE_CODEC"):
        codec_from_spec(spec | {"source": str(copy)})
    copy = changed(folder, tmp_path / "again")
    weights = load_file(copy / "diffusion_pytorch_model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, copy / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="differs in weights_sha256"):
        codec_from_spec(spec | {"source": str(copy)})


def test_large_images_are_done_in_tiles_and_others_are_not(folder):
    small, x = load_codec(str(folder)), images(1, 3, 64, 64)
    model = small.model
    model.tile_sample_min_size = model.tile_sample_min_height = model.tile_sample_min_width = 32
    model.tile_latent_min_size = 32 // small.factor
    if hasattr(model, "tile_sample_stride_height"):
        model.tile_sample_stride_height = model.tile_sample_stride_width = 24
    whole, sizes = small.encode(x), []
    handle = model.encoder.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[-1]))
    assert torch.equal(small.encode(x), whole)
    assert sizes == [64]
    tiled = PretrainedCodec(model, "source", "hash", whole_pixels=64 * 64 - 1).encode(x)
    handle.remove()
    assert tiled.shape == whole.shape
    assert max(sizes[1:]) <= 32
    assert torch.equal(small.encode(x), whole)


@pytest.mark.parametrize("shape", [(1, 3, 18, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_images_of_other_shapes_are_refused(folder, shape):
    with pytest.raises(ValueError, match="expected images"):
        load_codec(str(folder)).encode(torch.zeros(shape))


def test_a_model_without_a_scale_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"has no scaling_factor.*0\.41407"):
        load_codec(str(changed(folder, tmp_path, scaling_factor=None)))


def test_another_kind_of_model_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="of class 'UNet2DModel'; give an AutoencoderDC"):
        load_codec(str(changed(folder, tmp_path, _class_name="UNet2DModel")))


def test_a_folder_without_weights_or_with_damaged_ones_is_refused(folder, tmp_path):
    copy = changed(folder, tmp_path)
    (copy / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"copy cannot be loaded .*\.safetensors"):
        load_codec(str(copy))
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"copy cannot be loaded .*\.safetensors"):
        load_codec(str(copy))


def test_missing_tensors_are_named(folder, tmp_path):
    copy = changed(folder, tmp_path)
    weights = load_file(copy / "diffusion_pytorch_model.safetensors")
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, copy / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=rf"1 tensors .* such as {name}"):
        load_codec(str(copy))


def test_pickled_weights_are_never_read(folder, tmp_path):
    copy = changed(folder, tmp_path)
    weights = load_file(copy / "diffusion_pytorch_model.safetensors")
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, copy / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_codec(str(copy))


def test_a_hub_that_does_not_answer_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"the hub did not give mit-han-lab/dc-ae-f32c32-sana-1\.1-diffusers .*HF_HOME"):
        load_codec("dc-ae-f32c32")
