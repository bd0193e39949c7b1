"""An export loads everywhere, is the base model when unpruned, and is written whole or not at all."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, picture, spread_weights
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from vlmpruner import export
from vlmpruner.export import export_model, main


TESTS = Path(__file__).parent
LLAVA = FAMILIES["llava"].checkpoint
SHARD, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def exported(family, tmp_path_factory):
    return export_model(family.checkpoint, tmp_path_factory.mktemp("exports") / "pruned-model", report=lambda line: None)


@pytest.fixture(scope="module")
def python(fresh_python, tmp_path_factory):
    """Runs a script in a process that knows nothing of the project."""

    def run(*words, cwd: Path) -> str:
        done = fresh_python.run(*words, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.picture = tmp_path_factory.mktemp("picture") / "picture.png"
    picture(1).save(run.picture)
    return run


@pytest.fixture
def base(tmp_path):
    """A copy of the LLaVA checkpoint that a test may damage."""
    return Path(shutil.copytree(LLAVA, tmp_path / "base"))


@pytest.fixture
def lines():
    return []


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process and gives (exit status, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


def quietly(*arguments, **kwargs) -> Path:
    return export_model(*arguments, report=lambda line: None, **kwargs)


def split_in_two(base: Path) -> None:
    """Make the one shard of a checkpoint two, with an index."""
    tensors = load_file(base / SHARD)
    (base / SHARD).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, base / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def snippets(repo: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), flags=re.DOTALL)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.between
def test_loads_everywhere_and_is_the_base_when_unpruned(family, exported, python, tmp_path):
    output = python(TESTS / "load_repo.py", exported, family.checkpoint / "expected.safetensors", python.picture, cwd=tmp_path)
    result = json.loads(output.splitlines()[-1])
    name = "transformers_modules." + family.pruned_class.__name__.removesuffix("ForConditionalGeneration")
    for loaded in (result["first"], result["second"]):
        assert loaded["AutoConfig"] == f"{name}Config"
        assert loaded["AutoProcessor"] == f"{name}Processor"
        for auto in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
            assert loaded[auto] == f"{name}ForConditionalGeneration"
            assert loaded[f"{auto} keys"] == []
    assert all(refused is True for refused in result["without_trust"].values()), result["without_trust"]
    assert result["unpruned"]["same_tokens"]
    assert result["unpruned"]["logits_error"] < 1e-4
    assert not result["unpruned"]["record"]
    assert result["pipeline"] == {
        "model": f"{name}ForConditionalGeneration",
        "processor": f"{name}Processor",
        "chat": "assistant",
        "plain": True,
    }
    saved = result["saved"]
    assert saved["classes"] == [f"{name}ForConditionalGeneration", f"{name}Processor"]
    assert saved["keys"] == []
    assert saved["ratio"] == 0.889
    assert saved["same_logits"]
    assert saved["kept"] and all(num_kept == round(num_visual * (1 - 0.889)) for num_kept, num_visual in saved["kept"])
    assert not result["project_was_imported"]


@pytest.mark.once
def test_snippets_of_the_card_run(family, exported, python, tmp_path):
    code = "\n".join(snippets(exported))
    address = re.search(r"https://\S+\.JPG", code).group()
    script = tmp_path / "snippets.py"
    script.write_text(code.replace(address, str(python.picture)))
    python(script, cwd=exported.parent)
    assert (exported.parent / "kept.png").stat().st_size > 0


def test_card_states_what_the_hub_needs(exported):
    data = ModelCard.load(exported / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-text-to-text"
    assert data.tags == ["custom_code", "vlm-pruner"]
    assert data.base_model is None
    assert data.license is None
    assert str(exported.parent) not in (exported / "README.md").read_text()


NO_BUSINESS = {
    "modules": {
        *("aiohttp", "asyncio", "ctypes", "ftplib", "http", "httpx", "importlib", "marshal", "multiprocessing", "pickle"),
        *("requests", "runpy", "smtplib", "socket", "ssl", "subprocess", "urllib", "webbrowser", "xmlrpc"),
    },
    "calls": {"__import__", "compile", "eval", "exec", "execfile", "execv", "execve", "popen", "system", "spawnv", "urlopen"},
}


def business(code: str) -> set[str]:
    """What a file does that no code of an export may do: modules that it imports, functions that it calls."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names} & NO_BUSINESS["modules"]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module.split(".")[0]} & NO_BUSINESS["modules"]
            if node.module.startswith("huggingface_hub") and node.module != "huggingface_hub.dataclasses":
                found.add(node.module)
        elif isinstance(node, ast.Call):
            function = node.func
            name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", None)
            is_of_a_library = isinstance(function, ast.Attribute) and ast.unparse(function) in ("torch.compile", "re.compile")
            is_mode = isinstance(function, ast.Attribute) and name == "eval" and not node.args and not node.keywords
            found |= set() if is_of_a_library or is_mode else {name} & NO_BUSINESS["calls"]
    return found


@pytest.mark.once
def test_exported_code_is_what_the_card_says(tmp_path):
    """It opens no connection and evaluates no strings, and the card names every file of it."""
    repo = quietly(LLAVA, tmp_path / "out")
    card = (repo / "README.md").read_text()
    for path in repo.glob("*.py"):
        assert business(path.read_text()) == set(), path.name
        assert f"`{path.name}`" in card
    for line in ("import socket", "from urllib.request import urlopen", "eval('1')", "torch.eval('1')", "os.system('ls')"):
        assert business(line), line
    assert not business("import torch\ntorch.compile(f)\nmodel.eval_batch()\nmodel.eval()")


@pytest.mark.once
def test_measured_results_are_on_the_card_of_their_weights_alone(tmp_path):
    results = export.ROOT / "benchmarks" / "results" / "accuracy.json"
    repo = quietly(export.ROOT, tmp_path / "out", results=results)
    card = (repo / "README.md").read_text()
    rows = re.findall(r"^\| (\w[^|]*) \|", card, re.MULTILINE)
    assert set(rows) == {"method", "unpruned", "vlm_pruner", "vlm_pruner, fine", "random"}
    measured = results.with_suffix(".md").read_text()
    assert all(line in measured for line in card.splitlines() if line.startswith("| vlm_pruner"))
    assert "## Measured" not in (quietly(export.ROOT, tmp_path / "without") / "README.md").read_text()
    with pytest.raises(ValueError, match=r"accuracy\.json were measured with other weights than those of llava"):
        quietly(LLAVA, tmp_path / "other", results=results)
    assert not (tmp_path / "other").exists()
    for name, content, message in (
        ("absent", None, r"absent\.md, the table of the results .*absent\.json, can not be read"),
        ("other", "# Notes\n\ntext\n", r"other\.md is no table"),
    ):
        if content:
            (tmp_path / f"{name}.md").write_text(content)
        with pytest.raises(ValueError, match=message):
            quietly(export.ROOT, tmp_path / "refused", results=tmp_path / f"{name}.json")
    (tmp_path / "bare.md").write_text(measured)
    (tmp_path / "bare.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bare\.json is no JSON that benchmarks/accuracy.py wrote"):
        quietly(export.ROOT, tmp_path / "refused", results=tmp_path / "bare.json")
    with pytest.raises(ValueError, match="A base model is not pruned"):
        quietly(repo, tmp_path / "refused", to_base=True, results=results)


def test_weights_are_the_same_file(family, exported):
    assert os.stat(exported / SHARD).st_ino == os.stat(family.checkpoint / SHARD).st_ino


def test_weights_are_copied_across_file_systems(tmp_path, lines, monkeypatch):
    def refuse(*arguments):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    repo = export_model(LLAVA, tmp_path / "out", report=lines.append)
    assert (repo / SHARD).read_bytes() == (LLAVA / SHARD).read_bytes()
    assert os.stat(repo / SHARD).st_ino != os.stat(LLAVA / SHARD).st_ino
    assert any("copying" in line for line in lines)


def test_shards_and_index(base, tmp_path, lines):
    split_in_two(base)
    repo = export_model(base, tmp_path / "out", report=lines.append)
    for name in (INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (repo / name).read_bytes() == (base / name).read_bytes()
    assert [line for line in lines if line.startswith("[1/2]")] and [line for line in lines if line.startswith("[2/2]")]


def test_files_of_the_repo(exported):
    code = {path.name for path in exported.glob("*.py")}
    assert {path.name for path in exported.iterdir()} - code == {
        ".vlmpruner_export.json",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {"configuration_vlmpruner.py", "processing.py", "token_pruning.py", "pruned_decoder.py"} <= code
    assert not {"export.py", "demo.py"} & code
    assert not [path for path in exported.glob("*.json") if str(export.ROOT) in path.read_text()]
    for name in code:
        assert (exported / name).read_bytes() == (export.ROOT / name).read_bytes()


def test_tokenizer_is_the_base_ones_whatever_class_its_files_name(base, tmp_path):
    """The library overrides the tokenizer class in the files of `llava` models, because it is wrong in public checkpoints, but
    it can not know that of our model type. Copied files gave another tokenizer, with other tokens and no error."""
    edit_json(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(base)
    exported_tokenizer = AutoTokenizer.from_pretrained(quietly(base, tmp_path / "out"), trust_remote_code=True)
    text = "What is on the sign, a word or two words?  Answer\nnow."
    assert type(exported_tokenizer) is type(tokenizer)
    assert exported_tokenizer(text).input_ids == tokenizer(text).input_ids
    assert "local_files_only" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


@pytest.mark.once
def test_a_legacy_tokenizer_of_llama_stays_one(tmp_path):
    """It begins a piece of text behind each special token with a space. The library does not save that it is legacy."""
    base = Path(shutil.copytree(FAMILIES["llava_next_video"].checkpoint, tmp_path / "base"))
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<video>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary = {word: id for id, word in enumerate(words + list(map(chr, range(33, 127))))}
    special = {"pad_token": "<pad>", "additional_special_tokens": ["<image>", "<video>"]}
    LlamaTokenizer(vocab=vocabulary, merges=[], **special).save_pretrained(base)
    edit_json(base / "tokenizer_config.json", legacy=True)
    text = "What is it?<image>in the picture"
    ids, others = (AutoTokenizer.from_pretrained(base, **options)(text).input_ids for options in ({}, {"legacy": False}))
    assert ids != others
    exported = quietly(base, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(exported, trust_remote_code=True)(text).input_ids == ids


@pytest.mark.once
def test_a_tokenizer_that_is_another_when_saved_is_refused(base, tmp_path, monkeypatch):
    def save_otherwise(self, folder, *args, **kwargs):
        saved = save_pretrained(self, folder, *args, **kwargs)
        edit_json(Path(folder) / "tokenizer.json", normalizer={"type": "Lowercase"})
        return saved

    save_pretrained = PreTrainedTokenizerBase.save_pretrained
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_otherwise)
    with pytest.raises(ValueError, match=r"The tokenizer of base, a \w+, makes \[.*\] of .*, but \[.*\] after it was saved"):
        quietly(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.once
def test_a_path_that_is_no_utf8_is_named(tmp_path, command):
    """The library's tokenizers open none, which read as if the base's files were broken."""
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    for arguments in ((LLAVA, "--output", bad), (bad, "--output", tmp_path / "out")):
        status, out, error = command(*arguments)
        assert (status, out) == (2, "")
        assert re.search(r"The path b'.*caf\\xe9' is no UTF-8, and tokenizers need one that is", error)


def key_of(flag: str) -> str:
    return "pruning_" + flag.removeprefix("--").replace("-", "_")


def test_every_key_is_a_flag(command, tmp_path):
    flags = {
        "--method": "none",
        "--ratio": 0.5,
        "--layer": 3,
        "--num-pivots": 5,
        "--num-channels": 32,
        "--threshold": 0.7,
        "--threshold-step": 0.2,
        "--spatial-weight": 0.25,
        "--token-batch": 8,
        "--aggregation-weight": 1.0,
    }
    arguments = [argument for pair in flags.items() for argument in pair]
    status, output, error = command(LLAVA, "--output", tmp_path / "out", *arguments, "--no-fill-budget")
    assert (status, error) == (0, "")
    assert "pruning is switched off" in output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pruning_fill_budget"] is False
    for flag, value in flags.items():
        assert config[key_of(flag)] == value
    options = re.findall(r"(?<!\S)--[a-z-]+", export.argument_parser().format_help())
    assert {field.name for field in export.pruning_fields()} <= {key_of(flag) for flag in options}


def test_an_export_can_be_exported_again(tmp_path):
    first = quietly(LLAVA, tmp_path / "first", pruning_ratio=0.5, pruning_layer=3)
    card = (first / "README.md").read_text()
    (first / "README.md").write_text(card.replace("library_name", "base_model: someone/base\nlicense: mit\nlibrary_name", 1))
    second = quietly(first, tmp_path / "second", pruning_ratio=0.25)
    config = json.loads((second / "config.json").read_text())
    assert (config["model_type"], config["pruning_ratio"], config["pruning_layer"]) == ("vlmpruner_llava", 0.25, 3)
    data = ModelCard.load(second / "README.md").data
    assert (data.base_model, data.license) == ("someone/base", "mit")
    assert type(AutoTokenizer.from_pretrained(second, trust_remote_code=True)) is type(AutoTokenizer.from_pretrained(LLAVA))


def hub_cache(folder: Path, repo_id: str, files: Path) -> None:
    """A cache in which `files` are the only commit of `repo_id`: blobs, and links to them."""
    repo = folder / f"models--{repo_id.replace('/', '--')}"
    commit = "0" * 40
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    for path in files.iterdir():
        shutil.copyfile(path, repo / "blobs" / path.name)
        (repo / "snapshots" / commit / path.name).symlink_to(Path("../../blobs") / path.name)


def test_base_from_the_hub(base, tmp_path, lines, monkeypatch):
    card = "---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE\ntags: [a]\n---\n# Base\n"
    (base / "README.md").write_text(card)
    hub_cache(tmp_path / "hub", "someone/base-model", base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = export_model("someone/base-model", tmp_path / "out", report=lines.append)
    assert not (repo / SHARD).is_symlink()
    blob = tmp_path / "hub" / "models--someone--base-model" / "blobs" / SHARD
    assert os.stat(repo / SHARD).st_ino == os.stat(blob).st_ino
    data = ModelCard.load(repo / "README.md").data
    assert data.base_model == "someone/base-model"
    assert (data.license, data.license_name, data.license_link) == ("other", "llama2", "LICENSE")


def test_upload(tmp_path, lines, monkeypatch):
    calls = []

    class Address(str):
        repo_id = "me/pruned"

    def create_repo(repo_id, **kwargs):
        calls.append((repo_id, kwargs))
        return Address("address of me/pruned")

    monkeypatch.setattr(export, "create_repo", create_repo)
    monkeypatch.setattr(export, "upload_folder", lambda **kwargs: calls.append(kwargs))
    repo = export_model(LLAVA, tmp_path / "out", push_to_hub="me/pruned", private=True, report=lines.append)
    assert calls[0] == ("me/pruned", {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/pruned"
    assert calls[1]["folder_path"] == repo
    assert 'model="me/pruned"' in snippets(repo)[0]


def test_failed_upload_says_that_the_export_is_there(tmp_path, command, monkeypatch):
    def refuse(*arguments, **kwargs):
        raise OSError("401\nUnauthorized")

    monkeypatch.setattr(export, "create_repo", refuse)
    status, _, error = command(LLAVA, "--output", tmp_path / "out", "--push-to-hub", "me/pruned")
    assert status == 2
    assert (
        error == f"export.py: error: {tmp_path / 'out'} is complete, but uploading it to me/pruned failed: 401 Unauthorized\n"
    )
    assert (tmp_path / "out" / "config.json").is_file()


def test_dry_run_prints_the_files_and_writes_nothing(command, tmp_path):
    status, output, _ = command(LLAVA, "--output", tmp_path / "new" / "out", "--dry-run")
    assert status == 0
    assert list(tmp_path.iterdir()) == []
    repo = quietly(LLAVA, tmp_path / "out")
    for path in set(repo.iterdir()) - {repo / export.MANIFEST}:
        assert re.search(rf"^  {re.escape(path.name)} +{re.escape(export.readable(path.stat().st_size))}$", output, re.M), path


def damage_shard(base):
    (base / SHARD).write_bytes((base / SHARD).read_bytes()[:-1000])


def drop_weight(base):
    tensors = load_file(base / SHARD)
    del tensors["language_model.model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, base / SHARD, metadata={"format": "pt"})


def drop_shard(base):
    split_in_two(base)
    (base / "model-00002-of-00002.safetensors").unlink()


def leave_folder(base):
    edit_json(base / "config.json")
    split_in_two(base)
    edit_json(base / INDEX, weight_map={"lm_head.weight": "../other.safetensors"})


DAMAGES = {
    "unknown family": (
        lambda base: edit_json(base / "config.json", model_type="blip"),
        r"base is a model of type 'blip' by its config\.json. Supported are llava",
    ),
    "no config": (lambda base: (base / "config.json").unlink(), r"base has no config\.json"),
    "authors' layout": (
        lambda base: (base / "config.json").write_text('{"model_type": "llava", "mm_vision_tower": "x"}'),
        r"not in transformers' layout",
    ),
    "no safetensors": (lambda base: (base / SHARD).unlink(), r"base has no safetensors weights"),
    "missing shard": (drop_shard, r"names 2 shards, but model-00002-of-00002\.safetensors is missing"),
    "shard elsewhere": (leave_folder, r"'\.\./other\.safetensors', which is no \*\.safetensors of its"),
    "damaged shard": (damage_shard, r"model\.safetensors of base is no whole safetensors file: "),
    "missing weight": (
        drop_weight,
        r"config\.json and weights of base do not load: 1 of the weights are missing, the first is ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses_bad_bases(damage, base, tmp_path, command):
    spoil, message = DAMAGES[damage]
    spoil(base)
    status, _, error = command(base, "--output", tmp_path / "out")
    assert status == 2
    assert re.fullmatch(rf"export\.py: error: .*{message}.*\n", error), error
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], r"pruning_ratio must be .* got 1\.5"),
        (["--layer", "4"], r"pruning_layer must be .* from 1 to 3"),
        (["--num-pivots", "0"], r"num_pivots"),
        (["--method", "magic"], r"pruning_method must be one of"),
    ],
)
def test_refuses_bad_parameters(arguments, message, tmp_path, command):
    status, _, error = command(LLAVA, "--output", tmp_path / "out", *arguments)
    assert status == 2
    assert re.fullmatch(rf"export\.py: error: .*{message}.*\n", error), error
    assert list(tmp_path.iterdir()) == []


def write_json(name, **changes):
    """Changes a JSON file of a base; a dotted key reaches into an object of it."""

    def spoil(base):
        content = json.loads((base / name).read_text())
        for key, value in changes.items():
            target = content
            *outer, last = key.split(".")
            for each in outer:
                target = target[each]
            target[last] = value
        (base / name).write_text(json.dumps(content))

    return spoil


def write_text(name, text):
    return lambda base: (base / name).write_text(text)


def write_index(weight_map):
    def spoil(base):
        split_in_two(base)
        edit_json(base / INDEX, weight_map=weight_map)

    return spoil


def index_of_quantized(base):
    """Nobody opens the model of a quantized base, so its index is compared with the headers."""
    split_in_two(base)
    edit_json(base / "config.json", quantization_config={"quant_method": "awq"})
    content = json.loads((base / INDEX).read_text())
    content["weight_map"]["other.weight"] = "model-00001-of-00002.safetensors"
    (base / INDEX).write_text(json.dumps(content))


def quantized_without_weights(base):
    edit_json(base / "config.json", quantization_config={"quant_method": "awq"})
    (base / SHARD).write_bytes(b"no safetensors")


# What is wrong -> (how to make it so, the file that the error must name)
MALFORMED = {
    "config is a list": (write_text("config.json", "[]"), "config.json"),
    "config is cut off": (write_text("config.json", '{"model_type": "lla'), "config.json"),
    "config is not text": (lambda base: (base / "config.json").write_bytes(b"\xff\xfe{"), "config.json"),
    "nested too deeply": (write_text("config.json", '{"a":' * 100_000), "config.json"),
    "model type is a list": (write_json("config.json", model_type=["llava"]), "config.json"),
    "text config is a number": (write_json("config.json", text_config=5), "config.json"),
    "hidden size is text": (write_json("config.json", **{"text_config.hidden_size": "64"}), "config.json"),
    "hidden size is negative": (write_json("config.json", **{"text_config.hidden_size": -64}), "config.json"),
    "no such dtype": (write_json("config.json", torch_dtype="float99"), "config.json"),
    "no dtype": (write_json("config.json", **{"text_config.dtype": "nn"}), "config.json"),
    "layers without end": (write_json("config.json", **{"text_config.num_hidden_layers": 10**12}), "config.json"),
    "vision layers without end": (write_json("config.json", **{"vision_config.num_hidden_layers": 10**9}), "config.json"),
    "quantization is text": (write_json("config.json", quantization_config="awq"), "config.json"),
    "index is a list": (write_text(INDEX, "[]"), INDEX),
    "index without shards": (write_text(INDEX, '{"weight_map": {}}'), INDEX),
    "index without map": (write_text(INDEX, "{}"), INDEX),
    "map is a list": (write_index(["model.safetensors"]), INDEX),
    "shard is a number": (write_index({"lm_head.weight": 1}), INDEX),
    "shard is code": (write_index({"lm_head.weight": "configuration_vlmpruner.py"}), INDEX),
    "shard is the config": (write_index({"lm_head.weight": "config.json"}), INDEX),
    "shard is hidden": (write_index({"lm_head.weight": "..safetensors"}), INDEX),
    "index of a quantized base": (index_of_quantized, INDEX),
    "weights of a quantized base": (quantized_without_weights, SHARD),
    "tokenizer is a list": (write_text("tokenizer.json", "[]"), "tokenizer.json"),
    "tokenizer without a model": (write_json("tokenizer.json", model=7), "tokenizer.json"),
    "tokenizer config": (write_json("tokenizer_config.json", added_tokens_decoder=[1]), "tokenizer_config.json"),
    "processor is a number": (write_text("processor_config.json", "5"), "processor_config.json"),
    "image processor": (write_json("preprocessor_config.json", image_processor_type=5), "preprocessor_config.json"),
    "generation config": (write_text("generation_config.json", "[]"), "generation_config.json"),
    "generation option": (write_json("generation_config.json", cache_implementation=7), "generation_config.json"),
    "card": (write_text("README.md", "---\nlicense: [\n---\n"), "README.md"),
    "card is a list": (write_text("README.md", "---\n- license\n---\n"), "README.md"),
    "license is a number": (write_text("README.md", "---\nlicense: 5\n---\n"), "README.md"),
    "chat template": (lambda base: (base / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja"),
}


@pytest.mark.once
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_files_are_named_in_one_line(kind, base, tmp_path, command):
    spoil, name = MALFORMED[kind]
    spoil(base)
    status, _, error = command(base, "--output", tmp_path / "out")
    assert status == 2
    assert re.fullmatch(rf"export\.py: error: .*{re.escape(name)}.*\n", error), error
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("name", [SHARD, "generation_config.json", "chat_template.jinja", "tokenizer.json"])
def test_links_out_of_the_base_are_not_followed(name, base, tmp_path):
    """The file would be part of the repo, and would be uploaded."""
    private = tmp_path / "private"
    shutil.copyfile(LLAVA / name if (LLAVA / name).is_file() else LLAVA / "config.json", private)
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(private)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} of base is a link to {re.escape(str(private))}"):
        quietly(base, tmp_path / "out")
    private.rename(base / "inside")
    (base / name).unlink()
    (base / name).symlink_to("inside")
    if name in (SHARD, "tokenizer.json"):
        assert not (quietly(base, tmp_path / "out") / name).is_symlink()


@pytest.mark.parametrize("name", ["config", "tokenizer_config", "preprocessor_config", "processor_config", "generation_config"])
def test_code_of_the_base_is_never_run(name, base, tmp_path):
    marker = tmp_path / "ran"
    evil = f"open({str(marker)!r}, 'w')\n"
    for module in ("evil", "configuration_vlmpruner", "modeling_vlmpruner_llava", "processing", "token_pruning"):
        (base / f"{module}.py").write_text(evil)
    autos = ("Config", "Model", "ModelForImageTextToText", "Processor", "Tokenizer", "ImageProcessor", "VideoProcessor")
    references = {f"Auto{auto}": "evil.Evil" for auto in autos} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit_json(base / f"{name}.json", auto_map=references)
    if name == "config":
        edit_json(base / "config.json", attn_implementation="evil/kernel")
    repo = quietly(base, tmp_path / "out")
    assert not marker.exists()
    for path in repo.glob("*.py"):
        assert path.read_bytes() == (export.ROOT / path.name).read_bytes()
    for path in {*repo.glob("*.json")} - {repo / "generation_config.json"}:
        assert "evil" not in path.read_text(), path


def test_shards_do_not_overwrite_what_is_staged(base, tmp_path, monkeypatch):
    monkeypatch.setattr(export.Base, "shard_names", lambda self: ["config.json"])
    with pytest.raises(ValueError, match=r"shard config\.json of base has the name of another file"):
        quietly(base, tmp_path / "out")


def test_refuses_keys_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match="Unknown pruning key pruning_speed"):
        quietly(LLAVA, tmp_path / "out", pruning_speed=3)


def test_refuses_a_bad_name_for_the_hub_before_it_writes(tmp_path):
    with pytest.raises(ValueError, match="Repo id must"):
        quietly(LLAVA, tmp_path / "out", push_to_hub="me/my/model")
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_transformers_is_one_line(tmp_path, command, monkeypatch):
    def refuse(name):
        raise ImportError("This model's code needs\nanother transformers.")

    monkeypatch.setattr(export, "own", refuse)
    status, _, error = command(LLAVA, "--output", tmp_path / "out")
    assert (status, error) == (2, "export.py: error: This model's code needs another transformers.\n")


def test_refuses_a_base_that_is_nowhere(tmp_path, command):
    status, _, error = command(tmp_path / "absent", "--output", tmp_path / "out")
    assert (status, error.count("\n")) == (2, 1)
    assert "is neither a folder nor the id of a model on the Hub" in error


def test_refuses_outputs_that_would_destroy_something(base, tmp_path):
    with pytest.raises(ValueError, match="would overwrite the base"):
        quietly(base, base, force=True)
    with pytest.raises(ValueError, match="would overwrite the base"):
        quietly(base, tmp_path, force=True)
    with pytest.raises(ValueError, match="would overwrite the code"):
        quietly(base, export.ROOT, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        quietly(base, tmp_path / "file", force=True)
    assert (base / "config.json").is_file()


def test_replaces_only_earlier_exports_and_only_when_told(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    quietly(LLAVA, output)  # an empty folder is no obstacle
    with pytest.raises(ValueError, match="is not empty"):
        quietly(LLAVA, output, pruning_ratio=0.5)
    quietly(LLAVA, output, pruning_ratio=0.5, force=True)
    assert json.loads((output / "config.json").read_text())["pruning_ratio"] == 0.5
    (output / "results").mkdir()
    with pytest.raises(ValueError, match="something else than an export"):
        quietly(LLAVA, output, force=True)
    (output / "results").rmdir()
    edit_json(output / "config.json", model_type="llava")
    with pytest.raises(ValueError, match="something else than an export"):
        quietly(LLAVA, output, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


STEPS = ["write_small_files", "place_shards", "check_loads", "move_into_place"]


@pytest.mark.once
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", STEPS)
def test_failure_leaves_nothing_half_done(step, error, base, tmp_path, monkeypatch):
    original = getattr(export, step)

    def fail_after(*arguments):
        if step != "move_into_place":
            original(*arguments)
        raise error("in the middle")

    monkeypatch.setattr(export, step, fail_after)
    with pytest.raises(error):
        quietly(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert os.stat(base / SHARD).st_nlink == 1


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def renaming(request, monkeypatch):
    """With the system's call that exchanges two folders, and as on a system without it."""
    if not request.param:
        monkeypatch.setattr(export, "exchange", lambda *folders: False)
    return request.param


def ratio_of(repo: Path) -> float:
    return json.loads((repo / "config.json").read_text())["pruning_ratio"]


@pytest.fixture(scope="module")
def two_exports(tmp_path_factory):
    """Of ratio 0.5 and 0.25."""
    folder = tmp_path_factory.mktemp("two")
    return [quietly(LLAVA, folder / str(ratio), pruning_ratio=ratio) for ratio in (0.5, 0.25)]


@pytest.mark.once
@pytest.mark.parametrize("function", ["rename", "identity", "check_replaceable"])
@pytest.mark.parametrize("call", range(3))
def test_failure_while_replacing_keeps_the_earlier_export(function, call, renaming, two_exports, tmp_path, monkeypatch):
    earlier, new = two_exports
    output = Path(shutil.copytree(earlier, tmp_path / "out"))
    owner, original, calls = (Path, Path.rename, []) if function == "rename" else (export, getattr(export, function), [])

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*arguments)

    found = export.identity(output)
    try:
        with export.workspace(output) as beside, monkeypatch.context() as patch:
            staged = Path(shutil.copytree(new, beside / "out"))
            patch.setattr(owner, function, fail)
            export.move_into_place(staged, output, found)
    except KeyboardInterrupt:
        assert ratio_of(output) == 0.5
    else:
        assert ratio_of(output) == 0.25
        assert len(calls) <= call
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from vlmpruner import export

step, folder = sys.argv[1:]
original = getattr(export if step == "exchange" else Path, step)

def kill_after(*arguments):
    original(*arguments)
    if Path(arguments[-1]).name in ("out", "replaced"):
        os.kill(os.getpid(), signal.SIGKILL)

if step == "rename":
    export.exchange = lambda *folders: False
setattr(export if step == "exchange" else Path, step, kill_after)
export.export_model({base!r}, folder, force=True)
"""


@pytest.mark.once
@pytest.mark.parametrize("step", ["exchange", "rename"])
def test_a_kill_loses_no_export(step, fresh_python, tmp_path, lines):
    output = quietly(LLAVA, tmp_path / "out", pruning_ratio=0.5)
    process = fresh_python.run("-c", KILLED.format(base=str(LLAVA)), step, output, cwd=tmp_path)
    assert process.returncode == -signal.SIGKILL
    if step == "exchange":
        assert ratio_of(output) == 0.889
    else:
        assert not output.exists()
        with pytest.raises(ValueError, match="is not empty"):
            export_model(LLAVA, output, report=lines.append)
        assert any("put back" in line for line in lines)
        assert ratio_of(output) == 0.5
    quietly(LLAVA, output, pruning_ratio=0.25, force=True)
    assert ratio_of(output) == 0.25


def during_the_export(monkeypatch, action):
    """Runs `action` when the repo is staged, just before it is moved into place."""
    move = export.move_into_place
    monkeypatch.setattr(export, "move_into_place", lambda *arguments: (action(), move(*arguments)))


@pytest.mark.once
def test_files_that_appear_during_an_export_stay(renaming, tmp_path, monkeypatch):
    new, old = tmp_path / "new", quietly(LLAVA, tmp_path / "old", pruning_ratio=0.5)
    new.mkdir()
    for output, message in {new: "Something else has come to", old: "holds something else .*: notes.txt"}.items():
        with monkeypatch.context() as patch:
            during_the_export(patch, (output / "notes.txt").touch)
            with pytest.raises(ValueError, match=message):
                quietly(LLAVA, output, force=output == old)
        assert (output / "notes.txt").is_file()
    assert ratio_of(old) == 0.5
    assert {path.name for path in tmp_path.iterdir()} == {"new", "old"}


@pytest.mark.once
@pytest.mark.parametrize("force", [False, True])
def test_of_two_exports_at_once_one_wins(force, renaming, tmp_path, monkeypatch):
    output = tmp_path / "out"
    if force:
        quietly(LLAVA, output, pruning_ratio=0.5)
    with monkeypatch.context() as patch:

        def other():
            patch.undo()
            if not renaming:
                patch.setattr(export, "exchange", lambda *folders: False)
            quietly(LLAVA, output, pruning_ratio=0.25, force=force)

        during_the_export(patch, other)
        with pytest.raises(ValueError, match="Another export .* has come first" if force else "Something else has come to"):
            quietly(LLAVA, output, pruning_ratio=0.75, force=force)
    assert ratio_of(output) == 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.once
@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "earlier export without one"])
def test_force_deletes_nothing_that_no_export_wrote(manifest, tmp_path):
    output = quietly(LLAVA, tmp_path / "out", pruning_ratio=0.5)
    if not manifest:
        (output / export.MANIFEST).unlink()
    for name in ("optimizer.pt", "notes.txt", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "train.py"):
        (output / name).write_text("mine")
        with pytest.raises(ValueError, match=rf"something else than an export wrote there.*: {re.escape(name)}\. "):
            quietly(LLAVA, output, force=True)
        assert (output / name).read_text() == "mine"
        (output / name).unlink()
    (output / "weights").symlink_to(LLAVA)
    with pytest.raises(ValueError, match="something else than an export wrote there"):
        quietly(LLAVA, output, force=True)
    (output / "weights").unlink()
    quietly(LLAVA, output, pruning_ratio=0.25, force=True)
    assert ratio_of(output) == 0.25


def test_force_keeps_what_was_trained_or_edited_since(tmp_path):
    output = quietly(LLAVA, tmp_path / "out")
    model = FAMILIES["llava"].pruned_class.from_pretrained(output)
    model.save_pretrained(output)
    trained = (output / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"was changed since: .*\bconfig\.json, "):
        quietly(LLAVA, output, force=True)
    assert (output / "model.safetensors").read_bytes() == trained
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="holds something else than an export;"):
        quietly(LLAVA, tmp_path / "tuned", force=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_clean_up(number, status, tmp_path, command, monkeypatch, request):
    if number == signal.SIGINT:  # which a shell's background jobs ignore
        handler = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, handler))
    monkeypatch.setattr(export, "check_loads", lambda *arguments: os.kill(os.getpid(), number))
    try:
        assert command(LLAVA, "--output", tmp_path / "out")[0] == status
    except SystemExit as stop:
        assert stop.code == status
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_an_interruption_of_the_imports_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    process = subprocess.run(
        [sys.executable, export.ROOT / "export.py", "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "export.py: interrupted\n")


def test_runs_as_a_script_from_anywhere(python, tmp_path):
    output = python(export.ROOT / "export.py", LLAVA, "--output", "out", "--dry-run", cwd=tmp_path)
    assert "config.json" in output
    assert list(tmp_path.iterdir()) == []


def test_processor_of_the_repo_equals_the_base_ones(family, exported):
    processor = AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    base_processor = AutoProcessor.from_pretrained(family.checkpoint)
    text = f"{processor.image_token} What is this?"
    inputs, base_inputs = (each(picture(1), text, return_tensors="pt") for each in (processor, base_processor))
    assert inputs.keys() == base_inputs.keys()
    for name in inputs:
        assert inputs[name].equal(base_inputs[name])
    assert processor.chat_template == base_processor.chat_template


def test_the_processor_is_the_one_that_the_files_name(tmp_path):
    """GLM-4.6V-Flash is a `glm4v` model whose processor writes timestamps in another way than that of GLM-4.1V."""
    base = Path(shutil.copytree(FAMILIES["glm4v"].checkpoint, tmp_path / "base"))
    for name, part in {"preprocessor_config.json": "Image", "video_preprocessor_config.json": "Video"}.items():
        edit_json(
            base / name, **{"processor_class": "Glm46VProcessor", f"{part.lower()}_processor_type": f"Glm46V{part}Processor"}
        )
    repo = quietly(base, tmp_path / "pruned")
    trained = tmp_path / "trained"
    AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True).save_pretrained(trained)
    AutoProcessor.from_pretrained(repo, trust_remote_code=True).save_pretrained(trained)
    for pruned in (repo, quietly(trained, tmp_path / "again")):
        processor = AutoProcessor.from_pretrained(pruned, trust_remote_code=True)
        assert type(processor).__name__ == "VLMPrunerGlm46VProcessor"
        assert processor.replace_frame_token_id(0.5).endswith("0.5 seconds")
        again = quietly(pruned, tmp_path / f"base-of-{pruned.name}", to_base=True)
        assert type(AutoProcessor.from_pretrained(again)).__name__ == "Glm46VProcessor"


def trained_and_saved(family, repo: Path, folder: Path) -> Path:
    """What a user has after fine-tuning: other weights, by `save_pretrained` of model and processor."""
    model = family.pruned_class.from_pretrained(repo, dtype=torch.float32)
    spread_weights(model).save_pretrained(folder, max_shard_size="200KB")
    AutoProcessor.from_pretrained(repo, trust_remote_code=True).save_pretrained(folder)
    edit_json(folder / "generation_config.json", pruning_ratio=0.5)
    return folder


def test_back_to_a_base_that_the_stock_classes_open(family, exported, tmp_path, lines):
    processor = AutoProcessor.from_pretrained(family.checkpoint)
    text = f"{processor.image_token} What is on the sign?  Two\nwords"
    inputs = processor(picture(1), text, return_tensors="pt")
    trained = trained_and_saved(family, exported, tmp_path / "trained")
    expected = {exported: family.stock_class.from_pretrained(family.checkpoint, dtype=torch.float32)}
    expected[trained] = spread_weights(family.stock_class.from_pretrained(family.checkpoint, dtype=torch.float32))
    for repo, stock in expected.items():
        output = export_model(repo, tmp_path / f"base-of-{repo.name}", to_base=True, report=lines.append)
        auto, info = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
        named = family.stock_class.from_pretrained(output, dtype=torch.float32)
        assert type(auto) is type(named) is type(stock)
        differing = {"architectures": None, "_name_or_path": None}
        assert auto.config.to_dict() | differing == stock.config.to_dict() | differing
        assert auto.config.architectures == [family.stock_class.__name__]
        assert not any(info.values())
        for name, weight in stock.state_dict().items():
            assert torch.equal(auto.state_dict()[name], weight), name
            assert torch.equal(named.state_dict()[name], weight), name
        opened = AutoProcessor.from_pretrained(output)
        assert type(opened) is type(processor)
        assert type(opened.tokenizer) is type(processor.tokenizer)
        for name, value in opened(picture(1), text, return_tensors="pt").items():
            assert torch.equal(value, inputs[name])
        assert opened.chat_template == processor.chat_template
        assert not list(output.glob("*.py"))
        for path in output.glob("*.json"):
            assert not re.search("pruning_|auto_map|VLMPruner", path.read_text()), path
    with torch.no_grad():
        found, wanted = (model.eval()(**inputs).logits for model in (auto, stock))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # of equal weights, but a kernel may follow their alignment
    again = quietly(output, tmp_path / "again")
    assert ratio_of(again) == 0.889


def test_the_stock_class_by_name_reads_what_a_pruned_model_saved(family, tmp_path):
    """It can not be kept from opening the folder; under our model type, the library renames no weights for it."""
    spread_weights(family.pruned_class.from_pretrained(family.checkpoint)).save_pretrained(tmp_path)
    opened, info = family.stock_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    expected = spread_weights(family.stock_class.from_pretrained(family.checkpoint)).state_dict()
    for name, weight in opened.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_refuses_to_go_back_where_there_is_no_way(exported, base, tmp_path, command):
    message = {
        (base, "--to-base"): r"base is a base model already: its type is 'llava'\.",
        (exported, "--to-base", "--ratio", "0.5"): r"A base model has no pruning keys, but got pruning_ratio",
    }
    for arguments, expected in message.items():
        status, _, error = command(*arguments, "--output", tmp_path / "out")
        assert status == 2
        assert re.search(expected, error)
    (base / "config.json").rename(base / "adapter_config.json")
    status, _, error = command(base, "--to-base", "--output", tmp_path / "out")
    assert (status, error.count("\n")) == (2, 1)
    assert "is an adapter. Merge it" in error


@pytest.mark.once
def test_a_saved_config_finds_all_its_code(family, exported, python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FROM_CONFIG)
    family.pruned_class.config_class.from_pretrained(family.checkpoint).save_pretrained(tmp_path / "of-package")
    code = {path.name: path.read_bytes() for path in exported.glob("*.py")}
    output = python(script, exported, tmp_path / "of-package", cwd=tmp_path)
    assert output.split() == [family.pruned_class.__name__] * 2 * 3
    for folder in ("of-package", "saved-0", "saved-1"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.py")} == code


FROM_CONFIG = """
import sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

for number, folder in enumerate(sys.argv[1:]):
    AutoConfig.from_pretrained(folder, trust_remote_code=True).save_pretrained(f"saved-{number}")
for folder in (*sys.argv[1:], "saved-0"):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for auto in (AutoModel, AutoModelForImageTextToText):
        with torch.device("meta"):
            print(type(auto.from_config(config, trust_remote_code=True)).__name__)
"""
