"""AdaLoRA in a PEFT folder: an SVD in form, read as the plain LoRA that it is.

base_model.model.<layer>.lora_A (r, in · kh · kw), .lora_B (out, r), .lora_E (r, 1)
adapter_config.json              peft_type ADALORA, init_r, lora_alpha

    ΔW = lora_alpha / (init_r + 1e-5) · B (E · A)        as PEFT computes it; r is what is left of init_r
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lora_diffusion.errors import AdapterFileError, some

_VALUES = ".lora_E"


def with_values_inside(tensors: Mapping[str, Tensor], *, is_adalora: bool) -> dict[str, Tensor]:
    """Pairs alone: `lora_A` times its values, without the layers of which no rank is left.

    AdapterFileError for values without the folder's config, which has the scale, and for such as do not fit.
    """
    layers = [key.removesuffix(_VALUES) for key in tensors if key.endswith(_VALUES)]
    if not layers:
        return dict(tensors)
    if not is_adalora:
        raise AdapterFileError(
            f"values of an AdaLoRA ({some([layer + _VALUES for layer in layers])}) without the folder's"
            " adapter_config.json of peft_type 'ADALORA', which has their scale"
        )
    pairs = {key: tensor for key, tensor in tensors.items() if not key.endswith(_VALUES)}
    for layer in layers:
        down, values = pairs.get(f"{layer}.lora_A"), tensors[f"{layer}{_VALUES}"]
        if down is None or down.dim() != 2 or values.numel() != down.shape[0]:
            found = None if down is None else tuple(down.shape)
            raise AdapterFileError(f"{layer}: lora_A {found} and lora_E {tuple(values.shape)} do not fit")
        if values.numel():
            pairs[f"{layer}.lora_A"] = values.reshape(-1, 1).to(down.dtype) * down
        else:
            del pairs[f"{layer}.lora_A"]
            pairs.pop(f"{layer}.lora_B", None)
    return pairs
