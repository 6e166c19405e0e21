"""Models of transformers: a tiny configuration of every kind, by the names of its sizes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

from .entries import Built, Call, entry, integers, noise

hf: Any = transformers
VOCABULARY = 64
RULES: tuple[tuple[str, Any], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r"(.*_)?(bos|eos|pad|sep|cls|unk|mask|decoder_start)_token_id", 1),
    (r".*num_(key_value|kv)_heads|n_head_kv|multi_query_group_num", 2),
    (r".*(num_attention_heads|num_heads|n_heads?|attention_heads)", 4),
    (r"(qk_|v_|global_|attention_|index_)?head_dim|d_kv|kv_channels|v_head_dim|.*_head_dim", 8),
    (r"(hidden|embedding|word_embed_proj|projection|proj)_(size|dim)|.*_hidden_size|d_model"
     r"|n_embd|embed_dim|dim|hidden_dim|.*_hidden_dim|projection_dim|feature_size", 32),
    (r".*(intermediate|ffn|inner|mlp)_(size|dim|hidden_size)|d_ff|n_inner", 48),
    (r".*num_(hidden_|encoder_|decoder_|attention_)?layers|n_layers?|(en|de)coder_layers"
     r"|num_block.*|depth", 2),
    (r"(max_position_embeddings|n_positions|max_.*positions|n_ctx|max_seq_len.*)", 64),
    (r"(image_size|input_size)", 32),
    (r"patch_size", 8),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r".*(num_experts_per_tok|moe_topk|top_k|moe_k)", 2),
    (r"(n_group|topk_group|n_shared_experts|num_labels)", 1),
    (r"(q|kv|qk|o)_lora_rank", 8),
    (r"(qk_nope_head_dim|qk_rope_head_dim)", 8),
    (r"num_mel_bins|num_mel_bin", 16),
)  # fmt: skip
"""From a name in a configuration to a small value; the first that fits wins."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "blip-2": {"image_token_index": VOCABULARY - 2, "num_query_tokens": 4},
    "d_fine": {
        "backbone_config": {
            "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 32],
            "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 16, 32, 32],
            "hidden_sizes": [16, 16, 32, 32], "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [1, 1, 1, 1],
        },
        "encoder_in_channels": [16, 32, 32], "encoder_hidden_dim": 32, "num_queries": 6,
        "decoder_in_channels": [32, 32, 32], "encoder_ffn_dim": 32,
    },
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "gemma4_unified_text": {"per_layer_config": {1: {"head_dim": 16}}},
    "levit": {"image_size": 64, "patch_size": 16, "hidden_sizes": [32, 48, 64],
              "depths": [1, 1, 1]},
    "minicpm3": {"num_key_value_heads": 4},
    "nemo_speechlm": {"text_config": {"n_groups": 1},
                      "word_timestamp_config": {"blank_token_id": VOCABULARY - 1}},
    "qwen4_exp": {"text_config": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "indexer_n_heads": 4,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ngram_vocab_size_base": 50,
        "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8,
    }},
    "rf_detr": {
        "backbone_config": {
            "out_features": ["stage1", "stage2"], "out_indices": [1, 2],
            "stage_names": ["stem", "stage1", "stage2"], "window_block_indexes": [0],
            "num_windows": 2, "patch_size": 8, "image_size": 32,
        },
        "num_queries": 6, "group_detr": 2, "decoder_layers": 2,
    },
    "stablelm": {"pad_token_id": 1},
    "vipllava": {"image_token_index": VOCABULARY - 2, "vision_feature_layer": [-1, -2],
                 "image_seq_length": 16},
    "wav2vec2-bert": {"add_adapter": False, "feature_projection_input_dim": 16},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY, "mask_time_length": 2},
    "whisper": {"max_source_positions": 12},
    "zoedepth": {
        "backbone_config": {
            "num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"],
            "out_indices": [1, 2, 3, 4],
            "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"],
        },
        "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16, "bottleneck_features": 16,
        "num_attractors": [4, 2, 2, 1], "bin_embedding_dim": 16,
    },
}  # fmt: skip
"""What the rules get wrong, by the type of the model."""


def shrunk(name: str, value: Any) -> Any:
    """A small value for an entry of a configuration; the same one where no rule knows it."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return min(value, small) if value >= 0 else value
    return value


def small(values: dict[str, Any]) -> dict[str, Any]:
    """All of a configuration and of those inside it, small."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
            found[name] = small(value)
        else:
            found[name] = shrunk(name, value)
    layers = found.get("num_hidden_layers")
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(found.get(name), list) and layers:
            kinds = list(dict.fromkeys(found[name]))
            found["num_hidden_layers"] = max(layers, len(kinds))
            found[name] = (kinds * 2)[: max(layers, len(kinds))]
    return found


def merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    out = dict(a)
    for name, value in b.items():
        inner = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merged(out[name], value) if inner and value else copy.deepcopy(value)
    return out


def tiny(kind: str) -> Any:
    """A configuration of a type of model, small in every way that :data:`RULES` know."""
    default = hf.AutoConfig.for_model(kind)
    values = small(default.to_dict())
    for name in (
        "model_type",
        "transformers_version",
        "architectures",
        "dtype",
        "per_layer_config",
    ):
        values.pop(name, None)
    values = merged(values, OVERRIDES.get(kind, {}))
    return type(default)(**values)


def build(task: str, kind: str) -> Any:
    """The model of a type of model for a task, with random weights."""
    table: dict[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    names = table[kind]
    name = names if isinstance(names, str) else names[0]
    config = tiny(kind)
    cls = getattr(hf, name)
    if not isinstance(config, cls.config_class):
        config = getattr(config, "text_config", config)
    return cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)


# -- one call of each task -------------------------------------------------------------------


def ids(batch: int, length: int = 9, seed: int = 0) -> Tensor:
    return integers(VOCABULARY - 8, batch, length, low=5, seed=seed)


def text(batch: int) -> Call:
    """Token ids and a mask with padding, as a tokenizer gives them."""
    mask = torch.ones(batch, 9, dtype=torch.long)
    mask[0, 7:] = 0
    return (), {"input_ids": ids(batch), "attention_mask": mask}


def labelled(batch: int) -> Call:
    return (), {"input_ids": ids(batch), "labels": ids(batch)}


def pictures(*size: int) -> Callable[[int], Call]:
    shape = size or (3, 32, 32)
    return lambda batch: ((), {"pixel_values": noise(batch, *shape)})


def with_pictures(batch: int, length: int = 0, token: int = VOCABULARY - 2) -> Call:
    """Text after the tokens that stand for a picture's patches, and the picture."""
    found = ids(batch)
    if length:
        found = torch.cat([torch.full((batch, length), token), found], 1)
    return (), {"input_ids": found, "pixel_values": noise(batch, 3, 32, 32)}


def sound(batch: int) -> Call:
    return (), {"input_values": noise(batch, 800)}


def features(channels: int, frames: int = 24) -> Callable[[int], Call]:
    return lambda batch: ((), {"input_features": noise(batch, frames, channels)})


def series(batch: int) -> Call:
    past = noise(batch, 64)
    frequency = torch.zeros(batch, dtype=torch.long)
    return (), {"past_values": list(past), "freq": list(frequency)}


CALLS: dict[str, Callable[[int], Call]] = {
    "CAUSAL_LM": labelled,
    "MASKED_LM": text,
    "SEQ_TO_SEQ_CAUSAL_LM": labelled,
    "SEQUENCE_CLASSIFICATION": text,
    "IMAGE_CLASSIFICATION": pictures(),
    "SEMANTIC_SEGMENTATION": pictures(),
    "UNIVERSAL_SEGMENTATION": pictures(),
    "VIDEO_CLASSIFICATION": pictures(8, 3, 32, 32),
    "OBJECT_DETECTION": pictures(),
    "DEPTH_ESTIMATION": pictures(),
    "ZERO_SHOT_IMAGE_CLASSIFICATION": with_pictures,
    "IMAGE_TEXT_TO_TEXT": with_pictures,
    "CTC": sound,
    "AUDIO_CLASSIFICATION": sound,
    "SPEECH_SEQ_2_SEQ": sound,
    "TIME_SERIES_PREDICTION": series,
}


def registry() -> dict[str, list[str]]:
    """Of each task the types of models that transformers knows for it."""
    tables = {task: f"MODEL_FOR_{task}_MAPPING_NAMES" for task in CALLS}
    return {f"transformers:{t}": sorted(getattr(modeling_auto, n)) for t, n in tables.items()}


def make(task: str, kind: str) -> Built:
    return build(task, kind), OWN_CALLS.get((task, kind), CALLS[task])


def spoken(batch: int) -> Call:
    frames = noise(batch, 16, 64)
    return (), {"input_ids": ids(batch, 8), "input_features": frames}


def from_speech(batch: int) -> Call:
    return (), {"input_features": noise(batch, 24, 160), "decoder_input_ids": ids(batch)}


def patches(batch: int) -> Call:
    """Text with one picture of 2 x 2 patches each."""
    grid = torch.tensor([[1, 2, 2]] * batch)
    text_ids = torch.cat([torch.full((batch, 1), VOCABULARY - 2), ids(batch)], 1)
    pixels = noise(4 * batch, 3 * 8 * 8)
    return (), {"input_ids": text_ids, "pixel_values": pixels, "image_grid_thw": grid}


OWN_CALLS: dict[tuple[str, str], Callable[[int], Call]] = {
    ("AUDIO_CLASSIFICATION", "wav2vec2-bert"): features(16),
    ("AUDIO_CLASSIFICATION", "whisper"): lambda n: ((), {"input_features": noise(n, 16, 24)}),
    ("CTC", "lasr_ctc"): features(16, 64),
    ("CTC", "wav2vec2-conformer"): lambda n: ((), {"input_values": noise(n, 4000)}),
    ("IMAGE_CLASSIFICATION", "levit"): pictures(3, 64, 64),
    ("IMAGE_TEXT_TO_TEXT", "blip-2"): lambda n: with_pictures(n, 4),
    ("IMAGE_TEXT_TO_TEXT", "inkling2_loop"): text,
    ("IMAGE_TEXT_TO_TEXT", "vipllava"): lambda n: with_pictures(n, 16),
    ("OBJECT_DETECTION", "d_fine"): pictures(3, 64, 64),
    ("SPEECH_SEQ_2_SEQ", "seamless_m4t_v2"): from_speech,
    ("SPEECH_SEQ_2_SEQ", "voxtral_realtime"): spoken,
}
"""Calls of models that take other arguments than most of their task."""


def listed() -> None:
    """An entry for every model of the list."""
    from . import rule

    for key in rule.keys():
        library, _, rest = key.partition(":")
        if library == "transformers":
            task, _, kind = rest.partition(":")
            entry(f"transformers:{task}", kind)(partial(make, task, kind))


listed()
