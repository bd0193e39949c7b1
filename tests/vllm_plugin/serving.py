"""What the tests of the vLLM plugin share: the root model in vLLM and in transformers, and questions for both."""

import gc
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams

from training.scenes import ask, draw, make_scene


ROOT = Path(__file__).parents[2]
MAX_TOKENS = 12
BLOCK = 32  # tokens in a cache block, the smallest of the CPU


@contextmanager
def engine(model=ROOT, **settings):
    """An engine in this process, with float32 and a cache of 1 GiB unless `settings` say otherwise. One at a time."""
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "block_size": BLOCK, "max_num_seqs": 64}
    llm = LLM(str(model), trust_remote_code=True, limit_mm_per_prompt={"image": 3}, **(defaults | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def scheduler_of(llm: LLM):
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner_of(llm: LLM):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def num_free_blocks(llm: LLM) -> int:
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


@lru_cache
def questions(number: int) -> list[tuple]:
    """The first `number` pairs of a picture and a question about it; of each test scene its first and its last question."""
    pairs, seed = [], 0
    while len(pairs) < number:
        asked = ask(make_scene("test", seed))
        pairs += [(draw(make_scene("test", seed)), question.text) for question in (asked[0], asked[-1])]
        seed += 1
    return pairs[:number]


@lru_cache
def reference(repo: Path = ROOT):
    """A model, if not said otherwise that at the root, and its processor in transformers."""
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(repo, trust_remote_code=True)


def prompt_text(processor, num_images: int, text: str) -> str:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.inference_mode()
def generated(model, processor, images: list, text: str, max_tokens: int = MAX_TOKENS, **kwargs) -> tuple[list[int], list]:
    """Token ids of the greedy answer of transformers to one request alone, and for each grid the kept places, ascending."""
    inputs = processor(images=images or None, text=[text], return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, return_dict_in_generate=True, **kwargs)
    record = model.get_pruning_record(outputs)
    kept = [] if record is None else [image.kept.tolist() for image in record]
    return outputs.sequences[0, inputs["input_ids"].shape[1] :].tolist(), kept


@torch.inference_mode()
def generated_in_batches(model, processor, pairs: list[tuple], size: int = 20, **kwargs) -> list[tuple[list[int], list]]:
    """`generated` for requests of one picture each; answers without the padding that shorter ones get."""
    results, end = [], processor.tokenizer.eos_token_id
    for first in range(0, len(pairs), size):
        images, texts = zip(*pairs[first : first + size], strict=True)
        texts = [prompt_text(processor, 1, text) for text in texts]
        inputs = processor(images=list(images), text=texts, padding=True, padding_side="left", return_tensors="pt")
        outputs = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False, return_dict_in_generate=True, **kwargs)
        record = model.get_pruning_record(outputs)
        kept = [[] for _ in images] if record is None else [[image.kept.tolist()] for image in record]
        for tokens, places in zip(outputs.sequences[:, inputs["input_ids"].shape[1] :].tolist(), kept, strict=True):
            results.append((tokens[: tokens.index(end) + 1] if end in tokens else tokens, places))
    return results


def greedy(max_tokens: int = MAX_TOKENS, **arguments) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=arguments or None)


def vllm_prompt(images: list, text: str) -> dict:
    return {"prompt": text} | ({"multi_modal_data": {"image": images}} if images else {})


def assert_kept_alike(found: list[list[list[int]]], expected: list[list[list[int]]]) -> None:
    """What requests kept is equal, but for what rounding decides: kernels round by the shape of a batch, and of two tokens of
    nearly equal scores either may be kept. Nine of ten grids are equal, and of the others seven of eight tokens.

    Args:
        found, expected: of each request, the kept places of each grid.
    """
    assert [list(map(len, grids)) for grids in found] == [list(map(len, grids)) for grids in expected]
    pairs = [pair for grids in zip(found, expected, strict=True) for pair in zip(*grids, strict=True)]
    different = [(set(one) - set(other), len(one)) for one, other in pairs if one != other]
    assert len(different) <= len(pairs) / 10 + 1, different
    assert all(8 * len(only) <= count for only, count in different), different


def kept_of(output) -> list[list[int]]:
    """The kept places of each grid of a finished request that asked for them."""
    return [grid["kept"] for grid in (output.kv_transfer_params or {}).get("pruning_record", [])]
