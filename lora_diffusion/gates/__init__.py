"""Weight specifications: what a user says about an adapter's strength, the same in Python, prompt and terminal.

0.8                                          everywhere; any finite number
{"unet": 1.0, "text_encoder": 0.5}           by component; "denoiser", "te", "te2" are short names; others 0
{"unet": 1.0, "down": 0.5, "up.0-1": 0.2}    by block; the name that covers the fewest layers wins
{"unet.*.attn2.to_*": 1.0}                   by glob over layer names
"0@0,1@0.5"                                  over the run: keyframes value@progress, joined by straight lines
"0.8@0.2-0.6"                                inside a window of progress, else 0
lambda progress: 1 - progress                any function of progress in [0, 1]
[0.8, 0.2, 0.0]                              by image of the batch
Region("mask.png", 0.8)                      by place in the picture; Region("0-0.5,0-1") is its left half

They nest: a mapping may hold schedules, lists and regions; a list may hold mappings. As text, in options and prompts:
`0.8`, `0@0,1@0.5`, `te=0.5:unet=1`, and a region of any of these `0.8:mask=left.png`, `te=0:unet=1:mask=0-0.5,0-1`.
"""

from lora_diffusion.gates.blocks import blocks_of
from lora_diffusion.gates.levels import (
    Call,
    Level,
    at_image,
    entry_gate,
    has_places,
    images_of,
    is_live,
    is_steady,
    number_at,
)
from lora_diffusion.gates.masks import Region
from lora_diffusion.gates.resolving import ALIASES, Resolved, Weight, resolve_weight
from lora_diffusion.gates.schedules import Keyframes, Window, linear, parse_schedule, window
from lora_diffusion.gates.spelling import parse_weight, read_weight, show_weight, spell_weight, times

__all__ = [
    "ALIASES",
    "Call",
    "Keyframes",
    "Level",
    "Region",
    "Resolved",
    "Weight",
    "Window",
    "at_image",
    "blocks_of",
    "entry_gate",
    "has_places",
    "images_of",
    "is_live",
    "is_steady",
    "linear",
    "number_at",
    "parse_schedule",
    "parse_weight",
    "read_weight",
    "resolve_weight",
    "show_weight",
    "spell_weight",
    "times",
    "window",
]
