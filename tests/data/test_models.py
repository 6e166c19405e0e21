"""bayesify.models: names, weights, what is saved of a model, and what is refused."""

import dataclasses
import json
import math
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from bayesify.errors import ArgumentError, ModelError
from bayesify.models import InputConfig, ModelSpec, create_model, input_config

HALF = (0.5, 0.5, 0.5)


class Net(nn.Module):
    """A factory of this test: two linear layers and a buffer that holds infinity."""

    mask: Tensor

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(3, width)
        self.b = nn.Linear(width, 2)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))


def not_a_model() -> str:
    return "text"


def fails(width: int) -> nn.Module:
    raise OSError(f"no width {width}")


NET = f"{__name__}:Net"
number = 3


# names


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k"])
def test_a_timm_name_gives_what_timm_gives(name: str) -> None:
    torch.manual_seed(0)
    expected = timm.create_model(name, num_classes=7, in_chans=1)
    torch.manual_seed(0)
    found = create_model(name, num_classes=7, in_chans=1)
    assert type(found) is type(expected)
    assert found.training
    for (key, value), (other_key, other) in zip(
        found.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert key == other_key
        assert torch.equal(value, other)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mixer_s32_224", "levit_128s"])
def test_img_size_reaches_models_that_need_it_and_those_that_do_not(name: str) -> None:
    model = create_model(name, num_classes=3, in_chans=1, img_size=96).eval()
    assert model(torch.zeros(2, 1, 96, 96)).shape == (2, 3)
    assert input_config(model, in_chans=1).size == (1, 96, 96)
    assert input_config(create_model(name)).size != (3, 96, 96)


def test_a_torchvision_name_gives_what_torchvision_gives() -> None:
    torch.manual_seed(0)
    expected = torchvision.models.resnet18(num_classes=5)
    torch.manual_seed(0)
    found = create_model("torchvision:resnet18", num_classes=5)
    assert type(found) is torchvision.models.ResNet
    assert torch.equal(found.get_parameter("fc.weight"), expected.fc.weight)
    vit = create_model("torchvision:vit_b_32", img_size=64, num_classes=5)
    assert input_config(vit).size == (3, 64, 64)


def test_a_detector_of_torchvision_downloads_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    name = "torchvision:ssdlite320_mobilenet_v3_large"
    assert type(create_model(name, num_classes=3)).__name__ == "SSD"


def test_a_factory_gets_its_arguments_and_nothing_else() -> None:
    model = create_model(NET, model_args={"width": 6}, img_size=8, in_chans=1)
    assert isinstance(model, Net)
    assert model.a.out_features == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "timm has no model 'resnet5O'. Closest: resnet50, resnet51q, resnet50t"),
        ("resnet50.a1_in2k", r"Closest: resnet50\.a1_in1k, "),
        ("torchvision:resnet5O", "torchvision has no model 'resnet5O'. Closest: resnet50, "),
        ("torchvision:", "torchvision has no model ''"),
        ("hf-hub:timm/resnet50", "is no model name"),
        ("no_such_package.x:Net", "cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:Nett", "has nothing called 'Nett'.*Closest: Net"),
        (f"{__name__}:number", "has a int called 'number'"),
        (f"{__name__}:not_a_model", "returned str; expected an nn.Module"),
        (f"{__name__}:fails", "cannot be built with .*TypeError"),
        ("", "must be a text"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model(name)


def test_a_module_with_an_error_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_for_bayesify.py").write_text("1 +")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ModelError, match=r"broken_for_bayesify.*SyntaxError"):
        create_model("broken_for_bayesify:Net")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_resnet", {"num_classes": 0}, "num_classes must be a whole number above 0"),
        ("test_resnet", {"in_chans": True}, "in_chans must be"),
        ("test_resnet", {"img_size": 2.5}, "img_size must be"),
        ("test_resnet", {"model_args": {"nonsense": 1}}, "cannot be built with .*nonsense"),
        ("test_resnet", {"model_args": {"num_classes": 3}}, "a field of its own"),
        ("test_resnet", {"model_args": {"pretrained": True}}, "use pretrained=True"),
        ("test_resnet", {"model_args": {"checkpoint_path": "x"}}, "use weights=FILE"),
        ("test_resnet", {"model_args": [1]}, "model_args must be a dict"),
        (
            "test_vit",
            {"img_size": 32, "model_args": {"embed_dim": 63}},
            "cannot be built with .*'img_size': 32.*'embed_dim': 63",
        ),
        ("torchvision:resnet18", {"in_chans": 1}, "take 3 channels, not 1"),
        ("torchvision:resnet18", {"model_args": {"weights": "DEFAULT"}}, "use pretrained=True"),
        (NET, {"num_classes": 2}, "put it in model_args"),
        (NET, {"pretrained": True}, "does not"),
        (f"{__name__}:fails", {"model_args": {"width": 2}}, "OSError: no width 2"),
        ("test_resnet", {"pretrained": True, "weights": "x"}, "not both"),
    ],
)
def test_arguments_that_do_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        create_model(name, **options)


# pretrained


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:squeezenet1_1"])
def test_no_network_says_so_and_names_the_option(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub's five attempts
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"offline.*--weights FILE"):
        create_model(name, pretrained=True)


def test_pretrained_weights_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model("test_resnet")
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *a, **k: source.state_dict()
    )
    found = create_model("test_resnet", pretrained=True, num_classes=3, in_chans=1, img_size=32)
    deep = "layer2.0.conv1.weight"
    assert torch.equal(found.get_parameter(deep), source.get_parameter(deep))
    assert found.get_parameter("fc.weight").shape[0] == 3
    stem = source.get_parameter("conv1.0.weight")
    torch.testing.assert_close(found.get_parameter("conv1.0.weight"), stem.sum(dim=1, keepdim=True))


def test_models_without_published_weights() -> None:
    with pytest.raises(ModelError, match="timm publishes no weights for 'botnet50ts_256'"):
        create_model("botnet50ts_256", pretrained=True)


# weights

Save = Callable[[dict[str, Tensor], Path], None]


def as_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file({key: value.clone() for key, value in state.items()}, path)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        ("safetensors", as_safetensors),
        ("pth", torch.save),
        ("pt", lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path)),
        ("bin", lambda state, path: torch.save({"model": state}, path)),
        (
            "ckpt",
            lambda state, path: torch.save(
                {"state_dict": {f"module.{k}": v for k, v in state.items()}}, path
            ),
        ),
        (
            "old",
            lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
        ),
    ],
)
def test_weights_come_back_bit_by_bit(tmp_path: Path, suffix: str, write: Save) -> None:
    source = timm.create_model("test_resnet", num_classes=3)
    path = tmp_path / f"weights.{suffix}"
    write(source.state_dict(), path)
    found = create_model("test_resnet", num_classes=3, weights=path).state_dict()
    for key, value in source.state_dict().items():
        assert torch.equal(found[key], value), key


def net_state(**change: Tensor | None) -> dict[str, Tensor]:
    state = {**Net().state_dict(), **{k.replace("__", "."): v for k, v in change.items()}}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (net_state(a__bias=None, mask=None), r"2 missing from the file: a\.bias, mask"),
        (net_state(c=torch.zeros(1)), "1 not in the model: c"),
        (
            net_state(b__weight=torch.zeros(7, 4), extra=torch.zeros(1), a__bias=None),
            r"1 missing from the file: a\.bias; 1 not in the model: extra; "
            r"1 of another shape: b\.weight \(file \(7, 4\), model \(2, 4\)\)",
        ),
        (
            {f"x{i}": torch.zeros(1) for i in range(9)},
            r"5 missing from the file: .*9 not in the model: x0, x1, x2, x3, x4, \.\.\.",
        ),
        (net_state(a__bias=torch.tensor([0, math.nan, 0, 0])), r"1 with NaN or infinity: a\.bias"),
        (net_state(b__bias=torch.tensor([math.inf, 0])), r"1 with NaN or infinity: b\.bias"),
    ],
)
@pytest.mark.parametrize("write", [as_safetensors, torch.save])
def test_weights_that_do_not_fit_name_their_tensors(
    tmp_path: Path, write: Save, state: dict[str, Tensor], message: str
) -> None:
    path = tmp_path / ("w.safetensors" if write is as_safetensors else "w.pth")
    write(state, path)
    with pytest.raises(ModelError, match=f"{path.name} cannot be loaded into Net.*{message}"):
        create_model(NET, weights=path)


def test_infinity_is_taken_where_the_model_itself_has_it(tmp_path: Path) -> None:
    as_safetensors(Net().state_dict(), tmp_path / "w.safetensors")
    assert isinstance(create_model(NET, weights=tmp_path / "w.safetensors"), Net)


def test_keys_that_a_module_completes_by_itself_are_not_missing(tmp_path: Path) -> None:
    # Files older than BatchNorm's num_batches_tracked; BatchNorm adds it when it loads them.
    state = timm.create_model("test_resnet").state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    as_safetensors(old, tmp_path / "w.safetensors")
    assert len(old) < len(state)
    create_model("test_resnet", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "old"])
@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"weights.{suffix}"
    state = Net(width=400).state_dict()
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == "pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(ModelError, match=path.name):
        create_model(NET, model_args={"width": 400}, weights=path)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(Net(), path)
    with pytest.raises(ModelError, match="never loaded"):
        create_model(NET, weights=path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {"a": 1}}, {"epoch": 3}])
def test_files_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="state_dict"):
        create_model(NET, weights=tmp_path / "w.pth")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(ModelError, match="no weights file"):
            create_model(NET, weights=path)


# spec


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec("test_resnet"),
        ModelSpec("test_vit", 3, 1, 32, {"drop_rate": 0.1}),
        ModelSpec("torchvision:resnet18", num_classes=4),
    ],
)
def test_a_spec_survives_json_and_builds_the_same(spec: ModelSpec) -> None:
    again = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    shapes = [{k: v.shape for k, v in s.build().state_dict().items()} for s in (spec, again)]
    assert shapes[0] == shapes[1]


def test_a_file_cannot_choose_code_to_run() -> None:
    spec = ModelSpec(NET, model_args={"width": 5})
    with pytest.raises(ModelError, match="does not choose which code"):
        ModelSpec.from_json(spec.to_json())
    with pytest.raises(ModelError, match="does not choose which code"):
        ModelSpec.from_json({"name": "os:system", "model_args": {"command": "true"}})
    assert ModelSpec.from_json(spec.to_json(), allow_factory=True) == spec


@pytest.mark.parametrize(
    "data",
    [
        None,
        "resnet18",
        {},
        {"name": 3},
        {"name": "resnet18", "x": 1},
        {"name": "r", "in_chans": "1"},
    ],
)
def test_a_damaged_spec_is_refused(data: object) -> None:
    with pytest.raises(ModelError):
        ModelSpec.from_json(data)


@pytest.mark.parametrize("value", [nn.ReLU, math.nan])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(ModelError, match="cannot be saved"):
        ModelSpec("test_resnet", model_args={"act_layer": value}).to_json()


# input_config


def test_timm_models_say_what_they_want() -> None:
    found = input_config(create_model("tf_efficientnet_lite0"))
    assert found == InputConfig((3, 224, 224), HALF, HALF, "bicubic", 0.875)
    found = input_config(create_model("resnet18"), img_size=64, in_chans=1)
    assert found.size == (1, 64, 64)
    assert found.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert found.std == pytest.approx([(0.229 + 0.224 + 0.225) / 3])


def test_every_model_of_timm_has_an_input_that_can_be_made() -> None:
    model: Any = nn.Module()
    for name in timm.list_models(pretrained=True):
        config = timm.models.get_pretrained_cfg(name)
        assert config is not None
        model.pretrained_cfg = dataclasses.asdict(config)
        found = input_config(model)
        assert found.size == config.input_size, name
        assert found.crop_mode == ("squash" if config.crop_mode == "squash" else "center"), name


def test_torchvision_models_get_imagenet_values() -> None:
    found = input_config(create_model("torchvision:squeezenet1_1"))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert found == InputConfig((3, 224, 224), mean, std, "bilinear", 0.875)


def test_other_models_need_a_size() -> None:
    with pytest.raises(ModelError, match=r"Net does not say .* img_size"):
        input_config(Net())
    assert input_config(Net(), img_size=8) == InputConfig((3, 8, 8), HALF, HALF)
    found = input_config(Net(), img_size=8, in_chans=1, mean=(0.2,), std=(0.3,))
    assert found == InputConfig((1, 8, 8), (0.2,), (0.3,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (3, 0, 8)}, "size must be"),
        ({"size": (8, 8)}, "size must be"),
        ({"size": (1, 8, 8)}, "one number for each of the 1 channels"),
        ({"mean": (0.5,)}, "one number for each of the 3 channels, not 1 and 3"),
        ({"mean": (0.5, math.nan, 0.5)}, "each number of mean must be finite"),
        ({"std": (0.5, 0.0, 0.5)}, "each number of std must be finite and above 0"),
        ({"interpolation": "lanczos"}, "interpolation must be one of"),
        ({"crop_mode": "border"}, "crop_mode must be one of"),
        ({"crop_pct": 0.0}, "crop_pct must be"),
        ({"crop_pct": math.inf}, "crop_pct must be"),
    ],
)
def test_an_input_that_cannot_be_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        InputConfig(**{"size": (3, 8, 8), "mean": HALF, "std": HALF, **change})


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.to(torch.complex64) * 1j, "torch.complex64 in the file, torch.float32"),
        (lambda w: w.to_sparse(), "torch.sparse_coo"),
        (lambda w: w.to("meta"), "meta: make it dense, with data"),
        (lambda w: w.to(torch.float8_e4m3fn), "float8_e4m3fn, which needs a scale"),
    ],
)
def test_weights_of_another_kind_are_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    state = create_model("test_resnet", num_classes=4).state_dict()
    state["fc.weight"] = spoil(state["fc.weight"])
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=rf"1 that hold no numbers .*fc\.weight \(.*{message}"):
        create_model("test_resnet", num_classes=4, weights=tmp_path / "a.pt")


@pytest.mark.parametrize(
    "fields", [{"size": (3, 1 << 20, 1 << 20)}, {"crop_pct": 1e-6}, {"crop_pct": 100.0}]
)
def test_an_input_that_would_take_all_memory_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(fields))):
        InputConfig(**{"size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, **fields})
