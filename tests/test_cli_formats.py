"""`inspect` and `convert` as a person runs them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from lora_diffusion import Adapter, AdapterFileError, load_adapter, save_adapter
from lora_diffusion.cli.convert import convert
from lora_diffusion.cli.inspect import inspect
from lora_diffusion.cli.merge import merge
from lora_diffusion.cli.resize import resize
from lora_diffusion.errors import TargetError
from lora_diffusion.methods import METHODS, new_method
from tests import tiny
from tests.formats import random_adapters

app = typer.Typer()
for command in (inspect, convert, merge, resize):
    app.command()(command)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_adapter(random_adapters.over(tiny.sd(), "unet", "text_encoder"), tmp_path / "a.safetensors")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_inspect_says_what_a_file_is_and_where_it_goes(file: Path, tmp_path: Path):
    tiny.sd().save_pretrained(tmp_path / "base")
    code, said = run("inspect", file, "--base", tmp_path / "base", "--json")
    report = json.loads(said)
    assert (code, report["complete"], report["placed"]) == (0, True, len(load_adapter(file)))
    assert {row["block"] for row in report["spectra"]} >= {"mid_block", "encoder.layers.0"}
    assert "everything is used" in run("inspect", file)[1]


def test_inspect_reads_the_weights_that_a_strength_depends_on(tmp_path: Path):
    pipe = tiny.sd()
    pipe.save_pretrained(tmp_path / "base")
    name, layer = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("attn1.to_q"))
    adapter = Adapter("a", {"unet": {name: new_method("dora", rank=2).fresh(layer)}})
    adapter.layers["unet"][name].tensors["up"].normal_()
    path = save_adapter(adapter, tmp_path / "a.safetensors", format="kohya")
    code, said = run("inspect", path, "--base", tmp_path / "base", "--json")
    delta = METHODS["dora"].delta(adapter.layers["unet"][name], layer)
    (row,) = json.loads(said)["spectra"]
    assert (code, row["norm"]) == (0, pytest.approx(delta.norm().item(), rel=1e-4))
    assert json.loads(run("inspect", path, "--json")[1])["spectra"] == []


def test_what_a_file_says_steers_neither_the_table_nor_the_terminal(tmp_path: Path):
    from safetensors.torch import save_file

    tensors = {"unet.[/b].x.lora_A.weight": torch.ones(2, 4), "unet.[/b].x.lora_B.weight": torch.ones(4, 2)}
    tensors |= {"[/i]": torch.ones(1), "unet.[red]\x1b[2Jq": torch.ones(1), "<[/u]>": torch.ones(1, 8)}
    said = {"modelspec.trigger_phrase": "[red] \x1b[31m dog", "ss_network_module": "[/x]"}
    save_file(tensors, tmp_path / "[red].safetensors", metadata=said)
    for how in ([], ["--header"]):
        code, shown = run("inspect", tmp_path / "[red].safetensors", *how)
        assert code == (0 if how else 1)
        assert "\x1b[2J" not in shown
        assert "\x1b[31m" not in shown
        assert all(word in shown for word in ("[/i]", "[red] \\x1b[31m dog", "[/x]"))


def test_the_block_table_fits_eighty_columns(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("inspect", file)[1]
    lines = [line.split() for line in shown.splitlines()]
    assert ["block", "layers", "method", "rank", "alpha", "(from)", "parameters"] in lines
    assert "…" not in shown
    assert ["unet"] in lines


def test_inspect_goes_on_after_a_broken_file_and_ends_with_two(file: Path, tmp_path: Path):
    (tmp_path / "b.safetensors").write_bytes(b"<html>")
    code, said = run("inspect", tmp_path / "b.safetensors", file, "--json")
    first, second = map(json.loads, said.splitlines())
    assert (code, second["complete"]) == (2, True)
    assert "web page" in first["error"]


def test_a_file_of_which_something_is_unused_ends_with_one(file: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(file) | {"unet.stray": torch.ones(1)}, tmp_path / "b.safetensors")
    code, said = run("inspect", tmp_path / "b.safetensors", "--json")
    assert (code, json.loads(said)["unused"].keys()) == (1, {"unet.stray"})


def test_a_header_is_shown_without_torch(file: Path):
    program = (
        "import sys; from lora_diffusion.cli.inspect import inspect; from pathlib import Path;"
        f"inspect([Path({str(file)!r})], None, True, True); assert 'torch' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["methods"] == ["lora"]


@pytest.mark.parametrize("spelling", ["kohya", "comfy"])
def test_convert_there_and_back_is_the_same_adapter(file: Path, spelling: str, tmp_path: Path):
    pipe = tiny.sd()
    pipe.save_pretrained(tmp_path / "base")
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    code, _ = run("convert", file, there, "--to", spelling, "--base", tmp_path / "base")
    assert code == 0
    assert load_adapter(there).spelling == spelling
    run("convert", there, back, "--to", "diffusers", "--base", tmp_path / "base", "--json")
    assert load_adapter(back) == load_adapter(file)
    with pytest.raises(AdapterFileError, match="exists already"):
        run("convert", there, back, "--to", "diffusers", "--base", tmp_path / "base")


def test_convert_writes_a_peft_folder(tmp_path: Path):
    adapter = random_adapters.over(tiny.sd(), "unet")
    tiny.sd().save_pretrained(tmp_path / "base")
    source = save_adapter(adapter, tmp_path / "a.safetensors", format="kohya")
    code, said = run("convert", source, tmp_path / "folder", "--to", "peft", "--base", tmp_path / "base")
    assert code == 0, said
    again = load_adapter(tmp_path / "folder")
    assert (again, again.spelling) == (adapter, "peft")


def test_convert_replaces_a_peft_folder_only_when_asked_and_nothing_but_one(tmp_path: Path):
    base, folder = tmp_path / "base", tmp_path / "folder"
    tiny.sd().save_pretrained(base)
    source = save_adapter(random_adapters.over(tiny.sd(), "unet"), tmp_path / "a.safetensors")
    other = save_adapter(random_adapters.over(tiny.sd(), "unet", seed=1), tmp_path / "b.safetensors")
    assert run("convert", source, folder, "--to", "peft", "--base", base)[0] == 0
    with pytest.raises(AdapterFileError, match="exists already"):
        run("convert", other, folder, "--to", "peft", "--base", base)
    assert load_adapter(folder) == load_adapter(source)
    assert run("convert", other, folder, "--to", "peft", "--base", base, "--overwrite")[0] == 0
    assert load_adapter(folder) == load_adapter(other)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(AdapterFileError, match=r"more than a PEFT adapter \('notes.txt'\)"):
        run("convert", source, folder, "--to", "peft", "--base", base, "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "folder", "a.safetensors", "b.safetensors"}


def test_convert_names_the_spellings_that_are_written_and_writes_no_pickle(file: Path, tmp_path: Path):
    with pytest.raises(TargetError, match=r"did you mean 'kohya'.*'comfy', 'peft'"):
        run("convert", file, tmp_path / "b.safetensors", "--to", "koya")
    with pytest.raises(AdapterFileError, match=r"call it b.safetensors"):
        run("convert", file, tmp_path / "b.pt", "--to", "kohya")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("widths", [{"emb_params": 768}, {"clip_l": 768, "clip_g": 1280}])
def test_a_token_that_its_files_name_gives_stays_readable_elsewhere_and_keeps_its_name(
    widths: dict[str, int], tmp_path: Path
):
    from safetensors.torch import load_file, save_file

    tensors = {key: torch.randn(2, width) for key, width in widths.items()}
    save_file(tensors, tmp_path / "kiki.safetensors")
    run("convert", tmp_path / "kiki.safetensors", tmp_path / "b.safetensors", "--to", "embedding")
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    assert load_adapter(tmp_path / "b.safetensors").embeddings.keys() == {"kiki"}
    code, said = run("inspect", tmp_path / "b.safetensors")
    assert (code, "Stable Diffusion" in said, "kiki" in said) == (0, True, True)


def test_inspect_shows_the_hashes_by_which_others_know_the_file(file: Path):
    content = file.read_bytes()
    behind = content[8 + int.from_bytes(content[:8], "little") :]
    report = json.loads(run("inspect", file, "--json")[1])
    assert report["hashes"] == {
        "AutoV2": hashlib.sha256(content).hexdigest()[:10],
        "AutoV3": hashlib.sha256(behind).hexdigest()[:12],
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    shown = run("inspect", file)[1]
    assert f"AutoV2 {report['hashes']['AutoV2']}, AutoV3 {report['hashes']['AutoV3']}" in shown


def test_convert_reads_a_pickle_and_says_so(tmp_path: Path):
    torch.save({"<cat>": torch.ones(8)}, tmp_path / "a.bin")
    code, said = run("convert", tmp_path / "a.bin", tmp_path / "a.safetensors", "--to", "embedding")
    assert (code, "pickle" in said) == (0, True)
    assert load_adapter(tmp_path / "a.safetensors").embeddings["<cat>"]["text_encoder"].shape == (1, 8)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_names_of_a_checkpoint_are_not_written_where_diffusers_names_stand(to: str, tmp_path: Path):
    pair = random_adapters.low_rank(torch.nn.Linear(8, 6), 2, 1.0)
    wan = save_adapter(
        Adapter("wan", {"transformer": {"blocks.0.self_attn.q": pair}}), tmp_path / "wan.safetensors", format="comfy"
    )
    with pytest.raises(TargetError, match=r"'blocks\.0\.self_attn\.q' are layer names of the checkpoint.*--base"):
        run("convert", wan, tmp_path / "out", "--to", to)
    assert [path.name for path in tmp_path.iterdir()] == [wan.name]
    qwen = Adapter("qwen", {"transformer": {"transformer_blocks.0.attn.to_q": pair}})
    written = save_adapter(qwen, tmp_path / "qwen.safetensors", format="comfy")
    assert run("convert", written, tmp_path / "out", "--to", to)[0] == 0


def test_a_header_calls_tokens_by_their_name(tmp_path: Path):
    from safetensors.torch import save_file

    keys = ("<cat>", "emb_params", "bundle_emb.dog.clip_l", "stray")
    save_file({key: torch.ones(1, 768) for key in keys}, tmp_path / "a.safetensors")
    found = json.loads(run("inspect", tmp_path / "a.safetensors", "--header", "--json")[1])
    assert (found["tokens"], found["not an adapter's"]) == (["<cat>", "a", "dog"], ["stray"])


def test_a_file_of_which_nothing_is_used_is_an_error_that_says_why(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 4)}, tmp_path / "a.safetensors")
    code, said = run("inspect", tmp_path / "a.safetensors")
    assert (code, "lora needs up beside it" in " ".join(said.split())) == (2, True)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize(
    "layer", ["down_blocks.0.2.attention.attn.out_proj", "up_blocks.3.12.attention.attn.to_q", "layers.0.attention.qkv"]
)
def test_a_checkpoints_layer_is_known_whatever_number_its_block_has(layer: str, to: str, tmp_path: Path):
    pair = random_adapters.low_rank(torch.nn.Linear(8, 6), 2, 1.0)
    file = save_adapter(Adapter("a", {"transformer": {layer: pair}}), tmp_path / "a.safetensors", format="comfy")
    same = save_adapter(Adapter("b", {"transformer": {layer: pair}}), tmp_path / "b.safetensors", format="diffusers")
    for source in (file, *([same] if to == "peft" else [])):
        with pytest.raises(TargetError, match="layer names of the checkpoint"):
            run("convert", source, tmp_path / "out", "--to", to)


def test_language_models_are_written_as_their_tools_know_them_without_a_base_too(tmp_path: Path):
    from safetensors.torch import load_file

    pair = random_adapters.low_rank(torch.nn.Linear(2304, 6), 2, 1.0)
    layers = {
        "text_encoder": {"model.layers.0.self_attn.q_proj": pair},
        "transformer": {"layers.0.attention.qkv": pair},
    }
    file = save_adapter(Adapter("a", layers), tmp_path / "a.safetensors", format="comfy")
    run("convert", file, tmp_path / "b.safetensors", "--to", "kohya")
    assert "lora_te_layers_0_self_attn_q_proj.alpha" in load_file(tmp_path / "b.safetensors")


NAMES = {
    "sd": ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", (1024, 320)),
    "flux": ("transformer", "transformer_blocks.0.attn.to_q", (3072, 3072)),
}


@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfy"])
@pytest.mark.parametrize("family", NAMES)
def test_a_layer_of_two_names_is_merged_into_one(family: str, format: str, tmp_path: Path):
    component, name, widths = NAMES[family]
    layers = {name: random_adapters.low_rank(torch.nn.Linear(*widths), 2, 1.0)}
    if family == "flux":
        layers["single_transformer_blocks.0.proj_out"] = random_adapters.low_rank(torch.nn.Linear(15360, 3072), 1, 1.0)
    one = save_adapter(Adapter("a", {component: layers}), tmp_path / "one.safetensors", format="diffusers")
    two, both, read = (tmp_path / f"{part}.safetensors" for part in ("two", "both", "read"))
    run("convert", one, two, "--to", "comfy")
    assert run("merge", one, f"{two}:0.5", "--format", format, "-o", both)[0] == 0
    run("convert", both, read, "--to", "diffusers")
    merged = load_adapter(read).layers[component]
    assert merged.keys() >= layers.keys()
    for layer, share in merged.items():  # parts of a fused layer that nothing changes are zero
        found, expected = random_adapters.delta(share), random_adapters.delta(layers.get(layer, share))
        torch.testing.assert_close(found, 1.5 * expected if layer in layers else 0 * expected)


def test_a_resized_adapter_is_written_in_any_spelling(tmp_path: Path):
    _, name, widths = NAMES["sd"]
    layers = {name.replace(".", "_"): random_adapters.low_rank(torch.nn.Linear(*widths), 2, 1.0)}
    file = save_adapter(Adapter("a", {"unet": layers}), tmp_path / "a.safetensors", format="kohya")
    assert run("resize", file, "--rank", "1", "-o", tmp_path / "b.safetensors")[0] == 0
    assert load_adapter(tmp_path / "b.safetensors").layers["unet"].keys() == {name}
