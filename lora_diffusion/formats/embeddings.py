"""Learned tokens (textual inversion, pivotal tuning): alone in a file, or bundled with an adapter.

{"<cat>": (768) or (n, 768)}                       Diffusers
{"emb_params": (n, 768)}                           kohya, A1111; the token is the file's name
{"clip_l": (n, 768), "clip_g": (n, 1280)}          SDXL and later; the token is the file's name, or, in files written
                                                   here, what the metadata call it
{"text_encoders_0": …, "text_encoders_1": …}       cog-sdxl's .pti
bundle_emb.<token>.clip_l                          OneTrainer, Civitai: inside an adapter's file
bundle_emb.<token>.string_to_param.*               A1111's own embeddings, bundled with an adapter
<s1>                                               cloneofsimo/lora: inside an adapter's file
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from lora_diffusion.adapter import Adapter
from lora_diffusion.errors import AdapterFileError, some
from lora_diffusion.formats import Parsed
from lora_diffusion.formats.keys import TOKEN_ENCODERS, UNNAMED, is_bracketed, token_of

#: metadata key: what the token is called in a file that does not name it
TOKEN = "lora_diffusion.token"

_SHORT = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5", "text_encoder_4": "llama"}
_MAX_WIDTH = 16_384


def take_embeddings(
    tensors: Mapping[str, Tensor], unused: dict[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(token -> component -> vectors, the other tensors). What is no vector goes to `unused` with the reason."""
    embeddings: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = token_of(key)
        if not found:
            rest[key] = tensor
            continue
        token, encoder = found
        if encoder.endswith("_out"):
            unused[key] = "vectors behind the text encoder have no place in a Diffusers pipeline"
        elif encoder not in TOKEN_ENCODERS or not _are_vectors(tensor):
            unused[key] = f"shape {tuple(tensor.shape)} under {encoder!r} is no token's vectors"
        elif TOKEN_ENCODERS[encoder] in embeddings.setdefault(token, {}):
            unused[key] = f"another tensor is {token or 'the token'!r} of {TOKEN_ENCODERS[encoder]} already"
        else:
            embeddings[token][TOKEN_ENCODERS[encoder]] = tensor if tensor.ndim == 2 else tensor[None]
    return {token: vectors for token, vectors in embeddings.items() if vectors}, rest


def bundled(embeddings: Mapping[str, Mapping[str, Tensor]], who: str) -> dict[str, Tensor]:
    """The tensors under which an adapter's file carries its tokens. AdapterFileError for other components."""
    homeless = sorted({component for vectors in embeddings.values() for component in vectors} - _SHORT.keys())
    if homeless:
        raise AdapterFileError(f"{who}: no spelling has a name for tokens of {some(homeless)}")
    return {
        f"bundle_emb.{token}.{_SHORT[component]}": tensor
        for token, vectors in embeddings.items()
        for component, tensor in vectors.items()
    }


class Embedding:
    """Files of learned tokens and nothing else; written in the Diffusers way, or A1111's where that cannot say them."""

    name = "embedding"
    writes = True

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether every tensor is a token's."""
        return bool(keys) and all(token_of(key) for key in keys)

    def load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parsed:
        """Embeddings alone. A token that only the file's name tells is `UNNAMED`."""
        parsed = Parsed(layers={})
        parsed.embeddings, rest = take_embeddings(tensors, parsed.unused)
        parsed.unused |= dict.fromkeys(rest, "no token's vectors are spelled like that")
        if metadata.get(TOKEN) and UNNAMED in parsed.embeddings:
            parsed.embeddings[metadata[TOKEN]] = parsed.embeddings.pop(UNNAMED)
        return parsed

    def dump(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata. AdapterFileError for an adapter with layers, and for one without tokens."""
        who = f"adapter {adapter.name!r}"
        if len(adapter) or not adapter.embeddings:
            raise AdapterFileError(f"{who}: an embedding file holds tokens alone; it has {len(adapter)} layers")
        plain = all(vectors.keys() == {"text_encoder"} for vectors in adapter.embeddings.values())
        if plain and all(map(is_bracketed, adapter.embeddings)):
            return {token: vectors["text_encoder"] for token, vectors in adapter.embeddings.items()}, adapter.metadata
        tensors = bundled(adapter.embeddings, who)
        if len(adapter.embeddings) > 1:
            return tensors, dict(adapter.metadata)
        (token,) = adapter.embeddings  # A1111 and ComfyUI know one token a file, by the file's name
        alone = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
        return {"emb_params": alone["clip_l"]} if plain else alone, {**adapter.metadata, TOKEN: token}


EMBEDDING = Embedding()


def _are_vectors(tensor: Tensor) -> bool:
    width = tensor.shape[-1] if tensor.ndim in (1, 2) else 0
    return tensor.is_floating_point() and 1 <= width <= _MAX_WIDTH and tensor.numel() > 0
