"""Time prefill and decoding with and without pruning, on real models' geometry with random weights.

`python benchmarks/prefill.py --model 0.5b --ratio 0.889 --batch 1 --repeats 20 [--device cuda --dtype bfloat16]`

Prints the theory first, then medians after one run that does not count, then one JSON line. Image features are random and given
as already encoded, so that the vision tower is not part of the time; the same code runs with the ratio 0, which is the stock
model. The ideal ratio counts the decoder's multiplications as the paper does and nothing else; below some 150 tokens a GPU is
bound by reading the weights, and can not reach it.

Needs `pip install -e .`, and transformers 5.18 or later, where the stock model takes encoded images.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmpruner.configuration_vlmpruner import VLMPrunerLlavaConfig
from vlmpruner.modeling_vlmpruner_llava import VLMPrunerLlavaForConditionalGeneration
from vlmpruner.pruned_decoder import GridView


@dataclass(frozen=True)
class Geometry:
    """A language model's sizes and the grid of one image in front of it, as in the public checkpoint of that name."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    grid: tuple[int, int]
    text_config: type = LlamaConfig

    def config(self, ratio: float) -> VLMPrunerLlavaConfig:
        text_config = self.text_config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
        )
        vision_config = CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        return VLMPrunerLlavaConfig(
            text_config=text_config,
            vision_config=vision_config,
            image_token_index=1,
            pruning_ratio=ratio,
            vision_feature_layer=-1,
        )

    def layer_flops(self, tokens: int) -> float:
        """Multiplications of one decoder layer over `tokens`: projections, attention, gated MLP."""
        key_value = self.hidden * self.kv_heads // self.heads
        projections = 2 * tokens * self.hidden**2 + 2 * tokens * self.hidden * key_value
        return projections + 2 * tokens**2 * self.hidden + 3 * tokens * self.hidden * self.intermediate


GEOMETRIES = {
    "llava-1.5-7b": Geometry(4096, 11008, 32, 32, 32, 32064, (24, 24)),
    "llava-1.5-13b": Geometry(5120, 13824, 40, 40, 40, 32064, (24, 24)),
    "qwen2-7b": Geometry(3584, 18944, 28, 28, 4, 152064, (30, 47), Qwen2Config),
    "0.5b": Geometry(896, 4864, 24, 14, 2, 32000, (35, 40), Qwen2Config),
}


def ideal_ratio(geometry: Geometry, tokens: int, pruned_tokens: int, layer: int) -> float:
    """How many times fewer multiplications the decoder's layers need."""
    full, pruned = geometry.layer_flops(tokens), geometry.layer_flops(pruned_tokens)
    return geometry.layers * full / (layer * full + (geometry.layers - layer) * pruned)


def make_model(geometry: Geometry, ratio: float, device: str, dtype: torch.dtype, attn: str):
    with torch.device("meta"):
        model = VLMPrunerLlavaForConditionalGeneration(geometry.config(ratio))
    model = model.to(dtype).to_empty(device=device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    decoder = model.model.language_model
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(device)
    model.set_attn_implementation(attn)
    return model


def make_inputs(geometry: Geometry, batch: int, num_text: int, device: str, dtype: torch.dtype) -> dict:
    height, width = geometry.grid
    ids = torch.randint(2, geometry.vocabulary, (batch, height * width + num_text), device=device)
    ids[:, 5 : 5 + height * width] = 1
    features = [torch.randn(height * width, geometry.hidden, device=device, dtype=dtype) for _ in range(batch)]
    for image in features:
        image.grid_views = [GridView(height, width)]
    return {"input_ids": ids, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


def timed(function, device: str):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


@torch.no_grad()
def one_run(model, inputs: dict, ratio: float, steps: int, device: str) -> tuple[float, list[float], int]:
    """Seconds of a prefill and of each decoded token, and the bytes of the cache after the prefill."""

    def forward(**given):
        return model(**given, logits_to_keep=1)

    inputs = inputs | {"mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}
    outputs, prefill = timed(lambda: forward(**inputs, pruning_ratio=ratio, use_cache=True), device)
    cache, token = outputs.past_key_values, outputs.logits.argmax(-1)
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    step_times = [timed(lambda: forward(input_ids=token, past_key_values=cache), device)[1] for _ in range(steps)]
    return prefill, step_times[1:], cache_bytes


def measure(model, inputs: dict, ratio: float, repeats: int, steps: int, device: str) -> dict:
    """Medians of the prefill and of one decoded token, in seconds, and the bytes of the cache and at the peak."""
    one_run(model, inputs, ratio, steps, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = [one_run(model, inputs, ratio, steps, device) for _ in range(repeats)]
    return {
        "prefill_s": statistics.median(prefill for prefill, _, _ in runs),
        "decode_s": statistics.median(step for _, step_times, _ in runs for step in step_times),
        "kv_bytes": runs[0][2],
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=GEOMETRIES, default="0.5b")
    parser.add_argument("--ratio", type=float, default=0.889)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text", type=int, default=60, help="text tokens around the image")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4, help="decoded tokens after each prefill; the first does not count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--attn", nargs="+", default=["sdpa"])
    arguments = parser.parse_args()
    geometry, device = GEOMETRIES[arguments.model], arguments.device
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    num_visual = geometry.grid[0] * geometry.grid[1]
    num_kept = round(num_visual * (1 - arguments.ratio))
    tokens, pruned_tokens = num_visual + arguments.text, num_kept + arguments.text
    ideal = ideal_ratio(geometry, tokens, pruned_tokens, layer=2)
    print(
        f"{arguments.model}: {num_visual} visual tokens, {num_kept} kept, {arguments.text} text tokens, batch {arguments.batch}"
    )
    flops = 2 * arguments.batch * geometry.layers * geometry.layer_flops(tokens)
    print(f"theory: {flops / 1e12:.2f} TFLOP unpruned, ideal ratio {ideal:.2f}")
    print(f"on {hardware(device)}, {dtype}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| attention | ratio | prefill ms | times faster | of the ideal | decode ms | KV MiB |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for attn in arguments.attn:
        model = make_model(geometry, arguments.ratio, device, dtype, attn)
        inputs = make_inputs(geometry, arguments.batch, arguments.text, device, dtype)
        base = None
        for ratio in (0.0, arguments.ratio):
            row = measure(model, inputs, ratio, arguments.repeats, arguments.steps, device)
            base = base or row
            gain = base["prefill_s"] / row["prefill_s"]
            of_ideal = f"{gain / ideal:.0%}" if ratio else ""
            print(
                f"| {attn} | {ratio} | {row['prefill_s'] * 1e3:.1f} | {gain:.2f} | {of_ideal} "
                f"| {row['decode_s'] * 1e3:.2f} | {row['kv_bytes'] / 2**20:.1f} |"
            )
            results.append({"attn": attn, "ratio": ratio, "times_faster": gain, **row})
    print(json.dumps(vars(arguments) | {"hardware": hardware(device), "ideal": ideal, "results": results}))


if __name__ == "__main__":
    main()
