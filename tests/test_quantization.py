"""benchmarks/quantization.py: quantised weights load, prune and answer; what they keep is compared with float32."""

import json
import sys
from pathlib import Path

import pytest
import torch
from families import picture
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlmpruner
from benchmarks import accuracy, quantization
from benchmarks.quantization import SCHEMES
from vlmpruner.modeling_vlmpruner_llava import VLMPrunerLlavaForConditionalGeneration


ROOT = Path(__file__).parents[1]


def entry(kept: list[list[int]], right: str = "10") -> dict:
    answers = dict.fromkeys(accuracy.QUESTION_TYPES, right)
    return {"unpruned": dict.fromkeys(accuracy.QUESTION_TYPES, "11"), "pruned": answers, "kept": kept, "bytes": 2**20}


def test_the_table_compares_with_float32():
    results = {
        "float32": entry([[1, 2, 3], [4, 5, 6]], "11"),
        "bfloat16": entry([[1, 2, 4], [6, 5, 4]]),
        "torchao int4 weights": {"error": "ImportError: no kernels"},
    }
    rows = quantization.markdown(results).splitlines()[2:]
    assert rows[0].startswith("| float32 | 1.0 MiB | 100.0 | 100.0 | 100.0 [") and rows[0].endswith("| 3.0, 3 of 3 |")
    assert rows[1].startswith("| bfloat16 | 1.0 MiB | 100.0 | 50.0 | 50.0 [") and rows[1].endswith("| 2.5, 2 of 3 |")
    assert rows[2] == "| torchao int4 weights | | | | | ImportError: no kernels |"


@pytest.mark.once
@pytest.mark.parametrize("scheme", ["torchao int8 weights", "bitsandbytes nf4"])
def test_a_scheme_is_measured_and_gone_on_with(scheme, tmp_path, monkeypatch):
    pytest.importorskip(scheme.split()[0], reason="needs the extra `quantization`")
    output = tmp_path / "quantization.json"
    words = ["quantization.py", "--schemes", scheme, "--per-type", "1", "--batch-size", "4", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    quantization.main()
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["float32", scheme] and "error" not in results[scheme]
    assert all(len(kept) == 64 for result in results.values() for kept in result["kept"])
    same = quantization.overlap(results[scheme]["kept"], results["float32"]["kept"])
    assert 20 < sum(same) / len(same) < 64  # about the same tokens, and quantised indeed
    assert results[scheme]["bytes"] < results["float32"]["bytes"]
    monkeypatch.setattr(quantization, "measure", None)
    quantization.main()


@pytest.mark.once
@pytest.mark.parametrize("scheme", ["torchao int8 weights", "bitsandbytes 8-bit", "bitsandbytes nf4"])
def test_a_quantised_model_is_pruned_in_place(scheme):
    pytest.importorskip(scheme.split()[0], reason="needs the extra `quantization`")
    options = SCHEMES[scheme]() | {"device_map": "cpu"}
    classes = LlavaForConditionalGeneration, VLMPrunerLlavaForConditionalGeneration
    stock, ours = (each.from_pretrained(ROOT, **options).eval() for each in classes)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    inputs = processor(images=picture(1), text=f"{processor.image_token} What is this?", return_tensors="pt")
    vlmpruner.prune(stock)
    with torch.no_grad():
        outputs, expected = stock(**inputs), ours(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=0)
    assert outputs.pruning_record.num_kept == expected.pruning_record.num_kept < outputs.pruning_record.num_visual


def test_what_can_not_be_loaded_is_a_line_of_the_table(tmp_path, monkeypatch):
    def load(path, scheme):
        raise ImportError("needs a kernel\nof another package")

    monkeypatch.setattr(quantization, "load", load)
    assert quantization.measure(tmp_path, next(iter(SCHEMES)), [], 0.5, 1) == {"error": "ImportError: needs a kernel"}
