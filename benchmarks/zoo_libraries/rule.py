"""The rule by which the models are chosen, before anything runs.

Of every table of names below, as the installed version of the library has it, the names are sorted
and shuffled by a generator whose seed is the table's name; the first ``TAKE`` of them are chosen.
A name that cannot be checked here for a reason of its own (no parameter, an abstract base, an error
of the library itself, another package that cannot be had) is passed over, with that reason, and the
next one takes its place. ``zoo_others.py --choose`` writes the choice to `list.json`.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import random
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .entries import lib

LIST = Path(__file__).parent / "list.json"
TAKE: dict[str, int] = {
    "transformers:CAUSAL_LM": 12, "transformers:MASKED_LM": 4,
    "transformers:SEQ_TO_SEQ_CAUSAL_LM": 4, "transformers:SEQUENCE_CLASSIFICATION": 4,
    "transformers:IMAGE_CLASSIFICATION": 5, "transformers:SEMANTIC_SEGMENTATION": 2,
    "transformers:UNIVERSAL_SEGMENTATION": 1, "transformers:VIDEO_CLASSIFICATION": 1,
    "transformers:OBJECT_DETECTION": 2, "transformers:DEPTH_ESTIMATION": 1,
    "transformers:ZERO_SHOT_IMAGE_CLASSIFICATION": 2, "transformers:IMAGE_TEXT_TO_TEXT": 4,
    "transformers:CTC": 2, "transformers:AUDIO_CLASSIFICATION": 2,
    "transformers:SPEECH_SEQ_2_SEQ": 2, "transformers:TIME_SERIES_PREDICTION": 1,
    "peft": 14, "diffusers": 6, "torch_geometric:conv": 8, "torch_geometric:models": 4,
    "segmentation_models_pytorch": 6, "monai": 8, "open_clip": 5, "lightly": 5, "torchvision": 4,
    "zuko": 6, "nflows": 5, "normflows": 4, "torchdiffeq": 4, "sentence_transformers": 3,
    "stable_baselines3": 6, "speechbrain": 4, "kornia": 4, "e3nn": 4, "x_transformers": 5,
    "vit_pytorch": 10, "rtdl": 4, "pytorch_tabnet": 3, "gpytorch": 5, "neuralop": 4,
    "torchani": 2, "mambapy": 3, "pytorch_forecasting": 3, "vector_quantize_pytorch": 4,
    "perceiver_pytorch": 2, "snntorch": 5,
}  # fmt: skip

PACKAGES = {
    "open_clip": "open_clip_torch", "neuralop": "neuraloperator",
    "rtdl": "rtdl_revisiting_models",
}  # fmt: skip
"""The distribution of a library where its name is another one."""

NONE = "has no parameter"
PASSED_OVER: dict[str, str] = {
    "e3nn:ToS2Grid": NONE, "e3nn:S2Activation": NONE, "e3nn:SO3Activation": NONE,
    "e3nn:SO3Grid": NONE, "e3nn:Extract": NONE, "e3nn:FullTensorProduct": NONE,
    "e3nn:Dropout": NONE, "e3nn:Gate": NONE, "e3nn:Activation": NONE, "e3nn:Identity": NONE,
    "e3nn:Norm": NONE, "e3nn:NormActivation": NONE, "e3nn:FromS2Grid": NONE,
    "e3nn:Legendre": NONE, "e3nn:SphericalHarmonics": NONE, "e3nn:ExtractIr": NONE,
    "e3nn:SphericalHarmonicsAlphaBeta": NONE, "e3nn:ElementwiseTensorProduct": NONE,
    "e3nn:FullTensorProductv2": NONE, "e3nn:ReducedTensorProducts": NONE,
    "kornia:BlobDoGSingle": NONE, "kornia:SIFTDescriptor": NONE,
    "lightly:SMoGPrototypes": "its forward reads none of its parameters",
    "lightly:MaskedCausalVisionTransformer": "raises TypeError with timm 1.0.31 itself",
    "mambapy:lm": "imports mamba_ssm, which needs CUDA",
    "mambapy:mamba2": "imports mamba_ssm, which needs CUDA",
    "mambapy:onnx": "holds no model", "mambapy:pscan": "holds no model",
    "nflows:IdentityTransform": NONE, "nflows:Permutation": NONE,
    "normflows:PeriodicWrap": NONE,
    "peft:XLORA": "needs adapters that are stored on disk",
    "pytorch_forecasting:AutoRegressiveBaseModel": "an abstract base",
    "pytorch_forecasting:Baseline": NONE,
    "rtdl:embeddings.PiecewiseLinearEncoding": NONE,
    "sentence_transformers:BoW": NONE, "sentence_transformers:Pooling": NONE,
    "sentence_transformers:InputModule": "an abstract base",
    "sentence_transformers:CLIPModel": "loads weights by name",
    "sentence_transformers:Transformer": "loads weights by name",
    "speechbrain:bsq": NONE,
    "torch_geometric:conv:FusedGATConv": "needs CUDA",
    "torch_geometric:models:DimeNetPlusPlus": "imports pyg-lib, which no registry has",
    "torchani:SpeciesConverter": NONE, "torchani:TightCELU": NONE,
}  # fmt: skip


def classes(module: ModuleType) -> list[str]:
    """The public modules of a Python module, each once."""
    names: dict[type, str] = {}
    for name, value in sorted(vars(module).items()):
        if inspect.isclass(value) and issubclass(value, nn.Module) and not name.startswith("_"):
            if value not in names or value.__name__ == name:
                names[value] = name
    return sorted(names.values())


def files(package: ModuleType) -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def tables() -> dict[str, list[str]]:
    """Every table of names, as the installed libraries have them."""
    from .huggingface import registry

    flow = lib("zuko.flows")
    diffusers = lib("diffusers")
    policies = {
        name: getattr(module, name).policy_aliases
        for module in (lib("stable_baselines3"), lib("sb3_contrib"))
        for name in module.__all__
        if hasattr(getattr(module, name), "policy_aliases")
    }
    return registry() | {
        "peft": sorted(k.value for k in lib("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING),
        "diffusers": sorted(
            name
            for name in diffusers._import_structure["models"]
            if inspect.isclass(value := getattr(diffusers, name))
            and issubclass(value, diffusers.ModelMixin)
            and name != "ModelMixin"
        ),
        "torch_geometric:conv": sorted(lib("torch_geometric.nn.conv").classes),
        "torch_geometric:models": classes(lib("torch_geometric.nn.models")),
        "segmentation_models_pytorch": sorted(
            lib("segmentation_models_pytorch").MODEL_ARCHITECTURES_MAPPING
        ),
        "monai": classes(lib("monai.networks.nets")),
        "open_clip": sorted(lib("open_clip").list_models()),
        "lightly": classes(lib("lightly.models.modules")),
        "torchvision": sorted(
            lib("torchvision.models").list_models(lib("torchvision.models.detection"))
        ),
        "zuko": sorted(
            name
            for name, value in vars(flow).items()
            if inspect.isclass(value) and issubclass(value, flow.Flow) and name != "Flow"
        ),
        "nflows": classes(lib("nflows.transforms")),
        "normflows": classes(lib("normflows").flows),
        "torchdiffeq": sorted(lib("torchdiffeq._impl.odeint").SOLVERS),
        "sentence_transformers": classes(lib("sentence_transformers.models")),
        "stable_baselines3": sorted(f"{a}:{p}" for a, names in policies.items() for p in names),
        "speechbrain": files(lib("speechbrain.lobes.models")),
        "kornia": classes(lib("kornia.feature")),
        "e3nn": sorted({*classes(lib("e3nn.nn")), *classes(lib("e3nn.o3"))}),
        "x_transformers": classes(lib("x_transformers")),
        "vit_pytorch": files(lib("vit_pytorch")),
        "rtdl": sorted(
            {f"models.{n}" for n in classes(lib("rtdl_revisiting_models"))}
            | {f"embeddings.{n}" for n in classes(lib("rtdl_num_embeddings"))}
        ),
        "pytorch_tabnet": [
            n for n in classes(lib("pytorch_tabnet.tab_network")) if n.startswith("TabNet")
        ],
        "gpytorch": classes(lib("gpytorch.kernels")),
        "neuralop": classes(lib("neuralop.models")),
        "torchani": classes(lib("torchani.nn")),
        "mambapy": files(lib("mambapy")),
        "pytorch_forecasting": classes(lib("pytorch_forecasting.models")),
        "vector_quantize_pytorch": classes(lib("vector_quantize_pytorch")),
        "perceiver_pytorch": classes(lib("perceiver_pytorch")),
        "snntorch": classes(lib("snntorch")),
    }


def chosen(table: str, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The names that the rule takes of a table, and those passed over on the way, with why."""
    found: list[str] = []
    passed: dict[str, str] = {}
    for name in random.Random(f"bayesify {table}").sample(names, len(names)):
        if len(found) == TAKE[table]:
            break
        if why := PASSED_OVER.get(f"{table}:{name}"):
            passed[name] = why
        else:
            found.append(name)
    return found, passed


def version(table: str) -> str:
    library = table.partition(":")[0]
    return metadata.version(PACKAGES.get(library, library))


def choose() -> dict[str, Any]:
    """The list, as it is written to :data:`LIST`."""
    made: dict[str, Any] = {}
    for table, names in tables().items():
        found, passed = chosen(table, names)
        made[table] = {
            "version": version(table), "names": len(names), "chosen": found,
            "passed_over": passed,
        }  # fmt: skip
    return made


def read() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(LIST.read_text()) if LIST.exists() else {}
    return made


def keys() -> list[str]:
    """All models of the list."""
    return [f"{table}:{name}" for table, row in read().items() for name in row["chosen"]]
