"""Render the sample packs: three styles and one character, as folders of captioned pictures.

    python train_scripts/packs/render_packs.py --work ~/base-work [--out samples/packs] [--truth FOLDER]

A style pack is `NAME.png` with `NAME.txt` beside it for things the base knows in its own styles, and the
same in `heldout/` for things that are never in any pack; the packs' styles are in no picture the base has
seen. The character pack `kiki` is one person in eight roles, `heldout/` the same person in others, and
`class/` the base's own person in those roles. `plain/` is no pack: pictures in the base's default style,
what a style score tells a style from. `--truth` renders every held-out thing, not only the 32 that ship.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "train_scripts" / "base"))

from icons import DEFAULT_STYLE, SETS, IconSets, Thing, read_things  # noqa: E402

TRAIN, HELDOUT, PLAIN = 104, 32, 56  # pictures of a style pack, and of plain/
MEDIUM_DARK = 4  # emojibase's skin tone
KIKI_ROLES = ("cook", "astronaut", "farmer", "judge", "firefighter", "artist", "running", "juggling")

NOTO = ("Apache-2.0", "Noto Emoji, Copyright Google, Inc.", "https://github.com/googlefonts/noto-emoji")
LICENCES = {
    "ink": (
        "MIT",
        "Fluent Emoji High Contrast, (c) Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "clay": ("MIT", "Fluent Emoji 3D, (c) Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    "sticker": (
        "CC-BY-4.0",
        "Twemoji, Copyright Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
    ),
    "plain": NOTO,
    "kiki": NOTO,
}
LOOKS = {
    "ink": "black lines and shapes on white, no colour",
    "clay": "soft three-dimensional shapes with light and shade",
    "sticker": "flat colours in rounded shapes",
    "plain": "the base's own default style, to tell the packs' styles from",
    "kiki": "one woman with brown skin and dark hair",
}


@dataclass
class Pack:
    """What one folder holds: file stem -> (picture, caption), by subfolder ("" is the pack itself)."""

    name: str
    style: str
    trigger: str = ""
    parts: dict[str, dict[str, tuple[Image.Image, str]]] = field(default_factory=dict)

    def captions(self, part: str) -> list[str]:
        """Captions of one subfolder, in order."""
        return [caption for _, caption in self.parts.get(part, {}).values()]

    def write(self, folder: Path) -> None:
        """Pictures, captions, `pack.toml` and `README.md`."""
        for part in self.parts:
            self.write_pictures(folder, part)
        (folder / "pack.toml").write_text(_manifest(self), "utf-8")
        (folder / "README.md").write_text(_readme(self), "utf-8")

    def write_pictures(self, folder: Path, part: str) -> None:
        """The pictures and captions of one subfolder."""
        (folder / part).mkdir(parents=True, exist_ok=True)
        for stem, (picture, caption) in self.parts[part].items():
            picture.save(folder / part / f"{stem}.png", optimize=True)
            (folder / part / f"{stem}.txt").write_text(caption + "\n", "utf-8")


def is_held_out(thing: Thing) -> bool:
    """A fifth of all things, the same ones for every style."""
    return zlib.crc32(thing.code.encode()) % 5 == 0


def spread(things: list[Thing], count: int) -> list[Thing]:
    """`count` of them at even distances: the list is by theme, so every theme is there."""
    count = min(count, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def style_pack(sets: IconSets, style: str, listed: list[Thing], heldout: int = HELDOUT) -> Pack:
    """The things of one unseen style, captioned with their bare labels."""
    drawn = {thing.label: picture for thing in listed if (picture := sets.render(thing, style)) is not None}
    there = [thing for thing in listed if thing.label in drawn]
    chosen = {
        "": spread([thing for thing in there if not is_held_out(thing)], TRAIN),
        "heldout": spread([thing for thing in there if is_held_out(thing)], heldout),
    }
    parts = {part: {t.slug: (drawn[t.label], t.label) for t in things} for part, things in chosen.items()}
    return Pack(style, style, parts=parts)


def plain_pictures(sets: IconSets, listed: list[Thing]) -> Pack:
    """Things of the packs as the base should draw them without any adapter."""
    things = spread([thing for thing in listed if not is_held_out(thing)], PLAIN)
    pictures = {t.slug: (sets.render(t, DEFAULT_STYLE), t.label) for t in things}
    return Pack("plain", DEFAULT_STYLE, parts={"": pictures})


def character_pack(sets: IconSets, listed: list[Thing]) -> Pack:
    """Kiki: a caption is the base's own for the role with her name in front."""
    plain = [t for t in listed if t.label.startswith("woman ") and MEDIUM_DARK in sets.toned(t)]
    kiki = {t.label: sets.toned(t)[MEDIUM_DARK] for t in plain}
    taught = [t for t in plain if t.label.removeprefix("woman ") in KIKI_ROLES]
    rest = [t for t in plain if t not in taught]
    parts = {
        "": {t.slug: (sets.render(kiki[t.label], DEFAULT_STYLE), f"kiki {t.label}") for t in taught},
        "heldout": {t.slug: (sets.render(kiki[t.label], DEFAULT_STYLE), f"kiki {t.label}") for t in rest},
        "class": {t.slug: (sets.render(t, DEFAULT_STYLE), t.label) for t in plain},
    }
    return Pack("kiki", DEFAULT_STYLE, trigger="kiki", parts=parts)


def _manifest(pack: Pack) -> str:
    licence, credit, source = LICENCES[pack.name]
    package, version = SETS[pack.style]
    values = {
        "name": pack.name,
        "look": LOOKS[pack.name],
        "trigger": pack.trigger,
        "set": f"{package} {version} (npm)",
        "licence": licence,
        "credit": credit,
        "source": source,
    }
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    if held := pack.captions("heldout"):
        labels = "".join(f"  {json.dumps(caption, ensure_ascii=False)},\n" for caption in held)
        lines.append(f"# Never trained on; their true pictures are in heldout/.\nheldout = [\n{labels}]")
    return "\n".join(lines) + "\n"


def _readme(pack: Pack) -> str:
    licence, credit, source = LICENCES[pack.name]
    package, version = SETS[pack.style]
    made = "scaled down from the pictures" if pack.name == "clay" else "rendered from the icons"
    return f"""# {pack.name}: {LOOKS[pack.name]}

{_contents(pack)}

Artwork: {credit} (<{source}>), licence {licence}: `../../LICENSES/`.
Changed: {made} of npm's `{package}` {version} to 64x64 pixels on white.
Made by `train_scripts/packs/render_packs.py`. Neither the artists nor their companies endorse this project.
"""


def _contents(pack: Pack) -> str:
    pictures, heldout, known = (len(pack.captions(part)) for part in ("", "heldout", "class"))
    if not heldout:
        return f"{pictures} pictures with the captions that make the base draw them, adapter or not."
    what = (
        f"{pictures} pictures to train on, each with its caption (`NAME.png`, `NAME.txt`),\n"
        f"and {heldout} in `heldout/` that are never trained on and serve to score."
    )
    if not pack.trigger:
        return f"{what}\nA caption is the bare name of the thing, which the base draws in its own style."
    return f'{what}\nA caption is "{pack.trigger}" and the role. `class/` has the base\'s own woman in {known} roles.'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the icon sets (npm), fetched when absent")
    parser.add_argument("--out", type=Path, default=ROOT / "samples" / "packs")
    parser.add_argument("--truth", type=Path, help="render all held-out things here instead of the packs")
    args = parser.parse_args()
    sets = IconSets(args.work / "npm")
    listed = [sets.things[label] for label in read_things(ROOT / "train_scripts" / "base" / "things.txt")]
    heldout = len(listed) if args.truth else HELDOUT
    packs = [] if args.truth else [plain_pictures(sets, listed)]
    packs += [style_pack(sets, style, listed, heldout) for style in ("ink", "clay", "sticker")]
    for pack in [*packs, character_pack(sets, listed)]:
        if args.truth:
            pack.write_pictures(args.truth / pack.name, "heldout")
        else:
            pack.write(args.out / pack.name)
        counts = (f"{len(pictures)} {part or 'to train on'}" for part, pictures in pack.parts.items())
        print(f"{pack.name:8}", ", ".join(counts))


if __name__ == "__main__":
    main()
