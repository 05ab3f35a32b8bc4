"""The report of a run: one HTML file with everything in it, pictures too, that opens anywhere and asks for nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lora_diffusion.drafts import whole_file
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.files import load_adapter
from lora_diffusion.inspection.blocks import block_of, in_order
from lora_diffusion.inspection.charts import bar, lines, smoothed
from lora_diffusion.inspection.doctor import Verdict, diagnose, facts
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.results import TrainResult

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #18181b }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
svg text { font-size: 11px; fill: #52525b } img { max-width: 100% } .word { font-size: 1.4rem; font-weight: 600 }
code { font-size: 13px }
"""


def write_report(config: TrainConfig, result: TrainResult) -> tuple[Path, Verdict]:
    """Write OUTPUT/report.html on a finished run, and say what became of it. ConfigError for one that is not."""
    if result.adapter is None:
        raise ConfigError(f"the run in {config.output} is not finished; there is nothing to report yet")
    verdict = diagnose(result, load_adapter(result.adapter))
    parts = [
        f"<h1>{escape(config.name)}</h1>",
        f'<p class="word">{escape(verdict.word)}</p>{_list(verdict.said)}',
        _section("Result", _table(facts(result, verdict))),
        _section("Loss while training", _losses(result)),
        _section("Held-out loss by noise level, clean to noisy", _bands(result)),
        _section("Pictures", "".join(map(_picture, result.previews))) if result.previews else "",
        _section("Strength by block", _blocks(result, verdict)),
        _section("Left out of the pictures", _list(result.left_out)) if result.left_out else "",
        _section("Settings", _table(_flat(config.model_dump(mode="json")))),
    ]
    path = config.output / "report.html"
    head = f'<meta charset="utf-8"><title>{escape(config.name)}</title><style>{_STYLE}</style>'
    with whole_file(path) as draft:  # every process of a run may write it
        draft.write_text(f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>", "utf-8")
    return path, verdict


def _losses(result: TrainResult) -> str:
    window = max(1, len(result.losses) // 40)
    even = list(enumerate(smoothed(result.losses, window), 1))
    return lines([(f"training, mean of {window}", even), ("held out", list(result.measured))], "steps")


def _bands(result: TrainResult) -> str:
    named = (("base", result.bands_base), ("adapter", result.bands_adapter))
    return lines([(name, list(enumerate(bands, 1))) for name, bands in named], "band")


def _blocks(result: TrainResult, verdict: Verdict) -> str:
    squares: dict[tuple[str, str], float] = {}
    for component, names in result.weights.items():
        for name, norm in names.items():
            place = component, block_of(name)
            squares[place] = squares.get(place, 0.0) + norm**2
    found = sorted(verdict.blocks, key=lambda one: (one.component, in_order(one.block)))
    if not found:
        return "<p>This method has no low-rank pairs to take apart.</p>"
    shares = [one.norm / max(1e-12, squares.get((one.component, one.block), 0.0) ** 0.5) for one in found]
    most = max(shares) or 1.0
    rows = "".join(
        f"<tr><td>{escape(one.component)}</td><td>{escape(one.block)}</td><td>{one.layers}</td>"
        f"<td>{bar(share / most)} {share:.4f}</td><td>{one.effective_rank:.1f}</td></tr>"
        for one, share in zip(found, shares, strict=True)
    )
    heads = ("component", "block", "layers", "‖ΔW‖ / ‖W‖", "effective rank")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<h3>{escape(path.stem)}</h3><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines_ = (f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>" for name, value in rows)
    return f"<table>{''.join(lines_)}</table>"


def _list(said: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in said)}</ul>"
