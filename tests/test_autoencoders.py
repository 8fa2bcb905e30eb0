import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nitscale.autoencoders import PUBLISHED, _architecture_digest, codec_from_spec, load_codec
from nitscale.errors import UserError

diffusers = pytest.importorskip("diffusers")
huggingface_hub = pytest.importorskip("huggingface_hub")

WEIGHTS = "diffusion_pytorch_model.safetensors"


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
        scaling_factor=0.13025,
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


def tensors(folder):
    """The weights in a folder, as copies: the file may be written over."""
    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}


def change_weights(folder, change):
    """`change` the dict of tensors in a folder."""
    weights = tensors(folder)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def test_latents_of_dc_ae_are_those_of_diffusers_times_the_scale(dc_ae):
    codec, x = load_codec(str(dc_ae)), images(2, 3, 32, 48)
    model = diffusers.AutoencoderDC.from_pretrained(dc_ae)
    assert (codec.factor, codec.channels, codec.scale, codec.shift) == (8, 4, 0.41407, 0.0)
    with torch.no_grad():
        z = model.encode(x).latent
        torch.testing.assert_close(codec.encode(x), z * 0.41407)
        torch.testing.assert_close(codec.decode(z * 0.41407), model.decode(z).sample, rtol=1e-4, atol=1e-5)


def test_latents_of_a_vae_are_the_mean_shifted_and_scaled(kl):
    codec, x = load_codec(str(kl)), images(2, 3, 32, 48)
    model = diffusers.AutoencoderKL.from_pretrained(kl)
    assert (codec.factor, codec.channels, codec.spec()["posterior"]) == (4, 4, "mean")
    with torch.no_grad():
        z = model.encode(x).latent_dist.mean
        torch.testing.assert_close(codec.encode(x), (z - 0.1) * 0.13025)
        torch.testing.assert_close(codec.decode((z - 0.1) * 0.13025), model.decode(z).sample, rtol=1e-4, atol=1e-5)


def test_statistics_of_each_channel_standardise_it(kl, tmp_path):
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    codec = load_codec(str(changed(kl, tmp_path, latents_mean=mean, latents_std=std, scaling_factor=0.5)))
    assert (codec.spec()["shift"], codec.spec()["scale"]) == (mean, [1.0, 0.5, 0.25, 0.125])
    x = images(2, 3, 16, 16)
    with torch.no_grad():
        z = codec.model.encode(x).latent_dist.mean
        by_hand = torch.stack([(z[:, c] - mean[c]) * 0.5 / std[c] for c in range(4)], dim=1)
        torch.testing.assert_close(codec.encode(x), by_hand)
        torch.testing.assert_close(codec.decode(by_hand), codec.model.decode(z).sample, rtol=1e-4, atol=1e-5)


def test_an_sd_vae_as_it_was_published_loads(kl, tmp_path):
    """Its config.json is older than scaling_factor, and its attention has the tensor names of before."""
    later = ("scaling_factor", "shift_factor", "force_upcast", "use_quant_conv", "mid_block_add_attention")
    copy = changed(kl, tmp_path, **dict.fromkeys(later), _diffusers_version="0.4.2")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(weights):
        for name in [name for name in weights if "attentions" in name]:
            for now, then in names.items():
                if now in name:
                    weights[name.replace(now, then)] = weights.pop(name)

    change_weights(copy, rename)
    codec, x = load_codec(str(copy)), images(1, 3, 16, 16)
    assert (codec.scale, codec.shift) == (0.18215, 0.0)
    torch.testing.assert_close(codec.encode(x) / 0.18215, load_codec(str(kl)).encode(x) / 0.13025 + 0.1)


def test_a_batch_has_the_latents_and_images_of_its_members(folder):
    codec, x = load_codec(str(folder)), images(3, 3, 16, 24)
    latents = codec.encode(x)
    torch.testing.assert_close(latents, torch.cat([codec.encode(image[None]) for image in x]))
    torch.testing.assert_close(codec.decode(latents), torch.cat([codec.decode(latent[None]) for latent in latents]))


def test_bfloat16_is_near_and_gives_float32(folder):
    x = images(2, 3, 32, 32)
    half, full = load_codec(str(folder), torch.bfloat16), load_codec(str(folder))
    assert half.model.dtype == torch.bfloat16
    latents = half.encode(x)
    assert latents.dtype == half.decode(latents).dtype == torch.float32
    assert (latents - full.encode(x)).abs().max() < 0.05 * full.encode(x).abs().max()
    assert (half.decode(latents) - full.decode(latents)).abs().max() < 0.1 * full.decode(latents).abs().max()
    assert half.spec()["weights_sha256"] == full.spec()["weights_sha256"]
    assert half.spec()["digest"] != full.spec()["digest"]


def test_other_dtypes_are_refused(folder):
    with pytest.raises(UserError, match=r"cannot compute in torch\.float16; choose float32 or bfloat16"):
        load_codec(str(folder), torch.float16)


def test_channels_last_changes_only_the_rounding(folder):
    codec, x = load_codec(str(folder), channels_last=True), images(2, 3, 16, 24)
    plain = load_codec(str(folder))
    kernels = [weight for weight in codec.model.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
    assert kernels and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    assert codec.encode(x).is_contiguous()
    torch.testing.assert_close(codec.encode(x), plain.encode(x))
    torch.testing.assert_close(codec.decode(plain.encode(x)), plain.decode(plain.encode(x)), rtol=1e-4, atol=1e-5)
    assert codec.spec() == plain.spec()


def test_encoder_and_decoder_are_compiled_for_sizes_of_all_kinds_on_request(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.append((self, options)))
    model = load_codec(str(folder), compiled=True).model
    assert calls == [(model.encoder, {"dynamic": True}), (model.decoder, {"dynamic": True})]


def test_a_codec_is_found_again_by_its_json(folder, tmp_path, monkeypatch):
    codec, x = load_codec(str(folder)), images(1, 3, 16, 16)
    spec = json.loads(json.dumps(codec.spec()))
    again = codec_from_spec(spec)
    assert again.spec() == spec
    assert torch.equal(again.encode(x), codec.encode(x))
    assert torch.equal(again.decode(codec.encode(x)), codec.decode(codec.encode(x)))
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert load_codec(str(moved)).spec() == spec | {"source": str(moved)}  # the digest does not depend on the place
    lost = spec | {"source": str(tmp_path / "lost")}
    with pytest.raises(UserError, match="set NITSCALE_CODEC to the folder"):
        codec_from_spec(lost)
    assert codec_from_spec(lost, str(moved)).spec() == lost
    monkeypatch.setenv("NITSCALE_CODEC", str(moved))
    assert codec_from_spec(lost).spec() == lost


def test_every_parameter_of_the_codec_is_in_its_json_and_kept(folder):
    spec = load_codec(str(folder), torch.bfloat16, whole_pixels=4096, tile_side=64).spec()
    again = codec_from_spec(json.loads(json.dumps(spec)))
    assert (again.model.dtype, again.whole_pixels, again.tile_side) == (torch.bfloat16, 4096, 64)
    assert again.spec() == spec


def test_other_weights_another_scale_or_another_architecture_are_refused(folder, tmp_path):
    spec = load_codec(str(folder)).spec()
    copy = changed(folder, tmp_path / "scale", scaling_factor=0.5)
    with pytest.raises(UserError, match="differs in scale, digest; set NITSCALE_CODEC"):
        codec_from_spec(spec | {"source": str(copy)})
    option = {"decoder_act_fns": "relu"} if "dc_ae" in str(folder) else {"act_fn": "gelu"}
    copy = changed(folder, tmp_path / "architecture", **option)
    with pytest.raises(UserError, match="differs in config_sha256, digest"):
        codec_from_spec(spec | {"source": str(copy)})
    copy = changed(folder, tmp_path / "weights")
    change_weights(copy, lambda weights: next(iter(weights.values())).view(-1)[0].add_(1e-3))
    with pytest.raises(UserError, match="differs in weights_sha256, digest"):
        codec_from_spec(spec | {"source": str(copy)})


def test_an_edited_description_is_refused(folder):
    spec = load_codec(str(folder)).spec()
    with pytest.raises(UserError, match="differs in scale"):
        codec_from_spec(spec | {"scale": 1.0})
    with pytest.raises(UserError, match="description is damaged"):
        codec_from_spec(spec | {"dtype": "float8"})
    with pytest.raises(UserError, match=r"knows the codecs 'dct', 'autoencoder-dc', 'autoencoder-kl'; .* 'vqgan'"):
        codec_from_spec(spec | {"id": "vqgan"})


def test_an_architecture_is_the_same_in_a_diffusers_with_further_options():
    class AutoencoderKL:
        def __init__(self, act_fn="silu", widths=(64,), latent_channels=4): ...

    before = AutoencoderKL

    class AutoencoderKL:
        def __init__(self, act_fn="silu", widths=(64,), latent_channels=4, extra_norm=False): ...

    def digest(kind, **config):
        model = kind()
        model.config = config
        return _architecture_digest(model)

    old = digest(before, widths=(64,), latent_channels=16, _diffusers_version="0.42")
    assert old == digest(before, widths=[64], latent_channels=16)  # as read from JSON
    assert old == digest(AutoencoderKL, act_fn="silu", latent_channels=16, extra_norm=False)
    assert old != digest(AutoencoderKL, act_fn="silu", latent_channels=16, extra_norm=True)


def test_options_that_diffusers_would_ignore_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="options that the installed diffusers ignores: extra_norm"):
        load_codec(str(changed(folder, tmp_path, extra_norm=True)))


def test_large_images_are_done_in_tiles_one_by_one_and_others_are_not(folder):
    whole = load_codec(str(folder))
    tiled = load_codec(str(folder), whole_pixels=96 * 96, tile_side=64)
    x, small = images(2, 3, 128, 96), images(2, 3, 96, 96)
    latents, seen = whole.encode(x), []
    for part in (tiled.model.encoder, tiled.model.decoder):
        part.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))

    assert torch.equal(tiled.encode(small), whole.encode(small))
    assert torch.equal(tiled.decode(whole.encode(small)), whole.decode(whole.encode(small)))
    side = 96 // tiled.factor
    assert seen == [(2, 3, 96, 96), (2, tiled.channels, side, side)]

    seen.clear()
    encoded = tiled.encode(x)
    assert len(seen) > 2
    assert all(batch == 1 and max(height, width) <= 64 for batch, _, height, width in seen)
    seen.clear()
    decoded = tiled.decode(latents)
    assert len(seen) > 2
    assert all(batch == 1 and max(height, width) <= 64 // tiled.factor for batch, _, height, width in seen)

    for result, exact in ((encoded, latents), (decoded, whole.decode(latents))):
        assert result.shape == exact.shape
        correlation = torch.corrcoef(torch.stack([result.flatten(), exact.flatten()]))[0, 1]
        assert correlation > 0.9  # every tile in its place
    assert torch.equal(tiled.encode(small), whole.encode(small))  # and back


@pytest.mark.parametrize("side", [0, 60, -64])
def test_tiles_that_cannot_overlap_are_refused(folder, side):
    with pytest.raises(UserError, match="must be a multiple of 8 x factor"):
        load_codec(str(folder), tile_side=side)


@pytest.mark.parametrize("shape", [(1, 3, 18, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_images_of_other_shapes_are_refused(folder, shape):
    with pytest.raises(ValueError, match="expected images"):
        load_codec(str(folder)).encode(torch.zeros(shape))


def test_latents_of_another_number_of_channels_are_refused(folder):
    with pytest.raises(ValueError, match=r"expected latents \(b, 4, h, w\)"):
        load_codec(str(folder)).decode(torch.zeros(1, 3, 4, 4))


def test_a_dc_ae_without_a_scale_is_refused(dc_ae, tmp_path):
    with pytest.raises(UserError, match=r"has no scaling_factor.*0\.41407"):
        load_codec(str(changed(dc_ae, tmp_path, scaling_factor=None)))


@pytest.mark.parametrize(
    "values",
    [
        {"scaling_factor": 0.0},
        {"scaling_factor": "big"},
        {"scaling_factor": float("nan")},
        {"latents_mean": [0.0] * 4},
        {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3},
        {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]},
    ],
)
def test_impossible_statistics_are_refused(kl, tmp_path, values):
    with pytest.raises(UserError, match=r"statistics of .* cannot be used"):
        load_codec(str(changed(kl, tmp_path, **values)))


def test_folders_that_hold_no_autoencoder_are_refused(dc_ae, tmp_path):
    with pytest.raises(UserError, match="of class 'UNet2DModel'; give an AutoencoderDC"):
        load_codec(str(changed(dc_ae, tmp_path, _class_name="UNet2DModel")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"not the folder of an autoencoder: it has no readable config\.json"):
        load_codec(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not the folder of an autoencoder"):
        load_codec(str(tmp_path / "empty"))
    shutil.copytree(dc_ae, tmp_path / "pipeline" / "vae")
    with pytest.raises(UserError, match=r"you may mean .*pipeline/vae"):
        load_codec(str(tmp_path / "pipeline"))


def test_impossible_architectures_are_refused(folder, tmp_path):
    name = "encoder_block_types" if "dc_ae" in str(folder) else "down_block_types"
    with pytest.raises(UserError, match="copy cannot be loaded"):
        load_codec(str(changed(folder, tmp_path / "blocks", **{name: 7})))
    with pytest.raises(UserError, match=r"copy cannot be loaded|weights in .* are not those"):
        load_codec(str(changed(folder, tmp_path / "channels", latent_channels=8)))


def test_missing_damaged_or_pickled_weights_are_refused(folder, tmp_path):
    copy = changed(folder, tmp_path)
    weights = tensors(copy)
    (copy / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(UserError, match=r"copy cannot be loaded .*\.safetensors"):
        load_codec(str(copy))
    (copy / WEIGHTS).unlink()
    torch.save(weights, copy / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"must have its weights in the one file .*\.safetensors"):
        load_codec(str(copy))


def test_missing_and_surplus_tensors_are_named(folder, tmp_path):
    name = min(tensors(folder))
    copy = changed(folder, tmp_path / "missing")
    change_weights(copy, lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=rf"1 tensors .* such as {name}"):
        load_codec(str(copy))
    copy = changed(folder, tmp_path / "surplus")
    change_weights(copy, lambda weights: weights.update(surplus=torch.zeros(1)))
    with pytest.raises(UserError, match=r"1 tensors .* such as surplus"):
        load_codec(str(copy))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """What HF_HUB_OFFLINE=1 and an empty HF_HOME set when huggingface_hub is imported; gives the cache's folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["dc-ae-f32c32", "nobody/nothing", "/no/such/folder"])
def test_a_hub_that_does_not_answer_is_explained(no_network, name):
    with pytest.raises(UserError, match=rf"the hub did not give {PUBLISHED.get(name, name)} .* set HF_HOME .*sdxl-vae"):
        load_codec(name)


def test_an_autoencoder_in_the_hubs_cache_is_taken_without_asking_the_hub(no_network, folder, monkeypatch):
    cache = no_network / "models--stabilityai--sdxl-vae"
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    asked, download = [], huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *names, local_files_only=False, **options: (
            asked.append(not local_files_only) or download(*names, local_files_only=local_files_only, **options)
        ),
    )
    spec = load_codec("sdxl-vae").spec()
    assert asked == [False]
    assert spec == load_codec(str(folder)).spec() | {"source": "sdxl-vae"}
    assert codec_from_spec(spec).spec() == spec
    (cache / "snapshots" / ("0" * 40) / WEIGHTS).unlink()  # a download that was broken off
    with pytest.raises(UserError, match=rf"the hub did not give stabilityai/sdxl-vae .* no {WEIGHTS}"):
        load_codec("sdxl-vae")


def test_diffusers_that_is_missing_is_explained(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"needs diffusers .*pip install 'nitscale\[autoencoders\]'"):
        load_codec(str(folder))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_codec_gives_the_same_latents_on_a_gpu(folder):
    x = images(2, 3, 32, 48)
    on_cpu, on_gpu = load_codec(str(folder)).encode(x), load_codec(str(folder), device="cuda").encode(x.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
