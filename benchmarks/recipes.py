"""The two recipes against each other, and each default of them alone, on a style pack and a character pack.

    python benchmarks/recipes.py --whole             # 4 runs over samples/base, a quarter of an hour on one core
    python benchmarks/recipes.py                     # 12: also each group of defaults alone
    python benchmarks/recipes.py --steps 2 --out /tmp/try

Every run of a pack has the same pictures, word, seed, steps, batch and learning rate; what differs is the recipe, or
one group of its defaults taken from the other recipe. The base has attention at its lowest resolution alone, where no
look can be learned, so both adapt convolutions too. Judged by the held-out loss and by what the packs are for:

    score      with the word: how far pictures of held-out things are from the other look (0) to the pack's (1)
    error      with the word: mean absolute difference from the true pictures, of 255 levels
    leak       without the word: the same score, which is 0 where the word alone brings the look
    drift      without the word: mean absolute difference from what the base draws there, of 255 levels
    elsewhere  the drift on other things

Writes recipes.json beside itself, and OUT/ink.png and OUT/kiki.png to look at. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from timing import write

from lora_diffusion import AdapterStack, TrainConfig, train
from lora_diffusion.data.examples import find_examples
from lora_diffusion.data.pictures import open_picture
from lora_diffusion.generating import Drawing, draw, reconstructed
from lora_diffusion.inspection.style import StyleProbe
from lora_diffusion.pipelines import load_for_drawing
from lora_diffusion.sheet import contact_sheet, write_picture
from lora_diffusion.training.recipes import RECIPES

SAMPLES = Path(__file__).parents[1] / "samples"
SIDE, DRAWN, SHOWN, ELSEWHERE = 64, 16, 6, 12  # pixels of a picture; held-out things drawn, shown; other things drawn
HOW = Drawing(12, 1.5, (SIDE, SIDE), batch=16)
#: settings that are taken from the other recipe together
GROUPS: dict[str, tuple[str, ...]] = {
    "layers and rank": ("adapter.targets", "adapter.rank"),
    "times": ("times.emphasis",),
    "captions and flip": ("data.caption_dropout", "data.flip"),
    "prior": ("prior.kind",),
    "average": ("train.ema",),
}
WITHOUT: dict[str, Any] = {"prior.kind": "none", "train.ema": None}  # in the recipe that says nothing of it


@dataclass(frozen=True)
class Pack:
    """Pictures to learn, the word for them, and pictures of the look that they are told from."""

    name: str
    own: str  # the recipe for it
    word: str
    subject: str  # what the word is one of
    other: Path
    lr: float  # as in train_scripts/configs

    def called(self, caption: str) -> str:
        """A caption with the word; the base knows its own styles as "house, blob style"."""
        return caption if self.word in caption else f"{caption}, {self.word}"

    def plain(self, caption: str) -> str:
        """The same thing without the word."""
        return caption.replace(self.word, self.subject) if self.word in caption else caption


PACKS = (
    Pack("ink", "style", "ink style", "flat style", SAMPLES / "packs/plain", 2e-3),
    Pack("kiki", "character", "kiki woman", "woman", SAMPLES / "packs/kiki/class", 1e-3),
)


@dataclass(frozen=True)
class Trial:
    """One run: a recipe, with one group of its defaults from the other recipe or with none."""

    recipe: str
    swapped: str | None = None

    @property
    def name(self) -> str:
        """As a folder."""
        return self.recipe + (f" but {self.swapped}" if self.swapped else "")


def trials(pack: Pack) -> list[Trial]:
    """Both recipes, then the pack's own with each group of the other's defaults."""
    return [*map(Trial, RECIPES), *(Trial(pack.own, group) for group in GROUPS if _swaps(pack.own, group))]


def _swaps(recipe: str, group: str) -> dict[str, Any]:
    """Settings of `group` as the other recipe has them, where the two differ."""
    other = next(name for name in RECIPES if name != recipe)
    mine, theirs = (
        {f"{section}.{key}": value for section, values in RECIPES[name].items() for key, value in values.items()}
        for name in (recipe, other)
    )
    if not mine.keys() & set(GROUPS[group]):
        return {}
    return {key: theirs.get(key, WITHOUT.get(key)) for key in GROUPS[group]}


def settings(pack: Pack, trial: Trial, folder: Path, steps: int) -> dict[str, Any]:
    """The configuration of a run."""
    swapped = _swaps(trial.recipe, trial.swapped) if trial.swapped else {}
    given: dict[str, Any] = {
        "name": pack.name,
        "recipe": trial.recipe,
        "base": str(SAMPLES / "base"),
        "output": str(folder),
        "data": {
            "folder": str(folder.parent / "pictures"),
            "heldout": str(folder.parent / "heldout"),
            "resolution": SIDE,
            "trigger": pack.word,
        },
        "train": {"steps": steps, "batch": 8, "lr": pack.lr, "schedule": "cosine"},
    }
    if swapped.get("prior.kind", RECIPES[trial.recipe].get("prior", {}).get("kind")) == "teacher":
        given["prior"] = {"subject": pack.subject}
    for key, value in swapped.items():
        section, name = key.split(".")
        given.setdefault(section, {})[name] = value
    adapter = given.setdefault("adapter", {})
    adapter["targets"] = f"{adapter.get('targets', RECIPES[trial.recipe]['adapter']['targets'])}+conv"
    return given


class Gallery:
    """A pack's held-out pictures, the probe for its look, and what the base draws without an adapter."""

    def __init__(self, pack: Pack) -> None:
        self.pack, self.pipe = pack, load_for_drawing(SAMPLES / "base", "fp32", "cpu").pipe
        folder = SAMPLES / "packs" / pack.name
        heldout = find_examples(folder / "heldout")[:DRAWN]
        self.captions = [example.caption for example in heldout]
        self.true = self._through_the_vae([example.picture for example in heldout])
        known = self._through_the_vae(sorted(folder.glob("*.png")))
        looks = known if len(known) > 2 * DRAWN else self._through_the_vae(sorted(folder.rglob("[!c]*/*.png")))
        self.probe = StyleProbe.fit(looks, self._through_the_vae(sorted(pack.other.glob("*.png"))))
        things = [example.caption for example in find_examples(SAMPLES / "packs/plain")][:ELSEWHERE]
        self.prompts = {
            "with": [pack.called(caption) for caption in self.captions],
            "without": [pack.plain(caption) for caption in self.captions],
            "elsewhere": things,
        }
        self.base = self._drawn()

    def judge(self, adapter: Path) -> tuple[dict[str, float], dict[str, list[Image.Image]]]:
        """Measures and pictures of an adapter."""
        with AdapterStack(self.pipe) as stack:
            stack.add(adapter)
            drawn = self._drawn()
        return self.measures(drawn), drawn

    def measures(self, drawn: dict[str, list[Image.Image]]) -> dict[str, float]:
        """As the head of this file has them."""
        return {
            "score": self.probe.score(drawn["with"]),
            "error": difference(drawn["with"], self.true),
            "leak": self.probe.score(drawn["without"]),
            "drift": difference(drawn["without"], self.base["without"]),
            "elsewhere": difference(drawn["elsewhere"], self.base["elsewhere"]),
        }

    def _drawn(self) -> dict[str, list[Image.Image]]:
        return {name: draw(self.pipe, prompts, range(len(prompts)), HOW) for name, prompts in self.prompts.items()}

    def _through_the_vae(self, paths: Sequence[Path]) -> list[Image.Image]:
        return reconstructed(self.pipe, [open_picture(path) for path in paths], (SIDE, SIDE))


def difference(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> float:
    """Mean absolute difference of pictures, of 255 levels."""
    pairs = zip(first, second, strict=True)
    return fmean(float(np.abs(np.float32(a.convert("RGB")) - np.float32(b.convert("RGB"))).mean()) for a, b in pairs)


def run(pack: Pack, trial: Trial, out: Path, steps: int, gallery: Gallery) -> dict[str, Any]:
    """Train and judge, or read what was found; KeyboardInterrupt where it was interrupted."""
    folder = out / pack.name / trial.name
    kept = folder / "result.json"
    if kept.is_file():
        return json.loads(kept.read_text("utf-8"))
    done = train(TrainConfig.parse(settings(pack, trial, folder, steps)))
    if done.adapter is None:
        raise KeyboardInterrupt
    losses = {"heldout_base": done.heldout_base, "heldout": done.heldout_adapter}
    measures, drawn = gallery.judge(done.adapter)
    for name in ("with", "without"):
        for number, picture in enumerate(drawn[name][:SHOWN]):
            write_picture(picture, folder / f"{name}-{number}.png")
    found = {"recipe": trial.recipe, "swapped": trial.swapped, **losses, **measures}
    found |= {"parameters": done.parameters, "seconds": done.seconds}
    kept.write_text(json.dumps(found), "utf-8")
    return found


def sheet(gallery: Gallery, out: Path) -> None:
    """What the base and the recipes that have run draw of the first held-out things, with the word and without."""
    pack = gallery.pack
    names = [trial.name for trial in trials(pack)[:2] if (out / pack.name / trial.name / "result.json").is_file()]
    columns = [("true", gallery.true), ("base", gallery.base["with"])]
    for name in names:
        for kind in ("with", "without"):
            pictures = [Image.open(out / pack.name / name / f"{kind}-{number}.png") for number in range(SHOWN)]
            columns.append((f"{name} {kind}", pictures))
    rows = [[pictures[number] for _, pictures in columns] for number in range(SHOWN)]
    title = f"{pack.name}, with and without {pack.word!r}"
    made = contact_sheet(rows, gallery.captions[:SHOWN], [name for name, _ in columns], title=title)
    write_picture(made, out / f"{pack.name}.png")


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--whole", action="store_true", help="the recipes as they are, and no swaps")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    given = parser.parse_args()
    galleries = [_gallery(pack, given.out) for pack in PACKS]
    rows = {gallery.pack.name: [{"recipe": None} | gallery.measures(gallery.base)] for gallery in galleries}
    todo = [[(gallery, trial) for trial in trials(gallery.pack)] for gallery in galleries]
    swaps = [] if given.whole else [*todo[1][2:], *todo[0][2:]]
    for gallery, trial in [*todo[0][:2], *todo[1][:2], *swaps]:
        rows[gallery.pack.name].append(run(gallery.pack, trial, given.out, given.steps, gallery))
        write(__file__, {"steps": given.steps, "packs": rows})
        if trial.swapped is None:
            sheet(gallery, given.out)


def _gallery(pack: Pack, out: Path) -> Gallery:
    """The gallery of a pack, whose pictures lie below OUT with the word in their captions."""
    for name, source in (("pictures", ""), ("heldout", "heldout")):
        folder = out / pack.name / name
        folder.mkdir(parents=True, exist_ok=True)
        for picture in (SAMPLES / "packs" / pack.name / source).glob("*.png"):
            shutil.copy(picture, folder)
            caption = picture.with_suffix(".txt").read_text("utf-8").strip()
            (folder / f"{picture.stem}.txt").write_text(pack.called(caption), "utf-8")
    return Gallery(pack)


if __name__ == "__main__":
    main()
