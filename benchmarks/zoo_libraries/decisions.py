"""Policies, tables, forecasts and speech."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .entries import Built, Call, Calls, entry, integers, lib, noise, takes

# -- stable_baselines3 and sb3_contrib -------------------------------------------------------


def _policy(algorithm: str, policy: str) -> Built:
    spaces = lib("gymnasium.spaces")
    library = lib("sb3_contrib" if hasattr(lib("sb3_contrib"), algorithm) else "stable_baselines3")
    cls = getattr(library, algorithm).policy_aliases[policy]
    image = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    row = spaces.Box(-1, 1, (4,), np.float32)
    rows = spaces.Dict({"image": image, "row": row})
    observed = image if "Cnn" in policy else rows if "Multi" in policy else row
    discrete = algorithm in ("DQN", "QRDQN", "A2C", "PPO", "RecurrentPPO", "MaskablePPO", "TRPO")
    actions = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (2,), np.float32)
    options: dict[str, Any] = {"net_arch": [8, 8]}
    if "Cnn" in policy:
        options["features_extractor_kwargs"] = {"features_dim": 8}
    if "Multi" in policy:
        options["features_extractor_kwargs"] = {"cnn_output_dim": 8}
    if algorithm == "RecurrentPPO":
        options["lstm_hidden_size"] = 8
    model = cls(observed, actions, lambda _: 1e-3, **options)

    def observation(b: int) -> Any:
        pixels = integers(256, b, 3, 36, 36).to(torch.uint8)
        values = noise(b, 4).tanh()
        return pixels if "Cnn" in policy else (
            {"image": pixels, "row": values} if "Multi" in policy else values
        )  # fmt: skip

    def call(b: int) -> Call:
        if algorithm == "RecurrentPPO":
            zero = torch.zeros(1, b, 8)
            states = lib("sb3_contrib.common.recurrent.type_aliases").RNNStates(
                (zero, zero), (zero, zero)
            )
            return (observation(b), states, torch.zeros(b)), {}
        return (observation(b),), {}

    if algorithm in ("TQC", "TD3", "SAC", "DDPG"):
        return Calls(model, lambda m, x: (m(x), m.critic(x, m(x)))), call
    return model, call


for _name in ("TQC:CnnPolicy", "A2C:CnnPolicy", "A2C:MultiInputPolicy",
              "RecurrentPPO:MultiInputLstmPolicy", "TD3:CnnPolicy",
              "RecurrentPPO:CnnLstmPolicy"):  # fmt: skip
    entry("stable_baselines3", _name)(lambda name=_name: _policy(*name.split(":")))
for _name in ("PPO:MlpPolicy", "DQN:MlpPolicy"):
    entry("stable_baselines3", _name)(lambda name=_name: _policy(*name.split(":")))

# -- tables ----------------------------------------------------------------------------------


def _bins() -> list[Tensor]:
    return [torch.linspace(-2, 2, 5), torch.linspace(-1, 1, 4), torch.linspace(-3, 3, 3)]


@entry("rtdl", "embeddings.LinearEmbeddings")
def _() -> Built:
    return lib("rtdl_num_embeddings").LinearEmbeddings(3, 4), takes(3)


@entry("rtdl", "embeddings.PiecewiseLinearEmbeddings")
def _() -> Built:
    model = lib("rtdl_num_embeddings").PiecewiseLinearEmbeddings(
        _bins(), 4, activation=True, version="B"
    )
    return model, takes(3)


@entry("rtdl", "models.FTTransformer")
def _() -> Built:
    model = lib("rtdl_revisiting_models").FTTransformer(
        n_cont_features=3, cat_cardinalities=[4, 5], n_blocks=2, d_block=16,
        attention_n_heads=2, attention_dropout=0.1, ffn_d_hidden_multiplier=1.0, ffn_dropout=0.1,
        residual_dropout=0.0, d_out=2,
    )  # fmt: skip
    return model, lambda b: ((noise(b, 3), integers(4, b, 2)), {})


@entry("rtdl", "models.CategoricalEmbeddings")
def _() -> Built:
    model = lib("rtdl_revisiting_models").CategoricalEmbeddings([4, 5], 4)
    return model, lambda b: ((integers(4, b, 2),), {})


def _tabnet(name: str, **options: Any) -> None:
    @entry("pytorch_tabnet", name)
    def make() -> Built:
        model = getattr(lib("pytorch_tabnet.tab_network"), name)(
            input_dim=6, n_d=4, n_a=4, n_steps=2, group_attention_matrix=torch.eye(6),
            **options,
        )  # fmt: skip
        return model, takes(6)


_tabnet("TabNet", output_dim=2)
_tabnet("TabNetNoEmbeddings", output_dim=2)
_tabnet("TabNetPretraining")

# -- pytorch_forecasting ---------------------------------------------------------------------


def _series(b: int) -> Call:
    """A batch as the library's own data set gives it: one target, one covariate."""
    return ({
        "encoder_cont": noise(b, 8, 2), "decoder_cont": noise(b, 4, 2, seed=1),
        "encoder_cat": torch.zeros(b, 8, 0, dtype=torch.long),
        "decoder_cat": torch.zeros(b, 4, 0, dtype=torch.long),
        "encoder_lengths": torch.full((b,), 8), "decoder_lengths": torch.full((b,), 4),
        "encoder_target": noise(b, 8), "decoder_target": noise(b, 4),
        "target_scale": torch.tensor([[0.0, 1.0]] * b),
        "decoder_time_idx": torch.arange(4).expand(b, 4),
    },), {}  # fmt: skip


def _forecast(model: nn.Module, x: dict[str, Any]) -> Any:
    return model({k: v.clone() for k, v in x.items()})["prediction"]


def _forecaster(name: str, **options: Any) -> None:
    @entry("pytorch_forecasting", name)
    def make() -> Built:
        scale = lib("pytorch_forecasting.data.encoders").TorchNormalizer(method="identity")
        scale.fit(noise(9))
        more = {} if name == "xLSTMTime" else {"output_transformer": scale}
        model = getattr(lib("pytorch_forecasting.models"), name)(**options, **more)
        return Calls(model, _forecast), _series


_forecaster(
    "NBeatsKAN", context_length=8, prediction_length=4, widths=[8, 8], num_blocks=[1, 1],
    num_block_layers=[1, 1], expansion_coefficient_lengths=[3, 3],
    stack_types=["trend", "seasonality"], sharing=[True, True],
)  # fmt: skip
_forecaster(
    "DecoderMLP", hidden_size=8, n_hidden_layers=1, output_size=1, x_reals=["target", "price"],
    time_varying_reals_decoder=["price"], static_categoricals=[], static_reals=[],
    time_varying_categoricals_decoder=[], categorical_groups={}, embedding_sizes={},
    embedding_paddings=[], embedding_labels={}, x_categoricals=[], target="target",
    time_varying_categoricals_encoder=[], time_varying_reals_encoder=["target", "price"],
)  # fmt: skip
_forecaster(
    "DeepAR", hidden_size=8, rnn_layers=1, x_reals=["target", "price"], target="target",
    time_varying_reals_decoder=["price"], time_varying_reals_encoder=["price", "target"],
    static_categoricals=[], static_reals=[], time_varying_categoricals_encoder=[],
    time_varying_categoricals_decoder=[], categorical_groups={}, embedding_sizes={},
    embedding_paddings=[], embedding_labels={}, x_categoricals=[], target_lags={},
)  # fmt: skip
_forecaster("xLSTMTime", input_size=2, hidden_size=8, output_size=4, decomposition_kernel=3)


@entry("pytorch_forecasting", "LSTM")
def _() -> Built:
    return lib("pytorch_forecasting.models").LSTM(3, 4, batch_first=True), takes(6, 3)


# -- speechbrain -----------------------------------------------------------------------------


@entry("speechbrain", "ESPnetVGG")
def _() -> Built:
    model = lib("speechbrain.lobes.models.ESPnetVGG").ESPnetVGG(
        (None, None, 16), cnn_channels=[4, 4], rnn_layers=1, rnn_neurons=8, projection_neurons=8
    )
    return model, takes(12, 16)


@entry("speechbrain", "ContextNet")
def _() -> Built:
    model = lib("speechbrain.lobes.models.ContextNet").ContextNet(
        (None, None, 16), out_channels=8, conv_channels=[8, 8], num_blocks=2, num_layers=2,
        strides=[1, 2], residuals=[False, True],
    )  # fmt: skip
    return model, takes(12, 16)


@entry("speechbrain", "g2p")
def _() -> Built:
    m = lib("speechbrain.lobes.models.g2p.model")
    linear = lib("speechbrain.nnet.linear").Linear
    embedding = lib("speechbrain.nnet.embedding").Embedding
    model = m.TransformerG2P(
        emb=embedding(num_embeddings=20, embedding_dim=16),
        encoder_emb=embedding(num_embeddings=20, embedding_dim=16),
        char_lin=linear(input_size=16, n_neurons=16),
        phn_lin=linear(input_size=16, n_neurons=16),
        out=linear(input_size=12, n_neurons=12),
        lin=linear(input_size=16, n_neurons=12),
        d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=1, d_ffn=16,
        max_length=50,
    )  # fmt: skip

    def call(b: int) -> Call:
        lengths = torch.ones(b)
        return ((integers(20, b, 6, low=1), lengths), (integers(12, b, 5, low=1), lengths)), {}

    return model, call


@entry("speechbrain", "VanillaNN")
def _() -> Built:
    model = lib("speechbrain.lobes.models.VanillaNN").VanillaNN(
        (None, None, 16), dnn_blocks=2, dnn_neurons=8
    )
    return model, takes(5, 16)


@entry("speechbrain", "Cnn14")
def _() -> Built:
    return lib("speechbrain.lobes.models.Cnn14").Cnn14(32, 8), takes(64, 32)


@entry("speechbrain", "ECAPA_TDNN")
def _() -> Built:
    model = lib("speechbrain.lobes.models.ECAPA_TDNN").ECAPA_TDNN(
        16, lin_neurons=8, channels=[8, 8, 8, 8, 24], attention_channels=8, res2net_scale=2,
        se_channels=8,
    )  # fmt: skip
    return model, takes(20, 16)
