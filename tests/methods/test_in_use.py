"""Methods where people meet them: in a training configuration, on a pipeline, in the list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from lora_diffusion import Adapter, AdapterStack, LayerAdapter, TrainConfig, load_adapter, save_adapter, train
from lora_diffusion.attachment import attach
from lora_diffusion.cli.methods import methods
from lora_diffusion.errors import AdapterMismatchError, ConfigError
from lora_diffusion.inspection.methods import registered
from lora_diffusion.methods import METHODS, new_method
from lora_diffusion.methods.lora import LoRA
from lora_diffusion.targets import find_targets
from tests import tiny
from tests.training.pictures import settings


def random_adapter(pipe: object, name: str, targets: str = "attention+conv") -> Adapter:
    layers: dict[str, LayerAdapter] = {}
    method = new_method(name, rank=2)
    for path, layer in find_targets(pipe.unet, targets).items():  # type: ignore[attr-defined]
        if method.supports(layer):
            layers[path] = method.fresh(layer)
            for tensor in layers[path].tensors.values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor) * 0.1)
    return Adapter(name, {"unet": layers})


def test_all_methods_stack_on_one_pipeline_in_any_order_and_come_off_without_a_trace() -> None:
    pipe = tiny.sd()
    places = {"prefix": "attention-blocks", "norm": "norm", "set": "norm"}
    adapters = [random_adapter(pipe, name, places.get(name, "attention+conv")) for name in METHODS]
    plain, tree = tiny.picture(pipe), repr(pipe.unet)
    pictures = []
    for order in (adapters, adapters[::-1]):
        with AdapterStack(pipe) as stack:
            for adapter in order:
                stack.add(adapter, 0.3)
            pictures.append(tiny.picture(pipe))
            stack.weigh_all(dict.fromkeys(stack, 0.0))
            np.testing.assert_array_equal(tiny.picture(pipe), plain)
            stack.weigh("dora", "0@0,1@1")
            stack.weigh("loha", {"unet": 0.5})
            assert np.abs(tiny.picture(pipe) - plain).max() > 1e-3
        np.testing.assert_array_equal(tiny.picture(pipe), plain)
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[0] - plain).max() > 1e-3
    assert repr(pipe.unet) == tree


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_model_cast_with_an_adapter_on_computes_what_one_cast_before_does(method: str, dtype: torch.dtype) -> None:
    late, early = tiny.sd(), tiny.sd()
    places = {"prefix": "attention-blocks", "norm": "norm", "set": "norm"}
    adapter = random_adapter(late, method, places.get(method, "attention+conv"))
    early.unet.to(dtype)
    stacks = AdapterStack(late), AdapterStack(early)
    with torch.no_grad():
        for stack, pipe in zip(stacks, (late, early), strict=True):
            stack.add(adapter, 0.7)
            tiny.predict(pipe.unet, pipe.unet.dtype)
        late.unet.to(dtype)
        assert torch.equal(tiny.predict(late.unet, dtype), tiny.predict(early.unet, dtype))


def test_each_image_of_a_batch_has_its_own_weight_of_a_branch() -> None:
    pipe = tiny.sd()
    adapter = random_adapter(pipe, "dora")
    with AdapterStack(pipe) as stack:
        stack.add(adapter, [0.0, 1.0])
        layer = pipe.unet.get_submodule(next(iter(adapter.layers["unet"])))
        assert layer.adapters.live is not None
        both = pipe("x", num_images_per_prompt=2, num_inference_steps=1, output_type="np", generator=seeds()).images
    first = pipe("x", num_images_per_prompt=2, num_inference_steps=1, output_type="np", generator=seeds()).images
    np.testing.assert_allclose(both[0], first[0], atol=1e-5)
    assert np.abs(both[1] - first[1]).max() > 1e-4


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(2)]


def test_norms_go_on_and_off() -> None:
    pipe = tiny.sd()
    name, layer = next((n, m) for n, m in pipe.unet.named_modules() if METHODS["norm"].supports(m))
    plain = tiny.picture(pipe)
    shares = {"w_norm": torch.randn(layer.weight.shape), "b_norm": torch.randn(layer.weight.shape)}
    with AdapterStack(pipe) as stack:
        stack.add(Adapter("n", {"unet": {name: LayerAdapter("norm", shares)}}))
        assert np.abs(tiny.picture(pipe) - plain).max() > 1e-4
    np.testing.assert_array_equal(tiny.picture(pipe), plain)


def test_norms_train_from_a_configuration_and_the_rates_of_lora_plus_reach_the_optimiser(tmp_path: Path) -> None:
    given = settings(tmp_path, lr=3e-2, steps=2, checkpoint_every=2)
    given["adapter"] |= {"method": "norm", "targets": "norm"}
    result = train(TrainConfig.parse(given))
    assert result.adapter is not None
    adapter = load_adapter(result.adapter)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    assert len(adapter) == len(find_targets(pipe.unet, "norm"))
    assert all(layer.tensors["w_norm"].any() and layer.tensors["b_norm"].any() for *_, layer in adapter)
    plain = tiny.picture(pipe)
    with AdapterStack(pipe) as stack:
        stack.add(adapter)
        assert np.abs(tiny.picture(pipe) - plain).max() > 1e-3
    seen: list[dict[float, int]] = []
    step = torch.optim.AdamW.step

    def note(self: torch.optim.AdamW, *args: object) -> object:
        seen.append({group["lr"]: len(group["params"]) for group in self.param_groups})
        return step(self, *args)  # type: ignore[arg-type]

    given = settings(tmp_path, lr=1e-3, up_ratio=16.0, steps=2, warmup=0) | {"output": str(tmp_path / "plus")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", note)
        train(TrainConfig.parse(given))
    assert len(seen) == 2
    assert list(seen[0]) == [1e-3, 16e-3]
    assert seen[0][1e-3] == seen[0][16e-3]


@pytest.mark.parametrize("method", ["dora", "lokr"])
def test_it_trains_from_a_configuration_over_nf4_and_draws_what_it_learned(tmp_path: Path, method: str) -> None:
    given = settings(tmp_path, lr=3e-2, up_ratio=4.0)
    given["adapter"] |= {"method": method, "rslora": True}
    if method == "lokr":
        given["adapter"]["settings"] = {"factor": 2}
    result = train(TrainConfig.parse(given))
    assert result.backbone_unchanged
    assert result.adapter is not None
    adapter = load_adapter(result.adapter)
    assert adapter.methods == {method}
    assert adapter.spelling == ("diffusers" if method == "dora" else "kohya")
    if method == "lokr":
        assert {layer.tensors["w1"].shape for *_, layer in adapter} == {(2, 2)}
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    plain = tiny.picture(pipe)
    with AdapterStack(pipe) as stack:
        stack.add(adapter)
        ours = tiny.picture(pipe)
    assert np.abs(ours - plain).max() > 1e-3
    if method == "dora":
        pipe.load_lora_weights(result.adapter)
        np.testing.assert_allclose(ours, tiny.picture(pipe), atol=1e-4)


def test_settings_that_a_method_has_not_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"oft.*rslora"):
        new_method("oft", rank=4, rslora=True)
    with pytest.raises(ConfigError, match="no rank axis"):
        attach(tiny.unet(), new_method("loha", rank=4), dropout=0.1)


def test_a_methods_own_settings_are_checked_by_name_and_type(tmp_path: Path) -> None:
    assert new_method("oft", {"stages": 3}, rank=4) == new_method("oft", rank=4, stages=3)
    with pytest.raises(ConfigError, match=r"lora.*no setting 'factor'.*'rank'"):
        new_method("lora", {"factor": 3})
    with pytest.raises(ConfigError, match=r"lokr.*factor = 'x': input should be a valid integer"):
        new_method("lokr", {"factor": "x"})
    with pytest.raises(ConfigError, match=r"^vera: rank 256 and seed -1"):
        new_method("vera", {"seed": -1})


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("adalora", {"orthogonality": float("nan")}),
        ("adalora", {"orthogonality": float("inf")}),
        ("vera", {"start": float("nan")}),
        ("vera", {"start": 0.0}),  # b begins at 0 too: no gradient would ever reach either
        ("lokr", {"factor": 0}),
        ("tlora", {"power": 1000.0}),  # which no file could say
        ("tlora", {"power": float("nan")}),
    ],
)
def test_settings_that_could_train_nothing_sound_are_refused(name: str, own: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: .*expected"):
        new_method(name, own, rank=4)


def test_a_bias_is_trained_beside_a_pair_where_there_is_one(tmp_path: Path) -> None:
    """A layer without a bias has a plain pair, in memory as in the file."""
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 6, bias=False), "to_v": torch.nn.Linear(8, 6)})
    with attach(model, new_method("biased", rank=2), component="transformer") as attachment:
        adapter = attachment.adapter("mine")
    assert {name: layer.method for _, name, layer in adapter} == {"to_q": "lora", "to_v": "biased"}
    again = load_adapter(save_adapter(adapter, tmp_path / "a.safetensors", format="kohya"))
    assert again == adapter
    assert again.content_hash == adapter.content_hash
    with attach(model, new_method("biased", rank=2), component="transformer") as attachment:
        attachment.load(again)
        assert attachment.adapter("mine") == adapter


def test_rslora_is_kept_as_an_alpha() -> None:
    adapter = LoRA(16, 4.0, rslora=True).fresh(torch.nn.Linear(4, 4))
    assert LoRA.scale(adapter) == 4.0 / 16**0.5


def test_another_methods_tensors_are_not_loaded_into_an_attachment() -> None:
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(16, 24)})
    with attach(model, new_method("loha", rank=4)) as loha:
        other = loha.adapter("x")
    with attach(model, new_method("lokr", rank=4)) as lokr, pytest.raises(AdapterMismatchError, match="expected lokr"):
        lokr.load(other)


def test_a_rank_that_one_method_cannot_have_leaves_the_others_in_the_list() -> None:
    """T-LoRA has no more ranks than the last convolution has outputs."""
    rows = {row.name: row for row in registered(tiny.unet(), "conv", 16)}
    assert rows["tlora"].parameters is None
    assert all(rows[name].parameters for name in ("lora", "dora", "locon", "norm", "prefix"))


def test_the_list_names_every_method_and_counts(tmp_path: Path) -> None:
    rows = {row.name: row for row in registered(tiny.unet(), "attention", 2)}
    assert list(rows) == list(METHODS)
    with attach(tiny.unet(), LoRA(2), "attention") as attachment:
        assert rows["lora"].parameters == sum(p.numel() for p in attachment.parameters())
    for name, place in (("locon", "conv"), ("norm", "norm"), ("prefix", "attention-blocks")):
        with attach(tiny.unet(), new_method(name, rank=2), place) as attachment:
            assert rows[name].parameters == sum(p.numel() for p in attachment.parameters())
        assert rows[name].targets == place
    assert {row.targets for row in rows.values()} == {"attention", "conv", "norm", "attention-blocks"}
    assert rows["dora"].about.startswith("DoRA")
    tiny.sd().save_pretrained(tmp_path / "base")
    app = typer.Typer()
    app.command()(methods)
    said = CliRunner().invoke(app, ["--base", str(tmp_path / "base"), "--rank", "2"], env={"COLUMNS": "200"}).output
    assert all(name in said for name in METHODS)
    assert f"{rows['ia3'].parameters:,}" in said
