"""Models of Hugging Face's transformers from tiny configurations: invariants 1-5, text, ties."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import bayesify
from bayesify import one_draw
from bayesify.posterior import sites
from reference import check, same

Call = tuple[tuple[Any, ...], dict[str, Any]]

hf: Any = transformers  # its configurations take more than they declare
VOCABULARY = 50
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
TEXT: dict[str, Any] = {
    **SMALL,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "eos_token_id": 49,
}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "bos_token_id": 0, "pad_token_id": 0}


def tokens(batch: int, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(batch + seed)
    return torch.randint(1, VOCABULARY - 1, (batch, length), generator=generator)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


# -- the models ------------------------------------------------------------------------------


def gpt2() -> Any:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=49, pad_token_id=0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def bert() -> Any:
    config = hf.BertConfig(**TEXT, num_labels=3)
    return hf.BertForSequenceClassification(config)


def vit() -> Any:
    config = hf.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)
    return hf.ViTForImageClassification(config)


def t5() -> Any:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=49, tie_word_embeddings=True,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def whisper() -> Any:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, max_source_positions=10, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


def clip() -> Any:
    config = hf.CLIPConfig(
        text_config={**TEXT, "bos_token_id": 0, "pad_token_id": 0},
        vision_config={**SMALL, "image_size": 16, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    return hf.CLIPModel(config)


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))


def mixtral() -> Any:
    config = hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config)


def qwen_moe() -> Any:
    config = hf.Qwen2MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    return hf.Qwen2MoeForCausalLM(config)


def text(batch: int) -> Call:
    ids = tokens(batch)
    # the cache object of a forward is compared by a test of its own
    return (), {"input_ids": ids, "labels": ids, "use_cache": False}


def masked_text(batch: int) -> Call:
    mask = torch.ones(batch, 7, dtype=torch.long)
    mask[0, 5:] = 0
    labels = torch.arange(batch) % 3
    return (), {"input_ids": tokens(batch), "attention_mask": mask, "labels": labels}


def text_pair(batch: int) -> Call:
    return (), {**text(batch)[1], "labels": tokens(batch, 4, seed=9)}


def pictures(batch: int) -> Call:
    return (), {"pixel_values": images(batch), "labels": torch.arange(batch) % 3}


def sound(batch: int) -> Call:
    features = torch.randn(batch, 8, 20, generator=torch.Generator().manual_seed(batch))
    return (), {"input_features": features, "labels": tokens(batch, 4), "use_cache": False}


def captions(batch: int) -> Call:
    values = {"input_ids": tokens(batch), "pixel_values": images(batch), "return_loss": True}
    return (), values


def routed_text(batch: int) -> Call:
    return (), {**text(batch)[1], "output_router_logits": True}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Call]]] = {
    "gpt2": (gpt2, text),
    "bert": (bert, masked_text),
    "vit": (vit, pictures),
    "t5": (t5, text_pair),
    "whisper": (whisper, sound),
    "clip": (clip, captions),
    "llama": (llama, text),
    "mixtral": (mixtral, routed_text),
    "qwen_moe": (qwen_moe, routed_text),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    build, make = MODELS[name]
    report = check(build(), make)
    assert report.problems == []
    # only holders of other modules fall back; before torch 2.15 also experts, whose grouped
    # products of float32 have no shapes without being computed
    experts = {s.split()[0] for s in report.swapped if "Experts.forward: RuntimeError: Exp" in s}
    assert not experts or torch.__version__ < "2.15"
    assert report.fx_owners == report.owners - len(experts) > 15


def drawn(original: nn.Module, converted: nn.Module, seed: int) -> Any:
    """The plain model with the tensors that ``one_draw(converted, seed)`` uses."""
    plain = copy.deepcopy(original)
    found = plain.load_state_dict(bayesify.draws(converted, seed=seed), strict=False)
    assert found.unexpected_keys == []
    return plain


@pytest.mark.parametrize("called_before", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_recorded_hidden_states(name: str, called_before: bool) -> None:
    """transformers records them by hooks that a forward registers when it is asked for them."""
    build, make = MODELS[name]
    options = {**make(2)[1], "output_hidden_states": True}
    original = build().eval()
    converted: Any = bayesify.to_bbb(original, initial_std=math.exp(-2.0)).eval()
    if called_before:
        assert same(converted(**options), original(**options))
    with one_draw(converted, seed=1):
        found = converted(**options)
    expected = drawn(original, converted, 1)(**options)
    assert list(found) == list(expected)
    assert same(found, expected)


# -- the cache of keys and values ------------------------------------------------------------


# as transformers calls it from 5.24 on, and as before
_ARGUMENTS = inspect.signature(hf.GPT2LMHeadModel.forward).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"


def contents(cache: Any) -> list[Tensor]:
    """Keys and values by layer, as transformers has kept them since 4.55, in 4.48, and before."""
    if hasattr(cache, "layers"):
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    pairs = cache if isinstance(cache, tuple) else zip(cache.key_cache, cache.value_cache)  # noqa: B905
    return [tensor for pair in pairs for tensor in pair]


@pytest.mark.parametrize("build", [gpt2, llama, mixtral], ids=lambda b: b.__name__)
@torch.no_grad()
def test_steps_with_a_cache(build: Callable[[], nn.Module]) -> None:
    original = build().eval()
    converted: Any = bayesify.to_bbb(original, initial_std=math.exp(-2.0)).eval()
    plain = drawn(original, converted, 1)
    ids = tokens(2)
    with one_draw(converted, seed=1):
        whole = converted(input_ids=ids, use_cache=False).logits
        found = converted(input_ids=ids[:, :4], use_cache=True)
        expected = plain(input_ids=ids[:, :4], use_cache=True)
        assert type(found) is type(expected)
        for place in range(4, 7):
            step = {"input_ids": ids[:, place : place + 1], "use_cache": True}
            found = converted(**step, **{CACHE: found[CACHE]})
            expected = plain(**step, **{CACHE: expected[CACHE]})
            assert torch.equal(found.logits, expected.logits)
            torch.testing.assert_close(found.logits[:, 0], whole[:, place], rtol=1e-4, atol=1e-5)
    kept, right = contents(found[CACHE]), contents(expected[CACHE])
    assert len(kept) == 4  # keys and values of two layers
    assert all(type(tensor) is Tensor and tensor.shape[2] == 7 for tensor in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, right, strict=True))


@pytest.mark.parametrize("batch", [2, 20], ids=["together", "one by one"])
@pytest.mark.parametrize("build", [gpt2, llama, mixtral, t5], ids=lambda b: b.__name__)
def test_predict_leaves_the_cache_out(build: Callable[[], nn.Module], batch: int) -> None:
    model = bayesify.to_bbb(build().eval(), initial_std=math.exp(-2.0))
    ids: dict[str, Any] = {"input_ids": tokens(batch)}
    if build is t5:
        ids["decoder_input_ids"] = tokens(batch, 4, seed=9)
    found = bayesify.predict(model, **ids, num_samples=3, seed=1)
    expected = bayesify.predict(model, **ids, num_samples=3, seed=1, use_cache=False)
    assert type(found) is type(expected)
    if type(build().eval()(**ids).get(CACHE)) is tuple:  # GPT-2 and T5 of transformers 4.48
        assert {tensor.shape[:2] for tensor in contents(found[CACHE])} == {(3, batch)}
    else:
        assert found.get(CACHE) is None
    torch.testing.assert_close(found.logits, expected.logits)
    moments = bayesify.predict(model, **ids, num_samples=3, seed=1, reduce="moments")
    torch.testing.assert_close(moments.mean.logits, expected.logits.mean(0))
    rows = bayesify.predict(model, **ids, num_samples=3, seed=1, return_dict=False)
    torch.testing.assert_close(rows[0], expected.logits)


def test_predict_refuses_a_cache_that_draws_would_share() -> None:
    model: Any = bayesify.to_bbb(gpt2().eval(), initial_std=math.exp(-2.0))
    for cache in (hf.DynamicCache(), hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache())):
        with pytest.raises(bayesify.ArgumentError, match=f"an input is a {type(cache).__name__}"):
            bayesify.predict(
                model, input_ids=tokens(2), num_samples=2, use_cache=False, **{CACHE: cache}
            )


# -- text ------------------------------------------------------------------------------------

HOW: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "without cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 2},
    "sampled": {"do_sample": True},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("build", [gpt2, llama, t5], ids=lambda b: b.__name__)
def test_generated_text_is_that_of_the_drawn_model(
    build: Callable[[], nn.Module], how: str
) -> None:
    original = build().eval()
    converted: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0)).eval()
    prompt = tokens(2)
    options = {"max_new_tokens": 5, "attention_mask": torch.ones_like(prompt), **HOW[how]}

    def generate(model: nn.Module) -> Tensor:
        torch.manual_seed(3)
        return model.generate(prompt, **options)  # type: ignore[operator, no-any-return]

    texts = []
    for seed in (1, 2):
        expected = generate(drawn(original, converted, seed))
        # a module's own draw is held over all the steps of a text
        with one_draw(converted, seed=seed):
            found = generate(converted)
        assert torch.equal(found, expected)
        texts.append(found)
    assert not same(texts[0], texts[1])
    assert torch.equal(generate(converted), generate(original))  # at the means


def test_generation_with_and_without_cache() -> None:
    model: Any = bayesify.to_bbb(gpt2(), initial_std=math.exp(-2.0)).eval()
    prompt = tokens(2)
    options = {
        "max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt),
    }  # fmt: skip
    with one_draw(model, seed=1), torch.no_grad():
        cached = model.generate(prompt, use_cache=True, **options)
        plain = model.generate(prompt, use_cache=False, **options)
        logits = model(cached).logits
    assert torch.equal(cached, plain)
    following = logits[:, prompt.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(following[:, 0], cached[:, prompt.shape[1]])


# -- tied weights ----------------------------------------------------------------------------

TIED: dict[str, tuple[Callable[[], nn.Module], str, set[str]]] = {
    "gpt2": (gpt2, "transformer.wte.weight", {"lm_head.weight"}),
    "t5": (
        t5, "shared.weight",
        {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"},
    ),
    "whisper": (whisper, "model.decoder.embed_tokens.weight", {"proj_out.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_share_one_draw(name: str) -> None:
    build, first, others = TIED[name]
    original = build()
    row = next(r for r in bayesify.plan(original).rows if r.name == first)
    assert set(row.aliases) == others
    converted: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.5))
    assert {first, *others} & set(bayesify.draws(converted, seed=1)) == {first}
    state = converted.state_dict()
    where = {state[f"{n}_logvar"].data_ptr() for n in (first, *others)}
    assert len(where) == 1
    ids = tokens(2, 3)
    embedding, head = converted.get_input_embeddings(), converted.get_output_embeddings()
    with one_draw(converted, seed=1), torch.no_grad():
        weight = bayesify.draws(converted, seed=1)[first]
        assert torch.equal(embedding(ids), F.embedding(ids, weight))
        h = torch.randn(2, 16)
        assert torch.equal(head(h), F.linear(h, weight))
        assert not torch.equal(head(h), F.linear(h, embedding.weight))


def test_resized_tied_embeddings_are_named() -> None:
    model: Any = bayesify.to_bbb(gpt2(), initial_std=math.exp(-2.0)).train()
    model(**text(2)[1])
    model.resize_token_embeddings(60, mean_resizing=False)
    # either works: the new rows get a posterior too, or an error says what to do
    try:
        logits = model(**text(2)[1]).logits
    except bayesify.BayesifyError as error:
        assert "transformer.wte.weight" in str(error)  # noqa: PT017
    else:
        assert logits.shape[-1] == 60


# -- more than forward -----------------------------------------------------------------------


@torch.no_grad()
def test_methods_of_clip_draw() -> None:
    original = clip().eval()
    converted: Any = bayesify.to_bbb(original, initial_std=math.exp(-2.0)).eval()
    plain = drawn(original, converted, 1)
    calls = {
        "get_image_features": {"pixel_values": images(2)},
        "get_text_features": {"input_ids": tokens(2)},
    }
    for name, options in calls.items():
        with one_draw(converted, seed=1):
            found = getattr(converted, name)(**options)
        assert same(found, getattr(plain, name)(**options))
        assert not same(found, getattr(original, name)(**options))


def test_only_chosen_experts_get_gradients() -> None:
    original = mixtral()
    converted: Any = bayesify.to_bbb(
        original, only="*.experts.*", initial_std=math.exp(-1.5)
    ).train()
    options = {"input_ids": tokens(1, 1), "use_cache": False}
    with one_draw(converted, seed=1):
        converted(**options).logits.square().sum().backward()
    expected = drawn(original, converted, 1)(**options, output_router_logits=True)
    names = []
    for layer, logits in enumerate(expected.router_logits):
        chosen = set(logits.topk(2, dim=-1).indices.flatten().tolist())
        assert len(chosen) == 2  # one token goes to two of four experts
        for site in sites(converted):
            if f"layers.{layer}." in site.name:
                names.append(site.name)
                assert site.mean.grad is not None
                assert site.raw.grad is not None
                for gradient in (site.mean.grad, site.raw.grad):
                    # older versions have a module for each expert, later ones a tensor for all
                    alone = re.search(r"experts\.(\d+)\.", site.name)
                    parts = {int(alone[1]): gradient} if alone else dict(enumerate(gradient))
                    used = {k for k, part in parts.items() if float(part.abs().max()) > 0}
                    assert used == chosen & parts.keys()
    assert len(names) == len(list(sites(converted))) >= 4


# peft asks for what transformers has renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_on_gpt2() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        target_modules=["c_attn", "c_proj"], r=2, init_lora_weights=False, fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(gpt2(), config)
    report = check(model, text, batches=(2,))
    assert report.problems == []
    converted: Any = bayesify.to_bbb(model, initial_std=math.exp(-1.0)).eval()
    assert all("lora_" in site.name for site in sites(converted))
    prompt = tokens(2)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with one_draw(converted, seed=1):
        found = converted.generate(input_ids=prompt, **options)
    assert torch.equal(found, drawn(model.eval(), converted, 1).generate(prompt, **options))
    assert not torch.equal(found, model.generate(prompt, **options))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_checkpointing_of_a_transformer(reentrant: bool) -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model: Any = bayesify.to_bbb(llama(), initial_std=math.exp(-2.0)).train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()  # a reentrant region wants an input with a gradient
        with one_draw(model, seed=1):
            model(**text(2)[1]).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    assert all(g is not None and float(g.abs().max()) > 0 for g in results[0].values())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
