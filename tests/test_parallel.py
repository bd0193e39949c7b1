"""Models spread over processes and devices keep what one process keeps. FSDP is in test_tools.py."""

import copy
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from families import FAMILIES, load_processor, load_pruned, make_inputs, picture

from vlmpruner.tensor_parallel import all_heads


TESTS = Path(__file__).parent
METHODS = (
    "vlm_pruner",
    "fastv",
    "dart",
    "pyramiddrop",
)  # look at keys, attention, keys of the text, attention of several stages

TENSOR_PARALLEL = """
    import json, sys
    import torch, torch.distributed as dist
    import vlmpruner
    from transformers.distributed import DistributedConfig
    from families import FAMILIES, make_inputs, picture

    dist.init_process_group("gloo")
    folder = sys.argv[1]
    for name in sys.argv[2:]:
        family = FAMILIES[name]
        plan = {"distributed_config": DistributedConfig(tp_size=2, tp_plan="auto"), "dtype": torch.float32}
        model = family.pruned_class.from_pretrained(f"{folder}/{name}", pruning_ratio=0.889, **plan).eval()
        heads = model.model.language_model.layers[0].self_attn.k_proj.weight
        inputs = make_inputs(family, [([picture(1, 140, 112)], "What is it?"), ([picture(2, 140, 112)] * 2, "And here, what?")])
        found = {"is_sharded": hasattr(heads, "device_mesh") and heads.to_local().shape != heads.shape}
        for method in json.loads(open(f"{folder}/methods.json").read()):
            model.config.pruning_method = method
            outputs = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
            kept = [image.order.tolist() for image in model.get_pruning_record(outputs)]
            found[method] = [kept, outputs.sequences.tolist()]
        stock = family.stock_class.from_pretrained(f"{folder}/{name}", **plan).eval()
        outputs = vlmpruner.prune(stock).generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        found["in place"] = [[image.order.tolist() for image in stock.get_pruning_record(outputs)], outputs.sequences.tolist()]
        model.config.pruning_method = "vlm_pruner"
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        found["loss"] = float(loss)
        with open(f"{folder}/{name}-{dist.get_rank()}.json", "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()
"""


FOUR_RANKS = """
    import json, sys
    import torch, torch.distributed as dist
    from transformers.distributed import DistributedConfig
    from families import FAMILIES, make_inputs, picture

    def load(model_class, folder, plan, **options):
        config = DistributedConfig(tp_size=4, tp_plan=plan)
        return model_class.from_pretrained(folder, distributed_config=config, dtype=torch.float32, **options).eval()

    dist.init_process_group("gloo")
    folder = sys.argv[1]
    for name in sys.argv[2:]:
        family, found = FAMILIES[name], {}
        inputs = make_inputs(family, [([picture(1, 140, 112)], "What is it?")])
        try:
            load(family.stock_class, family.checkpoint, "auto")(input_ids=torch.ones(2, 9, dtype=torch.long))
        except RuntimeError as error:
            found["stock"] = str(error)
        try:
            load(family.pruned_class, f"{folder}/{name}", "auto")
        except ValueError as error:
            found["refused"] = str(error)
        decoder = "text_model" if name == "smolvlm" else "language_model"
        whole = {f"model.{decoder}.layers.*.self_attn.{each}_proj": "replicate" for each in "qkvo"}
        plan = whole if "refused" in found else "auto"
        model = load(family.pruned_class, f"{folder}/{name}", plan, pruning_ratio=0.889)
        layer = model.get_decoder().layers[0]
        found["is_spread"] = [hasattr(part.weight, "device_mesh") for part in (layer.self_attn.k_proj, layer.mlp.down_proj)]
        for method in ("vlm_pruner", "fastv"):
            model.config.pruning_method = method
            outputs = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            kept = [image.order.tolist() for image in model.get_pruning_record(outputs)]
            found[method] = [kept, outputs.sequences.tolist()]
        with open(f"{folder}/{name}-{dist.get_rank()}.json", "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()
"""


def run_ranks(script: str, folder: Path, *arguments: str, number: int = 2) -> list[str]:
    """What each prints, from a file of its own: on one pipe they would meet in the middle of a line."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    options = ("--standalone", f"--nproc-per-node={number}", "--redirects", "1", "--log-dir", folder / "logs")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, path, folder, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [path.read_text() for path in sorted((folder / "logs").glob("**/[0-9]/stdout.log"))]


def test_ranks_of_tensor_parallelism_keep_what_one_process_keeps(tmp_path):
    names = ("llava", "llava_onevision", "qwen2_vl")  # Llama and Qwen2 in LLaVA, Qwen2-VL; four and two key heads
    (tmp_path / "methods.json").write_text(json.dumps(METHODS))
    for name in names:
        load_pruned(FAMILIES[name]).save_pretrained(tmp_path / name)
    run_ranks(TENSOR_PARALLEL, tmp_path, *names)
    for name in names:
        family, model = FAMILIES[name], copy.deepcopy(load_pruned(FAMILIES[name]))
        inputs = make_inputs(family, [([picture(1, 140, 112)], "What is it?"), ([picture(2, 140, 112)] * 2, "And here, what?")])
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for method in METHODS:
            model.config.pruning_method = method
            outputs = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
            kept = [image.order.tolist() for image in model.get_pruning_record(outputs)]
            expected = [kept, outputs.sequences.tolist()]
            assert ranks[0][method] == ranks[1][method] == expected, (name, method)
        for rank in ranks:
            assert rank["in place"] == rank["vlm_pruner"]
        model.config.pruning_method = "vlm_pruner"
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        with torch.no_grad():
            loss = float(model(**inputs, labels=labels).loss)
        for rank in ranks:
            assert rank["is_sharded"] and rank["loss"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.once
def test_the_page_s_program_answers_on_two_ranks(tmp_path):
    page = (TESTS.parent / "docs" / "parallel.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert run_ranks(program, tmp_path) == ["CLIFF 64\n"] * 2


@pytest.mark.once
def test_more_ranks_than_key_heads(tmp_path):
    """The stock class fails at its first call, the pruned one when it is loaded. With the attention whole on each rank, four
    keep and answer what one process does; the library's own plan for Qwen3-VL leaves it so."""
    names = ("smolvlm", "qwen2_vl", "internvl", "qwen3_vl")  # Llama, Qwen2 and Qwen3 with two key heads
    for name in names:
        load_pruned(FAMILIES[name]).save_pretrained(tmp_path / name)
    run_ranks(FOUR_RANKS, tmp_path, *names, number=4)
    for name in names:
        family, model = FAMILIES[name], copy.deepcopy(load_pruned(FAMILIES[name]))
        inputs = make_inputs(family, [([picture(1, 140, 112)], "What is it?")])
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(4)]
        assert ranks[0] == ranks[1] == ranks[2] == ranks[3]
        has_plan = name != "qwen3_vl"
        assert ranks[0]["is_spread"] == [False, has_plan]
        if has_plan:
            assert re.fullmatch(r"shape '\[2, 9, -1, \d+\]' is invalid for input of size \d+", ranks[0]["stock"])
            assert re.search(r"over 4 ranks .* num_key_value_heads=2\. Use 1 or 2 ranks, or a tp_plan", ranks[0]["refused"])
        else:
            assert not {"stock", "refused"} & ranks[0].keys()
        for method in ("vlm_pruner", "fastv"):
            model.config.pruning_method = method
            outputs = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            kept = [image.order.tolist() for image in model.get_pruning_record(outputs)]
            assert ranks[0][method] == [kept, outputs.sequences.tolist()], (name, method)


def test_missing_heads_are_named():
    layer = load_pruned(FAMILIES["qwen2_vl"]).model.language_model.layers[1]
    with pytest.raises(ValueError, match="Decoder layer 1 has 1 heads on this rank of 1, the whole model 2"):
        all_heads(torch.zeros(1, 1, 5, 16), 2, layer)


def spread_over(places: list, family, folder: Path):
    """The family's model with each part of its decoder on one of `places` after another."""
    model = load_pruned(family)
    model.save_pretrained(folder)
    layers, number = "model.language_model.layers", len(model.model.language_model.layers)
    split = {
        name for name, module in model.named_modules() if name and not list(module.children()) and not name.startswith(layers)
    }
    device_map = dict.fromkeys(split, places[0])
    device_map |= {f"{layers}.{layer}": places[layer * len(places) // number] for layer in range(number)}
    return family.pruned_class.from_pretrained(folder, device_map=device_map, dtype=torch.float32, pruning_ratio=0.889).eval()


def assert_keeps_what_one_device_keeps(places: list, folder: Path):
    for name in ("llava", "qwen2_vl"):
        family, processor = FAMILIES[name], load_processor(FAMILIES[name])
        assert processor.tokenizer.padding_side == "left"
        inputs = make_inputs(family, [([picture(1, 140, 112)], "What is it?"), ([picture(2, 140, 112)], "And here?")])
        spread, results = spread_over(places, family, folder / name), []
        assert len({str(device) for device in spread.hf_device_map.values()}) == len(set(map(str, places)))
        for model in (spread, load_pruned(family)):
            outputs = model.generate(**inputs.to(model.device), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
            kept = [image.kept.tolist() for image in model.get_pruning_record(outputs)]
            results.append((kept, outputs.sequences.tolist()))
        assert results[0] == results[1]


@pytest.mark.gpu
def test_a_model_on_a_cpu_and_a_gpu(tmp_path):
    assert_keeps_what_one_device_keeps([0, "cpu"], tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_two_gpus(tmp_path):
    assert_keeps_what_one_device_keeps([0, 1], tmp_path)
