"""What does a vLLM server gain from fewer visual tokens? Real models' geometry, random weights, unpruned and pruned.

    python benchmarks/serving.py --model llava-1.5-7b --clients 1 8 32 128 --cache-requests 64
    python benchmarks/serving.py --clients 1 4 --repeats 4 -- --enforce-eager    # after --: options of `vllm serve`
    python benchmarks/serving.py --input result.json --plot plot.png

It exports a repo with random weights and serves it on loopback, twice at once: as it is, and with `pruning_ratio` 0 (with
`--servers` also by vLLM's own class for the base model, "stock"). vLLM's load generator, `vllm bench serve`, sends pictures of
noise, which no server sees twice. The servers take turns, and a burst that does not count comes first. Each has a KV cache that
holds so many unpruned requests (`--cache-requests`), so with more clients than that unpruned requests wait for memory.

For each model it prints the theory, then a table:
- requests/s, tokens/s: finished requests and their output tokens, over the time that they took.
- TTFT: from sending a request to its first token, image decoding, vision tower and waiting included. With fewer than 100
  requests the 99th percentile is the longest.
- fit: how many requests the cache holds, counted in whole blocks. Cache: the largest part of it that was seen in use.
- preempted: how often a request had to give up its cache for another and start again.
- others: CPU cores that other processes of the machine used meanwhile. Rows in which it differs can not be compared.
The ideal counts the multiplications of the decoder's layers alone; the vision tower and the HTTP server are the same for all.
The last line is one JSON object.
"""

import argparse
import gc
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import torch
from geometries import GEOMETRIES, DecoderSizes, Geometry, Request, Theory, why_not_measured
from measurement import argument_parser, copy_bandwidth, draw_bars, environment, heading, run, table
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlmpruner.export import export_model


CHECKPOINTS = Path(__file__).resolve().parents[1] / "tests" / "data" / "checkpoints"
SERVERS = ("unpruned", "pruned", "stock")
START_SECONDS = 900  # weights are read, and the model is compiled
BLOCK = 128  # tokens; the largest that vLLM's backends choose by themselves
MARGIN = 128  # tokens of text that a prompt may have more than asked for: the chat template's, and what noise tokenizes to


# The repo


def random_base(geometry: Geometry, folder: Path, device: str, dtype: torch.dtype) -> Path:
    """A base checkpoint of random weights, with the processor and the special tokens of the test checkpoint of its family."""
    small = CHECKPOINTS / geometry.base
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    small_config = json.loads((small / "config.json").read_text())
    tokens = {key: value for key, value in small_config.items() if key.endswith(("_token_id", "_token_index"))}
    config = AutoConfig.for_model(geometry.base, **(geometry.config | tokens))
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(default_dtype)
    model.save_pretrained(folder)
    if geometry.base.startswith("qwen"):
        allow_picture(folder / "preprocessor_config.json", geometry)
    return folder


def allow_picture(path: Path, geometry: Geometry) -> None:
    """Make the geometry's picture the largest that the image processor does not shrink."""
    settings = json.loads(path.read_text())
    height, width = geometry.picture
    least = settings.pop("min_pixels")
    settings["size"] = {"shortest_edge": least, "longest_edge": height * width}
    del settings["max_pixels"]
    path.write_text(json.dumps(settings))


def template_tokens(repo: Path) -> int:
    """How many tokens of text the chat template puts around a picture and a question."""
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    return len(processor.tokenizer(text)["input_ids"]) - 1


# Theory


def blocks_of_request(tokens: int, pruned_tokens: int, groups: int, block_size: int) -> int:
    """Cache blocks that a request takes, where the first of `groups` groups of layers holds `tokens` and the others
    `pruned_tokens`; the same number of layers is in each."""
    return ceil(tokens / block_size) + (groups - 1) * ceil(pruned_tokens / block_size)


def requests_that_fit(server: str, request: Request, output: int, blocks: int, block_size: int) -> int:
    """How many requests with `output` tokens of answer a server's cache of `blocks` holds at their full length.

    The plugin has as many groups of layers as the pruning layer goes into all layers, also at a ratio of 0; the stock model has
    one. One block is vLLM's own.
    """
    groups = 1 if server == "stock" else len(DecoderSizes.of(request.geometry).layers) // request.layer
    tokens = request.tokens() + output
    pruned_tokens = request.tokens(request.ratio) + output if server == "pruned" else tokens
    return (blocks - 1) // blocks_of_request(tokens, pruned_tokens, groups, block_size)


def cache_bytes_for(number: int, request: Request, output: int, dtype: torch.dtype) -> int:
    """Bytes of a cache that holds `number` unpruned requests in blocks of `BLOCK` tokens, and the block that vLLM keeps."""
    sizes = DecoderSizes.of(request.geometry)
    blocks = 1 + number * ceil((request.tokens() + output) / BLOCK)
    return 2 * dtype.itemsize * sizes.key_value * blocks * BLOCK


def with_answer(request: Request, output: int) -> Request:
    """The request with its answer, which takes cache as text does."""
    return Request(request.geometry, text=request.text + output, ratio=request.ratio, layer=request.layer)


# Servers


@contextmanager
def serving(repo: Path, options: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of a vLLM server of its own on loopback; within it the server lives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The module behind `vllm serve`, which does not start from the CPU build.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(repo), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | server_variables(), start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def server_variables() -> dict[str, str]:
    """Offline, and all threads on all cores: bound to cores, two servers on one CPU would share a core."""
    return {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"The server did not start. The end of its log:\n{log.read_text()[-3000:]}")


def stop(process: subprocess.Popen) -> None:
    """End a server by its process id, and, where it leaves any, the processes that it started."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def server_options(server: str, request: Request, cache_bytes: int, arguments: argparse.Namespace) -> list[str]:
    options = {
        "--dtype": arguments.dtype,
        "--max-model-len": request.tokens() + arguments.output_tokens + MARGIN,
        "--limit-mm-per-prompt": json.dumps({"image": 1} | ({"video": 0} if request.geometry.base.startswith("qwen") else {})),
        "--kv-cache-memory-bytes": cache_bytes,
        "--gpu-memory-utilization": round(0.9 / len(arguments.servers), 2),
    }
    if server == "unpruned":
        options["--hf-overrides"] = json.dumps({"pruning_ratio": 0.0})
    if server == "stock":
        config = AutoConfig.for_model(request.geometry.base)
        architecture = AutoModelForImageTextToText._model_mapping[type(config)].__name__
        options["--hf-overrides"] = json.dumps({"architectures": [architecture]})
    return [str(part) for option in options.items() for part in option] + arguments.options


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        return response.read().decode()


def gauge(text: str, name: str) -> float:
    """The value of a metric."""
    found = re.search(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"The server's metrics have no vllm:{name}.")
    return float(found[1])


def cache_blocks(text: str) -> tuple[int, int]:
    """How many blocks the cache of a server has, and how many tokens are in one."""
    line = re.search(r"^vllm:cache_config_info\{(.*)\}", text, re.MULTILINE)[1]
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
    return int(labels["num_gpu_blocks"]), int(labels["block_size"])


class Watch:
    """A context that looks at a server and at the machine.

    Attributes:
        in_use: the largest part of the cache that was seen in use, in [0, 1].
        preempted: how many requests lost their cache to others.
        others: CPU cores that processes used which this one did not start.
    """

    def __init__(self, url: str, seconds: float = 0.5):
        self.url, self.seconds, self.in_use = url, seconds, 0.0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self.ended.wait(self.seconds):
            try:
                self.in_use = max(self.in_use, gauge(metrics(self.url), "kv_cache_usage_perc"))
            except OSError:  # busy
                continue

    def _num_preempted(self) -> int:
        return int(gauge(metrics(self.url), "num_preemptions_total"))

    def __enter__(self) -> "Watch":
        self.before = self._num_preempted(), time.monotonic(), cpu_seconds_of_others()
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        preempted, clock, others = self.before
        self.preempted = self._num_preempted() - preempted
        self.others = max(cpu_seconds_of_others() - others, 0) / (time.monotonic() - clock)


def cpu_seconds_of_others() -> float:
    """CPU seconds so far of processes that are not this one or started by it."""
    import psutil  # vLLM needs it too

    times, own = psutil.cpu_times(), psutil.Process()
    busy = sum(getattr(times, kind, 0) for kind in ("user", "system", "nice", "irq", "softirq", "steal"))
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            busy -= process.cpu_times().user + process.cpu_times().system
    return busy


# Load


def send(
    url: str, repo: Path, picture: tuple[int, int], text: int, output: int, clients: int, number: int, seed: int, log: Path
) -> dict:
    """Have vLLM's load generator send `number` requests of a picture and `text` tokens, from `clients` at once. The result has
    a value for each request."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    height, width = picture
    options = {
        "--base-url": url,
        "--backend": "openai-chat",
        "--endpoint": "/v1/chat/completions",
        "--model": repo,
        "--dataset-name": "random-mm",
        "--random-input-len": text,
        "--random-output-len": output,
        "--random-mm-base-items-per-request": 1,
        "--random-mm-bucket-config": str({(height, width, 1): 1.0}),
        "--max-concurrency": clients,
        "--num-prompts": number,
        "--temperature": 0,
        "--seed": seed,
    }
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    flags = ["--trust-remote-code", "--disable-tqdm", "--save-detailed"]
    with log.open("a") as printed, redirect_stdout(printed):
        result = main(parser.parse_args([str(part) for option in options.items() for part in option] + flags))
    if result["completed"] < number:
        errors = "\n".join(filter(None, result["errors"]))
        raise RuntimeError(f"{number - result['completed']} of {number} requests failed:\n{errors[-3000:]}")
    return result


@dataclass(frozen=True)
class Burst:
    """What came of some requests: the seconds that they took together, of each the seconds to its first token, its tokens of
    prompt and of answer, and what a `Watch` saw."""

    seconds: float
    ttfts: Sequence[float]
    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int]
    in_use: float
    preempted: int
    others: float


def percentile(values: Sequence[float], percent: float) -> float:
    """The least of the values that `percent` of them do not exceed."""
    return sorted(values)[max(ceil(percent / 100 * len(values)), 1) - 1]


def summary(bursts: Sequence[Burst]) -> dict:
    """The numbers of one row of the table."""
    ttfts = [ttft for burst in bursts for ttft in burst.ttfts]
    seconds = sum(burst.seconds for burst in bursts)
    return {
        "requests": len(ttfts),
        "requests_per_s": len(ttfts) / seconds,
        "tokens_per_s": sum(sum(burst.output_tokens) for burst in bursts) / seconds,
        "ttft_median_s": statistics.median(ttfts),
        "ttft_p99_s": percentile(ttfts, 99),
        "prompt_tokens": statistics.mean(tokens for burst in bursts for tokens in burst.prompt_tokens),
        "cache_in_use": max(burst.in_use for burst in bursts),
        "preempted": sum(burst.preempted for burst in bursts),
        "others_cpu": sum(burst.others * burst.seconds for burst in bursts) / seconds,
    }


def compare(rows: list[dict]) -> list[dict]:
    """Rows with how many times more requests a second they have than the first server's with as many clients."""
    first = {row["clients"]: row for row in reversed(rows) if row["server"] == rows[0]["server"]}
    return [row | {"times_more": row["requests_per_s"] / first[row["clients"]]["requests_per_s"]} for row in rows]


def shown(row: dict) -> dict:
    """A row as the table has it."""
    return {
        "clients": row["clients"],
        "server": row["server"],
        "requests": row["requests"],
        "requests/s": f"{row['requests_per_s']:.3g}",
        "times": f"{row['times_more']:.2f}",
        "TTFT median s": f"{row['ttft_median_s']:.3g}",
        "TTFT 99 % s": f"{row['ttft_p99_s']:.3g}",
        "tokens/s": f"{row['tokens_per_s']:.3g}",
        "fit": row["fit"],
        "cache": f"{100 * row['cache_in_use']:.1f} %",
        "preempted": row["preempted"],
        "others": f"{row['others_cpu']:.1f}",
    }


class Load:
    """Sends requests to servers, always others.

    Args:
        urls: of the servers, by name.
        repo, request, output: what is served and what is sent.
        log: what vLLM's load generator prints.
    """

    def __init__(self, urls: dict[str, str], repo: Path, request: Request, output: int, log: Path):
        self.urls, self.repo, self.output, self.log = urls, repo, output, log
        self.picture, self.text = request.geometry.picture, request.text - template_tokens(repo)
        self.seed = 0

    def bursts(self, clients: int, number: int, backwards: bool = False) -> dict[str, Burst]:
        """One burst to each server in turn, of the same requests."""
        self.seed += 1
        found = {}
        for name in sorted(self.urls, key=list(self.urls).index, reverse=backwards):
            with Watch(self.urls[name]) as watch:
                result = send(
                    self.urls[name], self.repo, self.picture, self.text, self.output, clients, number, self.seed, self.log
                )
            lengths = result["input_lens"], result["output_lens"]
            found[name] = Burst(result["duration"], result["ttfts"], *lengths, watch.in_use, watch.preempted, watch.others)
        return found


def measure_load(load: Load, clients: Sequence[int], repeats: int, rounds: int, on_gpu: bool) -> list[dict]:
    """A row for each server and number of clients."""
    rows = []
    for position, number in enumerate(clients):
        if on_gpu or position == 0:  # a GPU meets new shapes with more clients
            load.bursts(number, number)
        bursts = [load.bursts(number, max(number, ceil(repeats / rounds)), turn % 2 == 1) for turn in range(rounds)]
        for name in load.urls:
            row = summary([burst[name] for burst in bursts])
            print(f"{number} clients, {name}: {row['requests_per_s']:.3g} requests/s", flush=True)
            rows.append({"clients": number, "server": name} | row)
    return rows


# Everything


def measure_model(name: str, arguments: argparse.Namespace, result: dict, folder: Path, bandwidth: float) -> dict:
    """The rows of one model, printed as a table."""
    dtype, output = getattr(torch, arguments.dtype), arguments.output_tokens
    request = Request(GEOMETRIES[name], text=arguments.text, ratio=arguments.ratio)
    prefill = Theory.of(request, dtype, bandwidth)
    cache = Theory.of(with_answer(request, output), dtype, bandwidth)
    print(f"\n{name}, {request.describe()}; {output} tokens of answer\n{prefill.describe()}")
    print(f"        with the answer, {cache.kv_bytes / cache.pruned_kv_bytes:.2f} times as many requests in the same cache")
    print(f"{heading(result)}\n", flush=True)
    if (reason := why_not_measured(request.geometry)) is not None:
        raise ValueError(f"{name} is not served: {reason}.")
    random_base(request.geometry, folder / "base", arguments.device, dtype)
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    repo = folder / "repo"
    export_model(str(folder / "base"), repo, pruning_ratio=request.ratio)
    cache_bytes = cache_bytes_for(arguments.cache_requests, request, output, dtype)
    with ExitStack() as stack:
        urls = {}
        for server in arguments.servers:
            options = server_options(server, request, cache_bytes, arguments)
            urls[server] = stack.enter_context(serving(repo, options, folder / f"{server}.log"))
        blocks = {server: cache_blocks(metrics(url)) for server, url in urls.items()}
        load = Load(urls, repo, request, output, folder / "load.log")
        rows = measure_load(load, arguments.clients, arguments.repeats, arguments.rounds, arguments.device == "cuda")
    rows = compare([row | {"fit": requests_that_fit(row["server"], request, output, *blocks[row["server"]])} for row in rows])
    print("\n" + table([shown(row) for row in rows]))
    return {
        "model": name,
        "text": request.text,
        "output_tokens": output,
        "ratio": request.ratio,
        "cache_bytes": cache_bytes,
        "blocks": blocks,
        "theory": asdict(prefill),
        "fit_ideal": cache.kv_bytes / cache.pruned_kv_bytes,
        "rows": rows,
    }


def measure(arguments: argparse.Namespace) -> dict:
    # Ended from outside, it still ends its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    device = vllm_device(arguments.device)
    arguments.device = device
    import vllm

    requests = min(arguments.rounds * max(clients, ceil(arguments.repeats / arguments.rounds)) for clients in arguments.clients)
    result = environment(device) | {"vllm": vllm.__version__, "benchmark": "serving", "dtype": arguments.dtype}
    result |= {"repeats": requests, "options": arguments.options, "runs": []}
    bandwidth = copy_bandwidth(device)
    for name in arguments.model:
        with tempfile.TemporaryDirectory(prefix="serving-") as folder:
            result["runs"].append(measure_model(name, arguments, result, Path(folder), bandwidth))
    return result


def vllm_device(wanted: str | None) -> str:
    """The device of the vLLM that is installed, which is not a matter of choice."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.platforms import current_platform

    if wanted not in (None, current_platform.device_type):
        raise SystemExit(f"--device is {wanted}, but the vLLM that is installed here runs on {current_platform.device_type}.")
    return current_platform.device_type


def draw(result: dict, axes) -> None:
    rows = [(run, row) for run in result["runs"] for row in run["rows"]]
    labels = [f"{run['model']}, {row['clients']} clients, {row['server']}" for run, row in rows]
    draw_bars(axes, labels, {"requests a second": [row["requests_per_s"] for _, row in rows]}, "requests a second")


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.set_defaults(device=None)
    parser.add_argument("--model", nargs="+", choices=GEOMETRIES, default=["llava-1.5-7b"] if on_gpu else ["0.5b"])
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=["unpruned", "pruned"], help="the first is compared with"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128] if on_gpu else [1, 4, 8])
    parser.add_argument("--rounds", type=int, default=2, help="bursts that each server gets, in turns")
    parser.add_argument(
        "--cache-requests", type=int, default=64 if on_gpu else 4, help="unpruned requests that the cache holds"
    )
    parser.add_argument("--text", type=int, default=60, help="tokens of text in a request")
    parser.add_argument("--output-tokens", type=int, default=128 if on_gpu else 16, help="tokens of an answer")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("options", nargs="*", help="after --, for every server, as in: -- --enforce-eager")
    run(parser.parse_args(), measure, draw)


if __name__ == "__main__":
    main()
