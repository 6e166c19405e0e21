"""Diffusion models, medical images, codebooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .entries import Built, Call, Calls, entry, integers, lib, noise, takes

# -- diffusers -------------------------------------------------------------------------------


def _steps(batch: int) -> torch.Tensor:
    return integers(1000, batch, seed=batch)


@entry("diffusers", "EasyAnimateTransformer3DModel")
def _() -> Built:
    model = lib("diffusers").EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
        sample_width=4, sample_height=4, num_layers=2, mmdit_layers=1, time_embed_dim=8,
        text_embed_dim=8,
    )  # fmt: skip
    return model, lambda b: ((), {
        "hidden_states": noise(b, 4, 2, 4, 4), "timestep": _steps(b),
        "encoder_hidden_states": noise(b, 5, 8),
    })  # fmt: skip


@entry("diffusers", "Ideogram4Transformer2DModel")
def _() -> Built:
    model = lib("diffusers").Ideogram4Transformer2DModel(
        in_channels=8, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        intermediate_size=16, adaln_dim=8, llm_features_dim=8, mrope_section=(2, 2, 2),
    )  # fmt: skip

    def call(b: int) -> Call:
        module = lib("diffusers.models.transformers.transformer_ideogram4")
        text = getattr(module, "LLM_TOKEN_INDICATOR", 3)
        image = getattr(module, "OUTPUT_IMAGE_INDICATOR", 2)
        indicator = torch.tensor([[text] * 3 + [image] * 4] * b)
        places = torch.arange(7)[None, :, None].expand(b, 7, 3).contiguous()
        return (), {
            "hidden_states": noise(b, 7, 8), "timestep": _steps(b) / 1000.0,
            "encoder_hidden_states": noise(b, 7, 8), "position_ids": places,
            "segment_ids": torch.zeros(b, 7, dtype=torch.long), "indicator": indicator,
        }  # fmt: skip

    return model, call


@entry("diffusers", "AutoencoderKLAllegro")
def _() -> Built:
    model = lib("diffusers").AutoencoderKLAllegro(
        block_out_channels=(8, 8), down_block_types=("AllegroDownBlock3D",) * 2,
        up_block_types=("AllegroUpBlock3D",) * 2, temporal_downsample_blocks=(True, False),
        temporal_upsample_blocks=(False, True), layers_per_block=1, norm_num_groups=2,
        latent_channels=2, temporal_compression_ratio=2, sample_size=16,
    )  # fmt: skip
    # its own forward is written for large tiles only
    return Calls(model, lambda m, x: m.decoder(m.encoder(x)[:, :2])), takes(3, 4, 16, 16)


@entry("diffusers", "ControlNetUnionModel")
def _() -> Built:
    model = lib("diffusers").ControlNetUnionModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        conditioning_embedding_out_channels=(8, 8), num_trans_channel=8, num_trans_head=2,
        num_proj_channel=8, addition_time_embed_dim=4, addition_embed_type="text_time",
        projection_class_embeddings_input_dim=32,
    )  # fmt: skip

    def call(b: int) -> Call:
        control = torch.zeros(b, 6)
        control[:, 1] = 1
        return (noise(b, 4, 8, 8), _steps(b), noise(b, 5, 8)), {
            "controlnet_cond": [noise(b, 3, 16, 16)], "control_type": control,
            "control_type_idx": [1],
            "added_cond_kwargs": {"text_embeds": noise(b, 8), "time_ids": noise(b, 6)},
        }  # fmt: skip

    return model, call


@entry("diffusers", "BriaFibo2Transformer2DModel")
def _() -> Built:
    model = lib("diffusers").BriaFibo2Transformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, cap_feat_dim=8,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4,
        max_num_gist_tokens=8, gist_step=2, gist_min_text_len=4, gist_max_text_len=16,
        axes_dims=(4, 6, 6), axes_lens=(64, 16, 16),
    )  # fmt: skip
    return model, lambda b: ((noise(b, 4, 4, 4), _steps(b) / 1000.0, noise(b, 2, 6, 8)), {})


@entry("diffusers", "AutoencoderKLKVAEAudio")
def _() -> Built:
    model = lib("diffusers").AutoencoderKLKVAEAudio(
        encoder_dim=4, encoder_rates=[2, 2], latent_dim=8, codebook_dim=4, decoder_dim=8,
        decoder_rates=[2, 2], attn_num_heads=2,
    )  # fmt: skip
    return model, takes(1, 64)


@entry("diffusers", "UNet2DConditionModel")
def _() -> Built:
    model = lib("diffusers").UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2,
        cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, lambda b: ((noise(b, 4, 8, 8), _steps(b), noise(b, 5, 8)), {})


# -- MONAI -----------------------------------------------------------------------------------


def _monai(name: str, call: Callable[[int], Call], **options: Any) -> None:
    @entry("monai", name)
    def make() -> Built:
        return getattr(lib("monai.networks.nets"), name)(**options), call


UNET: dict[str, Any] = {
    "spatial_dims": 2, "in_channels": 1, "num_res_blocks": (1, 1), "channels": (8, 8),
    "attention_levels": (False, True), "norm_num_groups": 2, "num_head_channels": 4,
}  # fmt: skip
_monai("FullyConnectedNet", takes(6), in_channels=6, out_channels=3, hidden_channels=[8, 8],
       dropout=0.2)  # fmt: skip
_monai("SEResNet50", takes(3, 32, 32), spatial_dims=2, in_channels=3, num_classes=3,
       layers=(1, 1, 1, 1))  # fmt: skip
_monai("VNet", takes(1, 16, 16), spatial_dims=2, dropout_dim=2)
_monai("ControlNet", lambda b: ((noise(b, 1, 16, 16), _steps(b), noise(b, 1, 32, 32)), {}),
       conditioning_embedding_num_channels=(4, 4), **UNET)  # fmt: skip
_monai("SPADEDiffusionModelUNet",
       lambda b: ((noise(b, 1, 16, 16), _steps(b), noise(b, 2, 16, 16)), {}),
       out_channels=1, label_nc=2, spade_intermediate_channels=4, **UNET)  # fmt: skip
_monai("ResNet", takes(1, 16, 16, 16), block="basic", layers=[1, 1, 1, 1],
       block_inplanes=[4, 8, 8, 8], n_input_channels=1, num_classes=3)  # fmt: skip
_monai("SegResNetDS2", takes(1, 16, 16), spatial_dims=2, init_filters=8, blocks_down=(1, 1, 1),
       dsdepth=2)  # fmt: skip
_monai("SegResNetVAE", takes(1, 16, 16), input_image_size=(16, 16), spatial_dims=2,
       blocks_down=(1, 1), blocks_up=(1,), vae_nz=8)  # fmt: skip


# -- vector_quantize_pytorch -----------------------------------------------------------------


def _codes(name: str, **options: Any) -> None:
    @entry("vector_quantize_pytorch", name)
    def make() -> Built:
        lib_ = lib("vector_quantize_pytorch")
        torch_nn = torch.nn
        model = torch_nn.Sequential(
            torch_nn.Linear(4, 8), getattr(lib_, name)(**options)
        )  # fmt: skip
        return model, takes(6, 4)


_codes("FSQ", levels=[5, 4, 3], dim=8)
_codes("HierarchicalVQ", dim=8, codebook_size=16, scales=(1, 2, 6), channel_first=False)
_codes("SimVQ", dim=8, codebook_size=16)
_codes("ResidualSimVQ", dim=8, num_quantizers=2, codebook_size=16)
_codes("VectorQuantize", dim=8, codebook_size=16, learnable_codebook=True,
       ema_update=False)  # fmt: skip
