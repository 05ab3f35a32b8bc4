"""The tensors of every method that LyCORIS writes: read whole, written again to the bit, halves reported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion import Adapter
from lora_diffusion.formats.comfy import COMFY
from lora_diffusion.formats.diffusers import DIFFUSERS
from lora_diffusion.formats.kohya import KOHYA
from lora_diffusion.methods import METHODS

NAME = "mid_block_attentions_0_proj_in"
PATH = f"lora_unet_{NAME}"


def filled(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


PLAIN = filled(lora_down__weight=(2, 8), lora_up__weight=(6, 2))
CONV = filled(lora_down__weight=(2, 8, 3, 3), lora_up__weight=(6, 2, 1, 1))
LOHA = filled(hada_w1_a=(6, 2), hada_w1_b=(2, 8), hada_w2_a=(6, 2), hada_w2_b=(2, 8))
ALPHA = {"alpha": torch.tensor(3.0)}
FILES: dict[str, tuple[str, dict[str, Tensor], float | None]] = {
    "lora": ("lora", PLAIN | ALPHA, 3),
    "lora with a bias": ("biased", PLAIN | filled(diff_b=(6,)), 2),
    "lora with PEFT's bias": ("biased", PLAIN | filled(lora_B__bias=(6,)) | ALPHA, 3),
    "locon": (
        "locon",
        filled(lora_down__weight=(2, 8, 1, 1), lora_mid__weight=(2, 2, 3, 3), lora_up__weight=(6, 2)),
        2,
    ),
    "dora by output": ("dora", PLAIN | filled(dora_scale=(6, 1)), 2),
    "dora by input": ("dora", PLAIN | filled(dora_scale=(1, 8)), 2),
    "dora on a convolution": ("dora", CONV | filled(dora_scale=(6, 1, 1, 1)), 2),
    "dora with a bias": ("dora", PLAIN | filled(dora_scale=(6, 1), diff_b=(6,)), 2),
    "loha with a bias": ("loha", LOHA | filled(diff_b=(6,)) | ALPHA, 3),
    "lokr with a bias": ("lokr", filled(lokr_w1=(2, 2), lokr_w2=(3, 4), diff_b=(6,)), None),
    "loha": ("loha", LOHA | ALPHA, 3),
    "loha with tucker": ("loha", LOHA | filled(hada_t1=(2, 2, 3, 3), hada_t2=(2, 2, 3, 3)), 2),
    "loha with dora": ("loha", LOHA | filled(dora_scale=(6, 1)), 2),
    "lokr whole": ("lokr", filled(lokr_w1=(2, 2), lokr_w2=(3, 4)) | {"alpha": torch.tensor(1e9)}, 1e9),
    "lokr half": ("lokr", filled(lokr_w1=(2, 2), lokr_w2_a=(3, 5), lokr_w2_b=(5, 4)), 5),
    "lokr factored": ("lokr", filled(lokr_w1_a=(2, 3), lokr_w1_b=(3, 2), lokr_w2_a=(3, 3), lokr_w2_b=(3, 4)), 3),
    "lokr with tucker": ("lokr", filled(lokr_w1=(2, 2), lokr_w2_a=(3, 3), lokr_w2_b=(3, 4), lokr_t2=(3, 3, 3, 3)), 3),
    "ia3": ("ia3", filled(weight=(6,)) | {"on_input": torch.tensor(0)}, None),
    "oft": ("oft", filled(oft_blocks=(2, 3, 3), rescale=(6, 1)) | ALPHA, 3),
    "boft": ("oft", filled(oft_blocks=(2, 2, 3, 3)), None),
    "glora": ("glora", filled(a1__weight=(8, 2), a2__weight=(2, 8), b1__weight=(6, 2), b2__weight=(2, 8)), 2),
    "vera": (
        "vera",
        filled(vera_lambda_d=(4,), vera_lambda_b=(6,)) | {"vera_projection": torch.tensor([0, 9, 8])},
        None,
    ),
    "full": ("full", filled(diff=(6, 8), diff_b=(6,)), None),
    "bias alone": ("full", filled(diff_b=(6,)), None),
    "norm": ("norm", filled(w_norm=(6,), b_norm=(6,)), None),
    "norm without bias": ("norm", filled(w_norm=(6,)), None),
    "set": ("set", filled(set_weight=(6, 8)), None),
}


@pytest.mark.parametrize("name", FILES)
def test_it_is_read_whole_and_written_again_to_the_bit(name: str):
    method, parts, alpha = FILES[name]
    tensors = {f"{PATH}.{suffix}": tensor for suffix, tensor in parts.items()}
    parsed = KOHYA.load(tensors, {})
    assert not parsed.unused
    layer = parsed.layers["unet"]["mid_block_attentions_0_proj_in"]
    assert (layer.method, layer.alpha) == (method, alpha)
    adapter = Adapter("x", parsed.layers)
    written, metadata = KOHYA.dump(adapter)
    assert {key: tensor.shape for key, tensor in written.items() if key in tensors} == {
        key: tensor.shape for key, tensor in tensors.items()
    }
    dotted = Adapter("y", {"unet": {NAME.replace("mid_block_", "mid_block."): layer}})
    for spelling, said in ((KOHYA, adapter), (COMFY, dotted)):
        again = spelling.load(*spelling.dump(said))
        assert not again.unused
        assert Adapter("z", again.layers) == adapter
    assert metadata == {}


@pytest.mark.parametrize("name", ["lora", "dora by output", "dora on a convolution"])
def test_what_peft_knows_is_written_for_it(name: str):
    tensors = {f"{PATH}.{suffix}": tensor for suffix, tensor in FILES[name][1].items()}
    layer = KOHYA.load(tensors, {}).layers["unet"]["mid_block_attentions_0_proj_in"]
    adapter = Adapter("x", {"unet": {"mid_block.attentions.0.proj_in": layer}})
    again = DIFFUSERS.load(*DIFFUSERS.dump(adapter))
    assert Adapter("y", again.layers) == adapter


@pytest.mark.parametrize("name", ["lora", "locon", "loha", "lokr factored", "glora", "ia3", "dora by output"])
def test_any_required_tensor_that_is_missing_is_reported(name: str):
    _, parts, _ = FILES[name]
    for gone in parts.keys() - {"alpha", "dora_scale", "lora_mid.weight"}:
        tensors = {f"{PATH}.{suffix}": tensor for suffix, tensor in parts.items() if suffix != gone}
        parsed = KOHYA.load(tensors, {})
        assert set(parsed.unused) == set(tensors), gone
        assert not parsed.layers


def test_a_whole_number_tensor_and_unlike_ranks_are_reported():
    whole = {f"{PATH}.lora_down.weight": torch.ones(2, 8, dtype=torch.int8), f"{PATH}.lora_up.weight": torch.ones(6, 2)}
    assert "int8" in next(iter(KOHYA.load(whole, {}).unused.values()))
    unlike = {f"{PATH}.lora_down.weight": torch.ones(3, 8), f"{PATH}.lora_up.weight": torch.ones(6, 2)}
    assert "no pair" in next(iter(KOHYA.load(unlike, {}).unused.values()))


def test_tensors_of_two_methods_on_one_layer_are_reported():
    tensors = {f"{PATH}.{suffix}": tensor for suffix, tensor in (PLAIN | LOHA).items()}
    assert set(KOHYA.load(tensors, {}).unused.values()) == {"tensors of loha and lora on one layer"}


@pytest.mark.parametrize(
    ("there", "beside"),
    [
        ({"oft_blocks": torch.ones(2, 3, 3)}, "diff_b"),
        ({"oft_R.weight": torch.ones(2, 3)}, "dora_scale"),
        ({"weight": torch.ones(6), "on_input": torch.tensor(0)}, "diff_b"),
        (filled(a1__weight=(8, 2), a2__weight=(2, 8), b1__weight=(6, 2), b2__weight=(2, 8)), "dora_scale"),
        ({"w_norm": torch.ones(6)}, "diff_b"),
        ({"diff": torch.ones(6, 8)}, "dora_scale"),
        (PLAIN | {"dora_scale": torch.ones(6, 1)}, "lora_B.bias"),
    ],
)
def test_what_a_method_has_no_room_for_is_reported_by_name(there: dict[str, Tensor], beside: str):
    tensors = {f"{PATH}.{suffix}": tensor for suffix, tensor in (there | {beside: torch.ones(6)}).items()}
    parsed = KOHYA.load(tensors, {})
    assert set(parsed.unused) == set(tensors)
    part = {"dora_scale": "magnitude", "lora_B.bias": "up_bias"}.get(beside, beside)
    assert all(f"takes no {part} beside it" in why for why in parsed.unused.values())


def test_the_alpha_of_whole_differences_is_kept_and_scales_nothing_as_in_comfyui():
    diff = torch.randn(6, 8)
    layer = KOHYA.load({f"{PATH}.diff": diff} | {f"{PATH}.alpha": torch.tensor(4.0)}, {}).layers["unet"][NAME]
    assert (layer.method, layer.alpha) == ("full", 4)
    torch.testing.assert_close(METHODS["full"].delta(layer, nn.Linear(8, 6)), diff)


@pytest.mark.parametrize("flag", [2, -1, [0, 1]])
def test_a_side_that_is_neither_input_nor_output_fits_no_layer(flag: object):
    tensors = {f"{PATH}.weight": torch.ones(8), f"{PATH}.on_input": torch.tensor(flag)}
    layer = KOHYA.load(tensors, {}).layers["unet"][NAME]
    assert "expected one number, 0 or 1" in str(METHODS["ia3"].check(layer, nn.Linear(8, 8)))


def test_a_magnitude_beside_a_peft_pair_of_any_spelling_is_one_vector():
    path = "unet.mid_block.attentions.0.proj_in"
    pair = {f"{path}.lora_A.weight": torch.ones(2, 8, 1, 1), f"{path}.lora_B.weight": torch.ones(6, 2, 1, 1)}
    for suffix, shape in (
        ("lora_magnitude_vector", (6,)),
        ("lora_magnitude_vector.weight", (1, 6, 1, 1)),
        ("lora_magnitude_vector.default.weight", (6,)),
        ("magnitude", (6,)),
    ):
        layer = DIFFUSERS.load({**pair, f"{path}.{suffix}": torch.ones(shape)}, {}).layers["unet"]
        assert layer["mid_block.attentions.0.proj_in"].tensors["magnitude"].shape == (6,)


def test_two_magnitudes_on_one_layer_are_not_both_used_and_that_is_reported():
    said = {f"{PATH}.{suffix}": tensor for suffix, tensor in PLAIN.items()}
    said |= {f"{PATH}.dora_scale": torch.ones(6, 1), f"{PATH}.magnitude": torch.full((6,), 5.0)}
    assert KOHYA.load(said, {}).unused == {f"{PATH}.magnitude": f"it says the same as '{PATH}.dora_scale'"}


@pytest.mark.parametrize(
    ("there", "beside"),
    [
        (("lokr_w1", "lokr_w2"), ("lokr_w1_a", "lokr_w1_b")),
        (("lokr_w1", "lokr_w2"), ("lokr_w2_a", "lokr_w2_b")),
        (("oft_blocks",), ("oft_diag",)),
        (("oft_diag",), ("oft_R.weight",)),
    ],
)
def test_a_factor_that_stands_there_whole_and_in_parts_is_reported(there: tuple[str, ...], beside: tuple[str, ...]):
    tensors = {f"{PATH}.{suffix}": torch.ones(2, 2, 2)[0] for suffix in there + beside}
    parsed = KOHYA.load(tensors, {})
    assert set(parsed.unused) == set(tensors)
    assert all("one would do nothing" in why for why in parsed.unused.values())


def test_embeddings_of_a1111_bundled_with_an_adapter_are_tokens():
    bundled = {f"{PATH}.{suffix}": tensor for suffix, tensor in PLAIN.items()}
    vectors = torch.randn(2, 768)
    parsed = KOHYA.load(bundled | {"bundle_emb.my.cat.string_to_param.*": vectors}, {})
    assert (parsed.embeddings, parsed.unused) == ({"my.cat": {"text_encoder": vectors}}, {})
