"""Adapters of language models, attention layers, state-space and spiking networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .entries import Built, Call, Calls, entry, integers, lib, noise, takes

VOCABULARY = 64


def words(batch: int, length: int = 8) -> Call:
    return (integers(VOCABULARY, batch, length, low=3),), {}


# -- peft on a tiny Llama, T5 or BERT ---------------------------------------------------------


def llama() -> Any:
    t = lib("transformers")
    return t.LlamaForCausalLM(t.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=32, max_position_embeddings=64, pad_token_id=0,
    ))  # fmt: skip


def asked(batch: int) -> Call:
    ids = integers(VOCABULARY, batch, 8, low=3)
    mask = torch.ones_like(ids)
    return (), {"input_ids": ids, "attention_mask": mask, "labels": ids}


def tasked(batch: int) -> Call:
    return (), {**asked(batch)[1], "task_ids": torch.arange(batch) % 2}


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "MULTITASK_PROMPT_TUNING": ("MultitaskPromptTuningConfig", {
        "num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2, "prompt_tuning_init": "RANDOM"}),
    "VBLORA": ("VBLoRAConfig", {
        "r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2,
        "target_modules": ["q_proj", "v_proj"]}),
    "XLORA": ("", {}),
    "C3A": ("C3AConfig", {"block_size": 4, "target_modules": ["q_proj", "v_proj"]}),
    "VERA": ("VeraConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    "HIRA": ("HiraConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    "FROD": ("FrodConfig", {"target_modules": ["q_proj", "v_proj"]}),
    "P_TUNING": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "LORA": ("LoraConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "LOHA": ("LoHaConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    "ADAPTION_PROMPT": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}),
    "CARTRIDGE": ("CartridgeConfig", {"num_virtual_tokens": 3}),
    "HRA": ("HRAConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 8, "target_modules": ["q_proj"]}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "DORA": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "use_dora": True}),
    "IA3": ("IA3Config", {
        "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}  # fmt: skip


def peft(kind: str) -> Built:
    p = lib("peft")
    name, options = PEFT[kind]
    config = getattr(p, name)(task_type="CAUSAL_LM", **options)
    model = p.get_peft_model(llama(), config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, tasked if kind == "MULTITASK_PROMPT_TUNING" else asked


for _kind in PEFT:
    if PEFT[_kind][0]:
        entry("peft", _kind)(lambda kind=_kind: peft(kind))


# -- sentence-transformers -------------------------------------------------------------------


def _features(b: int) -> dict[str, Any]:
    mask = torch.ones(b, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {"token_embeddings": noise(b, 6, 8), "attention_mask": mask}


def _embedding(model: nn.Module, features: dict[str, Any]) -> Any:
    found = model(dict(features))
    return found.get("sentence_embedding", found.get("token_embeddings"))


def _tokenizer() -> Any:
    t = lib("tokenizers")
    vocabulary = {f"w{i}": i for i in range(16)}
    return t.Tokenizer(t.models.WordLevel(vocabulary, unk_token="w0"))


@entry("sentence_transformers", "StaticEmbedding")
def _() -> Built:
    model = lib("sentence_transformers.models").StaticEmbedding(_tokenizer(), embedding_dim=8)

    def call(b: int) -> Call:
        return ({"input_ids": integers(16, 4 * b), "offsets": torch.arange(0, 4 * b, 4)},), {}

    return Calls(model, _embedding), call


@entry("sentence_transformers", "WeightedLayerPooling")
def _() -> Built:
    model = lib("sentence_transformers.models").WeightedLayerPooling(8, 3, 1)

    def call(b: int) -> Call:
        layers = tuple(noise(b, 6, 8, seed=k) for k in range(4))
        return ({**_features(b), "all_layer_embeddings": layers},), {}

    return Calls(model, _embedding), call


@entry("sentence_transformers", "CNN")
def _() -> Built:
    model = lib("sentence_transformers.models").CNN(8, 4)
    return Calls(model, _embedding), lambda b: ((_features(b),), {})


@entry("sentence_transformers", "LSTM")
def _() -> Built:
    model = lib("sentence_transformers.models").LSTM(8, 4)

    def call(b: int) -> Call:
        return ({**_features(b), "sentence_lengths": torch.full((b,), 6)},), {}

    return Calls(model, _embedding), call


@entry("sentence_transformers", "SentenceTransformer of CNN, Pooling, Dense")
def _() -> Built:
    m = lib("sentence_transformers.models")
    cnn = m.CNN(8, 4)
    model = lib("sentence_transformers").SentenceTransformer(
        modules=[cnn, m.Pooling(12), m.Dense(12, 5)], device="cpu"
    )
    return Calls(model, _embedding), lambda b: ((_features(b),), {})


# -- x-transformers --------------------------------------------------------------------------


def _decoder(**options: Any) -> Any:
    x = lib("x_transformers")
    layers = x.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, **options)
    return x.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=layers)


def _encoder() -> Any:
    return lib("x_transformers").Encoder(dim=16, depth=2, heads=2, attn_dim_head=8)


@entry("x_transformers", "NonAutoregressiveWrapper")
def _() -> Built:
    x = lib("x_transformers")
    net = x.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=8, attn_layers=_encoder())
    return x.NonAutoregressiveWrapper(net, mask_id=0), words


@entry("x_transformers", "Encoder")
def _() -> Built:
    return _encoder(), takes(8, 16)


@entry("x_transformers", "Decoder")
def _() -> Built:
    return lib("x_transformers").Decoder(
        dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True, ff_glu=True
    ), takes(8, 16)


@entry("x_transformers", "XValAutoregressiveWrapper")
def _() -> Built:
    x = lib("x_transformers")
    layers = x.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8)
    net = x.XValTransformerWrapper(
        num_tokens=VOCABULARY, numerical_token_id=3, max_seq_len=16, attn_layers=layers
    )
    return x.XValAutoregressiveWrapper(net), lambda b: ((words(b)[0][0], noise(b, 8)), {})


@entry("x_transformers", "EntropyBasedTokenizer")
def _() -> Built:
    return lib("x_transformers").EntropyBasedTokenizer(_decoder(), entropy_threshold=4.0), words


@entry("x_transformers", "NeoMLP")
def _() -> Built:
    model = lib("x_transformers").NeoMLP(
        dim_in=3, dim_hidden=4, dim_out=2, dim_model=16, depth=2,
        encoder_kwargs={"attn_dim_head": 8, "heads": 2},
    )  # fmt: skip
    return model, takes(3)


# -- perceiver-pytorch -----------------------------------------------------------------------


@entry("perceiver_pytorch", "PerceiverIO")
def _() -> Built:
    model = lib("perceiver_pytorch").PerceiverIO(
        depth=2, dim=8, queries_dim=8, num_latents=4, latent_dim=8, latent_heads=2,
        cross_dim_head=4, latent_dim_head=4, weight_tie_layers=True, logits_dim=3,
    )  # fmt: skip
    return model, lambda b: ((noise(b, 6, 8),), {"queries": noise(3, 8)})


@entry("perceiver_pytorch", "Perceiver")
def _() -> Built:
    model = lib("perceiver_pytorch").Perceiver(
        num_freq_bands=2, depth=2, max_freq=4.0, num_latents=4, latent_dim=8, latent_heads=2,
        cross_dim_head=4, latent_dim_head=4, num_classes=3,
    )  # fmt: skip
    return model, takes(6, 6, 3)


# -- mambapy ---------------------------------------------------------------------------------


@entry("mambapy", "vim")
def _() -> Built:
    m = lib("mambapy.vim")
    config = m.MambaConfig(d_model=8, n_layers=2, d_state=4)
    return m.VMamba(config), takes(8, 8)


@entry("mambapy", "mamba")
def _() -> Built:
    m = lib("mambapy.mamba")
    return m.Mamba(m.MambaConfig(d_model=8, n_layers=2, d_state=4, pscan=False)), takes(8, 8)


@entry("mambapy", "jamba")
def _() -> Built:
    m = lib("mambapy.jamba")
    config = m.JambaLMConfig(
        d_model=16, n_layers=4, vocab_size=VOCABULARY, mlp_size=16, num_attention_heads=2,
        num_key_value_heads=2, num_experts=2, num_experts_per_tok=1, d_state=4,
        attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2,
    )  # fmt: skip
    return m.JambaLM(config), words


# -- snntorch: a surrogate gradient in every layer --------------------------------------------


class Spiking(nn.Module):
    """A layer before a spiking neuron, over time."""

    def __init__(self, neuron: nn.Module, states: int) -> None:
        super().__init__()
        self.layer, self.neuron, self.states = nn.Linear(3, 4), neuron, states

    def forward(self, x: Tensor) -> Any:
        state: Any = ()
        out = []
        for step in x:
            current = self.layer(step)
            if not state:
                zeros = torch.zeros_like(current)
                state = (zeros,) * self.states
            found = self.neuron(current, *state)
            out.append(found[0])
            state = found if len(found) == self.states else found[1:]
        return torch.stack(out), found[-1]


def _over_time(batch: int) -> Call:
    return (2 * noise(5, batch, 3, seed=batch),), {}


@entry("snntorch", "RLeaky")
def _() -> Built:
    neuron = lib("snntorch").RLeaky(0.9, linear_features=4, learn_beta=True, learn_threshold=True)
    return Spiking(neuron, 2), _over_time


@entry("snntorch", "RSynaptic")
def _() -> Built:
    neuron = lib("snntorch").RSynaptic(0.9, 0.8, linear_features=4, learn_alpha=True)
    return Spiking(neuron, 3), _over_time


@entry("snntorch", "LeakyParallel")
def _() -> Built:
    return lib("snntorch").LeakyParallel(3, 4, learn_beta=True), _over_time


@entry("snntorch", "DeltaLeaky")
def _() -> Built:
    model = nn.Sequential(nn.Linear(3, 4), lib("snntorch").DeltaLeaky(beta=0.9, learn_beta=True))
    return Calls(model, lambda m, x: m[1](m[0](x), (None, None))), takes(3)


@entry("snntorch", "StateLeaky")
def _() -> Built:
    neuron = lib("snntorch").StateLeaky(0.9, 4, learn_beta=True)
    return nn.Sequential(nn.Linear(3, 4), neuron), _over_time


@entry("snntorch", "SLSTM")
def _() -> Built:
    return Spiking(lib("snntorch").SLSTM(4, 4), 2), _over_time


@entry("snntorch", "Leaky, hidden state inside")
def _() -> Built:
    s = lib("snntorch")
    neuron = s.Leaky(0.9, learn_beta=True, spike_grad=s.surrogate.fast_sigmoid(), init_hidden=True)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        model.get_submodule("1").reset_mem()  # type: ignore[operator]
        return torch.stack([model(step) for step in x])

    return Calls(nn.Sequential(nn.Linear(3, 4), neuron), run), _over_time
