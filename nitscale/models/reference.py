"""Weights of the published NiT (github.com/WZDTHU/NiT) and FiT (github.com/whlzy/FiT) code, in and out.

`load_reference` takes the published code's own keyword arguments and parameter names and returns a `PackedTransformer`
that computes what their model computes; `save_reference` gives the weights back under their names. The two differ from
ours in spelling, in the rows of the linear for queries, keys and values, in NiT's coordinates (`rope_order`) and in
FiT's direction of time; docs/fidelity.md tells the rest.
"""

import difflib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from nitscale.errors import UserError
from nitscale.models.transformer import ModelConfig, PackedTransformer

FAMILIES = ("nit", "fit")
WRAPPERS = ("module.", "_orig_mod.", "ema_model.", "ema.", "model.")
"""Prefixes that wrappers put before every key: data parallelism, torch.compile, averaging."""

NIT_DEFAULTS: dict[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "encoder_depth": 4,
    "projector_dim": 2048,
    "z_dim": 768,
    "use_checkpoint": False,
    "custom_freqs": "normal",
    "theta": 10000,
    "max_pe_len_h": None,
    "max_pe_len_w": None,
    "decouple": False,
    "ori_max_pe_len": None,
    "qk_norm": False,
    "use_adaln_lora": False,
    "adaln_lora_dim": None,
}
"""Keyword arguments of the published NiT, with their defaults."""

FIT_DEFAULTS: dict[str, Any] = {
    "context_size": 256,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
    "use_sit": False,
    "use_checkpoint": False,
    "use_swiglu": False,
    "use_swiglu_large": False,
    "rel_pos_embed": "rope",
    "abs_pos_embed": None,
    "norm_type": "layernorm",
    "q_norm": None,
    "k_norm": None,
    "qk_norm_weight": False,
    "qkv_bias": True,
    "ffn_bias": True,
    "adaln_bias": True,
    "adaln_type": "normal",
    "adaln_lora_dim": None,
    "rope_theta": 10000.0,
    "custom_freqs": "normal",
    "max_pe_len_h": None,
    "max_pe_len_w": None,
    "decouple": False,
    "ori_max_pe_len": None,
    "online_rope": False,
    "add_rel_pe_to_v": False,
    "pretrain_ckpt": None,
    "ignore_keys": None,
    "finetune": None,
    "time_shifting": 1,
}
"""Keyword arguments of the published FiT, with their defaults."""

ROPE_MODES = {
    "normal": ("none", "none"),
    "linear": ("linear", "none"),
    "ntk-aware": ("ntk", "none"),
    "ntk-aware-pro1": ("ntk", "proportion1"),
    "ntk-aware-pro2": ("ntk", "proportion2"),
    "ntk-by-parts": ("ntk-by-parts", "none"),
    "yarn": ("yarn", "mscale"),
    "scale1": ("none", "proportion1"),
    "scale2": ("none", "proportion2"),
}
"""`custom_freqs` of the published code → (extrapolation, magnitude)."""


def load_reference(family: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> PackedTransformer:
    """The model that the published code of `family` ("nit" or "fit") builds from these arguments and weights.

    Weights keep their dtype; a state of several takes the widest. A NiT state without any `projector.*` gives a model
    without projector. `WRAPPERS` before every key are left out. UserError for keys that are missing, surplus or of
    another shape, all of them listed, and for options that are not supported.
    """
    state_dict = without_wrappers(state_dict)
    low_rank = state_dict.get("blocks.0.adaLN_modulation.2.weight")
    if config.get("adaln_lora_dim") is None and low_rank is not None and low_rank.ndim == 2:
        config = {**config, "adaln_lora_dim": low_rank.shape[1]}
    model_config = reference_config(family, config)
    if model_config.projector_width is not None and not any(key.startswith("projector.") for key in state_dict):
        model_config = replace(model_config, projector_width=None, feature_width=None)
    with torch.device("meta"):
        model = PackedTransformer(model_config)
    return load_weights(model, state_dict)


def load_weights(model: PackedTransformer, state_dict: Mapping[str, Tensor]) -> PackedTransformer:
    """Give `model` the weights of a published state dict; every key must fit, as in `load_reference`."""
    ours = dict(model.named_parameters())
    entries = list(_entries(model.config))
    expected = {entry.key: entry.published_shape(ours[entry.name].shape) for entry in entries}
    problems = [f"missing: {key} {shape}" for key, shape in expected.items() if key not in state_dict]
    problems += [f"surplus: {key} {tuple(value.shape)}" for key, value in state_dict.items() if key not in expected]
    problems += [
        f"wrong shape: {key} is {tuple(state_dict[key].shape)}, the model needs {shape}"
        for key, shape in expected.items()
        if key in state_dict and tuple(state_dict[key].shape) != shape
    ]
    if problems:
        raise UserError(
            f"reference weights: {len(problems)} keys do not fit this model; "
            "check that the configuration is that of the weights\n  " + "\n  ".join(problems)
        )
    dtype = reduce(torch.promote_types, {value.dtype for value in state_dict.values()})
    model.load_state_dict({entry.name: entry.load(state_dict[entry.key].to(dtype)) for entry in entries}, assign=True)
    return model.requires_grad_()


def without_wrappers(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state without the `WRAPPERS` that stand before all of its keys."""
    for prefix in WRAPPERS:
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            return without_wrappers({key.removeprefix(prefix): value for key, value in state_dict.items()})
    return state_dict


def save_reference(model: PackedTransformer, gradients: bool = False) -> dict[str, Tensor]:
    """The weights under the published names, shapes and order. With `gradients`, those of the weights instead, without
    the parameters that have none. UserError for a model that the published code does not have."""
    if model.config.absolute_positions != "none":
        raise UserError(
            "reference weights: the published models have absolute_positions='none'; there is no name for it"
        )
    parameters = dict(model.named_parameters())
    saved = {}
    for entry in _entries(model.config):
        value = parameters[entry.name].grad if gradients else parameters[entry.name].detach()
        if value is not None:
            saved[entry.key] = entry.save(value)
    return saved


def published_conventions(config: ModelConfig) -> ModelConfig:
    """The configuration with the coordinates and the direction of time that its published weights were trained with."""
    if config.published_as == "nit":
        return replace(config, rope_order="reference")
    return replace(config, time_direction="noise_to_data" if config.prediction == "velocity" else "data_to_noise")


def reference_config(family: str, config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of the published code's keyword arguments. Arguments that the code does not know are ignored,
    as by the code itself, but with a warning."""
    if family not in FAMILIES:
        raise UserError(f"reference weights: family={family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    defaults = NIT_DEFAULTS if family == "nit" else FIT_DEFAULTS
    for name in config:
        if name not in defaults:
            nearest = difflib.get_close_matches(name, defaults, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            warnings.warn(f"reference weights: {family} has no argument {name!r}, it is ignored{hint}", stacklevel=2)
    arguments = {**defaults, **{name: value for name, value in config.items() if name in defaults}}
    return _nit_config(arguments) if family == "nit" else _fit_config(arguments)


def _nit_config(a: dict[str, Any]) -> ModelConfig:
    # ori_max_pe_len alone changes nothing in their code: the scales come from max_pe_len_*.
    return ModelConfig(
        **_shared_config(a),
        adaln="lora" if a["use_adaln_lora"] else "full",
        qk_norm="affine" if a["qk_norm"] else "none",
        qk_norm_eps=1e-5,
        rope_theta=float(a["theta"]),
        rope_order="reference",
        **_rope_config(a, per_image=False),
        feature_block=a["encoder_depth"] if 1 <= a["encoder_depth"] <= a["depth"] else None,
        projector_width=a["projector_dim"],
        feature_width=a["z_dim"],
        published_as="nit",
    )


def _fit_config(a: dict[str, Any]) -> ModelConfig:
    if str(a["rel_pos_embed"]).lower() not in ("rope", "xpos"):
        raise UserError(f"reference weights: rel_pos_embed={a['rel_pos_embed']!r} is not supported; only 'rope' is")
    if a["abs_pos_embed"] is not None:
        raise UserError(f"reference weights: abs_pos_embed={a['abs_pos_embed']!r} is not supported; only None is")
    if a["learn_sigma"] and a["use_sit"]:
        raise UserError("reference weights: learn_sigma and use_sit exclude each other in FiT")
    if _fit_norm(a["q_norm"]) != _fit_norm(a["k_norm"]):
        raise UserError(f"reference weights: q_norm={a['q_norm']!r} and k_norm={a['k_norm']!r} must be the same")
    hidden = int(a["hidden_size"] * a["mlp_ratio"])
    return ModelConfig(
        **{
            **_shared_config(a),
            "mlp_width": hidden * 2 // 3 if a["use_swiglu"] and not a["use_swiglu_large"] else hidden,
        },
        mlp="swiglu" if a["use_swiglu"] else "gelu",
        mlp_bias=a["ffn_bias"],
        adaln={"normal": "full", "lora": "lora+global"}.get(a["adaln_type"], a["adaln_type"]),
        adaln_bias=a["adaln_bias"],
        norm=_fit_norm(a["norm_type"]),
        qk_norm=_fit_norm("w_layernorm" if a["q_norm"] == "layernorm" and a["qk_norm_weight"] else a["q_norm"]),
        qk_norm_eps=1e-6,
        qkv_bias=a["qkv_bias"],
        prediction="velocity" if a["use_sit"] else "noise",
        learned_variance=a["learn_sigma"],
        # The steps of the DDPM schedule run from data to noise in their code too, but from 0 to 999.
        time_scale=1.0 if a["use_sit"] else 1000.0,
        time_direction="noise_to_data" if a["use_sit"] else "data_to_noise",
        time_shift=float(a["time_shifting"]),
        rope_theta=float(a["rope_theta"]),
        rope_values=a["add_rel_pe_to_v"],
        **_rope_config(a, per_image=a["online_rope"]),
        published_as="fit",
    )


def _shared_config(a: dict[str, Any]) -> dict[str, Any]:
    return {
        "patch_size": a["patch_size"],
        "in_channels": a["in_channels"],
        "depth": a["depth"],
        "width": a["hidden_size"],
        "heads": a["num_heads"],
        "num_classes": a["num_classes"],
        "null_class": a["class_dropout_prob"] > 0,
        "class_dropout": a["class_dropout_prob"],
        "mlp_width": int(a["hidden_size"] * a["mlp_ratio"]),
        "adaln_rank": a["adaln_lora_dim"] or 0,
    }


def _rope_config(a: dict[str, Any], per_image: bool) -> dict[str, Any]:
    mode = a["custom_freqs"].lower()
    if mode not in ROPE_MODES:
        raise UserError(f"reference weights: custom_freqs={mode!r} is unknown; choose one of {', '.join(ROPE_MODES)}")
    extrapolation, magnitude = ROPE_MODES[mode]
    if per_image:
        return {
            "rope_extrapolation": extrapolation,
            "rope_decoupled": a["decouple"],
            "rope_train_grid": a["ori_max_pe_len"],
            "rope_magnitude": magnitude,
        }
    grid = (a["max_pe_len_h"], a["max_pe_len_w"])
    if mode == "normal":
        return {}
    if None in (*grid, a["ori_max_pe_len"]):
        raise UserError(f"reference weights: custom_freqs={mode!r} needs max_pe_len_h, max_pe_len_w, ori_max_pe_len")
    return {
        "rope_extrapolation": extrapolation,
        "rope_decoupled": a["decouple"],
        "rope_train_grid": a["ori_max_pe_len"],
        "rope_magnitude": magnitude,
        "rope_test_grid": grid,
    }


def _fit_norm(name: str | None) -> str:
    norms = {
        None: "none",
        "": "none",
        "none": "none",
        "layernorm": "plain",
        "w_layernorm": "weight",
        "w_rmsnorm": "rms",
    }
    key = name.lower() if name else name
    if key not in norms:
        raise UserError(f"reference weights: norm {name!r} is unknown; choose one of {', '.join(filter(None, norms))}")
    return norms[key]


@dataclass(frozen=True)
class _Entry:
    """One published tensor and the parameter that holds it."""

    key: str
    name: str
    form: str = "same"
    """same; qkv: their rows are (3, heads, head_dim), ours (heads, 3, head_dim); patch: a convolution's kernel."""
    heads: int = 1
    patch_shape: tuple[int, int, int] = (1, 1, 1)

    def published_shape(self, shape: torch.Size) -> tuple[int, ...]:
        return (shape[0], *self.patch_shape) if self.form == "patch" else tuple(shape)

    def load(self, value: Tensor) -> Tensor:
        if self.form == "qkv":
            value = rearrange(value, "(three heads dim) ... -> (heads three dim) ...", three=3, heads=self.heads)
        value = value.flatten(1) if self.form == "patch" else value
        return value.detach().clone(memory_format=torch.contiguous_format)

    def save(self, value: Tensor) -> Tensor:
        if self.form == "qkv":
            value = rearrange(value, "(heads three dim) ... -> (three heads dim) ...", three=3, heads=self.heads)
        value = value.unflatten(1, self.patch_shape) if self.form == "patch" else value
        return value.detach().clone(memory_format=torch.contiguous_format)


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    """Every parameter of the model, in the order of the published state dict."""

    def linear(key: str, name: str, has_bias: bool = True, **form: Any) -> Iterator[_Entry]:
        yield _Entry(f"{key}.weight", f"{name}.weight", **form)
        if has_bias:
            # a bias has no kernel to fold, but its rows are permuted with the weight's
            yield _Entry(f"{key}.bias", f"{name}.bias", **({} if form.get("form") == "patch" else form))

    def norm(kind: str, key: str, name: str) -> Iterator[_Entry]:
        if kind in ("weight", "affine", "rms"):
            yield _Entry(f"{key}.weight", f"{name}.weight")
        if kind == "affine":
            yield _Entry(f"{key}.bias", f"{name}.bias")

    def swiglu(key: str, name: str, has_bias: bool) -> Iterator[_Entry]:
        for theirs, ours in (("fc1_g", "gate"), ("fc1_x", "up"), ("fc2", "out")):
            yield from linear(f"{key}.{theirs}", f"{name}.{ours}", has_bias)

    def adaln(key: str, name: str, kind: str) -> Iterator[_Entry]:
        if kind == "swiglu":
            for theirs, ours in (("fc1_g", "gate"), ("fc1_x", "down"), ("fc2", "out")):
                yield from linear(f"{key}.{theirs}", f"{name}.{ours}", config.adaln_bias)
        elif kind.startswith("lora"):
            yield from linear(f"{key}.1", f"{name}.down", config.adaln_bias)
            yield from linear(f"{key}.2", f"{name}.out", config.adaln_bias)
        else:
            yield from linear(f"{key}.1", f"{name}.out", config.adaln_bias)

    patch: dict[str, Any] = {}
    if config.published_as == "nit":  # NiT embeds patches by timm's convolution, FiT by a linear
        patch = {"form": "patch", "patch_shape": (config.in_channels, config.patch_size, config.patch_size)}
    yield from linear("x_embedder.proj", "patch_embedding", **patch)
    yield from linear("t_embedder.mlp.0", "time_embedding.up")
    yield from linear("t_embedder.mlp.2", "time_embedding.out")
    yield _Entry("y_embedder.embedding_table.weight", "label_embedding.weight")
    if config.projector_width is not None:
        for index, part in ((0, "fc1"), (2, "fc2"), (4, "out")):
            yield from linear(f"projector.{index}", f"projector.{part}")
    if config.adaln == "lora+global":
        yield from linear("global_adaLN_modulation.1", "global_adaln", config.adaln_bias)
    for i in range(config.depth):
        theirs = ours = f"blocks.{i}"
        yield from norm(config.norm, f"{theirs}.norm1", f"{ours}.norm1")
        yield from norm(config.norm, f"{theirs}.norm2", f"{ours}.norm2")
        yield from linear(
            f"{theirs}.attn.qkv", f"{ours}.attention.qkv", config.qkv_bias, form="qkv", heads=config.heads
        )
        yield from norm(config.qk_norm, f"{theirs}.attn.q_norm", f"{ours}.attention.q_norm")
        yield from norm(config.qk_norm, f"{theirs}.attn.k_norm", f"{ours}.attention.k_norm")
        yield from linear(f"{theirs}.attn.proj", f"{ours}.attention.out")
        if config.mlp == "swiglu":
            yield from swiglu(f"{theirs}.mlp", f"{ours}.mlp", config.mlp_bias)
        else:
            yield from linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.up", config.mlp_bias)
            yield from linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.out", config.mlp_bias)
        yield from adaln(f"{theirs}.adaLN_modulation", f"{ours}.adaln", config.adaln)
    yield from norm(config.norm, "final_layer.norm_final", "final_layer.norm")
    yield from linear("final_layer.linear", "final_layer.out")
    # the final layer's modulation is never low-rank
    yield from adaln(
        "final_layer.adaLN_modulation", "final_layer.adaln", "swiglu" if config.adaln == "swiglu" else "full"
    )
