"""One encoder in the layouts that it is stored in: the official names, ours too, and transformers' `IJepaModel`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Width -> heads of the published factories; heads do not show in the weights.
HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
HEADS_OF_MODEL = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16, "vit_huge": 16, "vit_giant": 16}
OFFICIAL_EPS = 1e-6  # of every LayerNorm of the published models

_IN_BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
# Names of transformers from version 5 on -> those of its files.
_RENAMED = (
    (r"^ijepa\.", ""),  # within IJepaForImageClassification
    (r"^layers\.", "encoder.layer."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)
_NOT_THE_ENCODERS = ("classifier.", "pooler.", "embeddings.mask_token")


@dataclass(frozen=True)
class EncoderSizes:
    """What `VisionTransformer` has to be told so that a state dict fits it, and the eps of its LayerNorms."""

    img_size: tuple[int, int]
    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    hidden: int  # of the MLP
    qkv_bias: bool = True
    layer_norm_eps: float = OFFICIAL_EPS

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], num_heads: int, eps: float = OFFICIAL_EPS) -> EncoderSizes:
        """Read off a state dict with the official names.

        Raises:
            ValueError: keys that an encoder has are missing, or sizes that do not go together; names them.
        """
        for name, dims in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("blocks.0.mlp.fc1.weight", 2)):
            if name not in state:
                raise ValueError(f"no {name} among its tensors")
            if state[name].dim() != dims:
                raise ValueError(f"{name} is {list(state[name].shape)}, not of {dims} dimensions")
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        patches, hidden = state["pos_embed"].shape[1], state["blocks.0.mlp.fc1.weight"].shape[0]
        depth = 1 + max(int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name))
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"pos_embed has {patches} patches, which make no square")
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"{num_heads} heads do not divide its width {width}")
        size = (side * patch, side * patch)
        return cls(size, patch, channels, width, depth, num_heads, hidden, "blocks.0.attn.qkv.bias" in state, eps)

    @classmethod
    def of_transformers(cls, config: Mapping[str, Any]) -> EncoderSizes:
        """Read off an `IJepaConfig`, as `config.json` has it.

        Raises:
            ValueError: a model of another kind, or one that our encoder is not; names the key.
        """
        if config.get("model_type") != "ijepa":
            raise ValueError(f"model_type is {config.get('model_type')!r}, not 'ijepa'")
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"hidden_act is {config['hidden_act']!r}; only 'gelu' is known")
        image, patch = (_pair(config.get(key, default)) for key, default in (("image_size", 224), ("patch_size", 16)))
        if patch[0] != patch[1]:
            raise ValueError(f"patch_size is {list(patch)}, not square")
        return cls(
            image,
            patch[0],
            config.get("num_channels", 3),
            config.get("hidden_size", 768),
            config.get("num_hidden_layers", 12),
            config.get("num_attention_heads", 12),
            config.get("intermediate_size", 3072),
            config.get("qkv_bias", True),
            config.get("layer_norm_eps", 1e-12),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values by name."""
        return asdict(self) | {"img_size": list(self.img_size)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderSizes:
        """What `to_dict` gave."""
        return cls(**{**values, "img_size": tuple(values["img_size"])})

    def to_transformers(self) -> dict[str, Any]:
        """As `config.json` of an `IJepaModel` has it."""
        high, wide = self.img_size
        return {
            "architectures": ["IJepaModel"],
            "model_type": "ijepa",
            "hidden_size": self.embed_dim,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.hidden,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.02,
            "layer_norm_eps": self.layer_norm_eps,
            "image_size": high if high == wide else [high, wide],
            "patch_size": self.patch_size,
            "num_channels": self.in_chans,
            "qkv_bias": self.qkv_bias,
        }


def heads_of(checkpoint: Mapping[str, Any], width: int) -> int | None:
    """Attention heads of the encoders in a checkpoint: from our own entry, else from the published widths."""
    run = checkpoint.get("fastjepa")
    if run:
        meta = run["config"]["meta"]
        return meta["num_heads"] or HEADS_OF_MODEL.get(meta["model_name"])
    return HEADS_OF_WIDTH.get(width)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the official names, as the files of an `IJepaModel` have it, which every version reads.

    Raises:
        ValueError: a name that an encoder does not have.
    """
    given: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = _names_of(name)
        for part, piece in zip(names, tensor.chunk(len(names)), strict=True):
            given[part] = piece.clone()
    return given


def from_transformers(tensors: Mapping[str, Tensor], sizes: EncoderSizes) -> dict[str, Tensor]:
    """The tensors of an `IJepaModel`, by any version's names, as a state dict with the official names.

    A classifier, a pooler and a mask token are none of the encoder's and left out.

    Raises:
        ValueError: a tensor that is missing or unknown; names it.
    """
    found = {_file_name(name): tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in found.items() if not name.startswith(_NOT_THE_ENCODERS)}
    state = {}
    for name in official_names(sizes):
        parts = _names_of(name)
        missing = [part for part in parts if part not in found]
        if missing:
            raise ValueError(f"no {missing[0]} among its tensors")
        pieces = [found.pop(part) for part in parts]
        state[name] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    if found:
        raise ValueError(f"{next(iter(found))} is no tensor of an IJepaModel with {sizes.depth} layers")
    return state


def official_names(sizes: EncoderSizes) -> list[str]:
    """The keys of an encoder's state dict, in its order."""
    both = ("weight", "bias")
    inner = [f"{part}.{kind}" for part in _IN_BLOCK for kind in both]
    if not sizes.qkv_bias:
        inner.remove("attn.qkv.bias")
    blocks = [f"blocks.{i}.{name}" for i in range(sizes.depth) for name in inner]
    return ["pos_embed", *(f"patch_embed.proj.{kind}" for kind in both), *blocks, *(f"norm.{kind}" for kind in both)]


def _names_of(name: str) -> tuple[str, ...]:
    """transformers' names of an official one: three for the joint query, key and value, else one."""
    if name == "pos_embed":
        return ("embeddings.position_embeddings",)
    stem, _, kind = name.rpartition(".")
    if stem == "patch_embed.proj":
        return (f"embeddings.patch_embeddings.projection.{kind}",)
    if stem == "norm":
        return (f"layernorm.{kind}",)
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if match is None or match[2] not in _IN_BLOCK:
        raise ValueError(f"{name} is no tensor of an I-JEPA encoder")
    return tuple(f"encoder.layer.{match[1]}.{part}.{kind}" for part in _IN_BLOCK[match[2]])


def _file_name(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
