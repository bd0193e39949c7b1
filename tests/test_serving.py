"""`transformers serve` serves pruned models: its process on loopback, and the client of OpenAI. Needs the extra `serve`."""

import base64
import contextlib
import io
import itertools
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from families import picture
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from training.scenes import ask, draw, make_scene
from vlmpruner.export import export_model


openai = pytest.importorskip("openai", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving_transformers.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMAND = next(code for language, code in BLOCKS if code.startswith("transformers serve"))
KEPT = re.compile(r"vlm_pruner kept (\d+) of (\d+) visual tokens from decoder layer (\d+) on\.")
SECONDS_TO_START = 120


class Server:
    """A server process, and what it has logged."""

    def __init__(self, arguments: list[str], folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log_file = f"http://127.0.0.1:{self.port}", folder / "server.log"
        place = ("--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu")
        environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "transformers.cli.transformers", "serve", *arguments, *place],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none")

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def is_well(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=10).status == 200
        except OSError:
            return False

    def wait(self) -> None:
        end = time.monotonic() + SECONDS_TO_START
        while not self.is_well():
            assert self.process.poll() is None and time.monotonic() < end, self.log
            time.sleep(0.2)

    def ask(self, messages: list[dict], model: str = ".", **options) -> str:
        return self.client.chat.completions.create(model=model, messages=messages, **options).choices[0].message.content

    def stream(self, messages: list[dict], model: str = ".", **options) -> str:
        chunks = self.client.chat.completions.create(model=model, messages=messages, stream=True, **options)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def comes_to_log(self, text: str, start: int = 0) -> bool:
        """Whether `text` is in the log after the first `start` characters, or gets there: a traceback follows its response."""
        end = time.monotonic() + 10
        while text not in self.log[start:] and time.monotonic() < end:
            time.sleep(0.05)
        return text in self.log[start:]

    def kept_during(self, function, *arguments, **options) -> list[tuple[int, ...]]:
        """(kept, of, layer) of each line that the log gained while `function` ran."""
        before = len(self.log)
        function(*arguments, **options)
        return [tuple(map(int, line)) for line in KEPT.findall(self.log[before:])]


@contextlib.contextmanager
def serving(arguments: list[str], folder: Path):
    server = Server(arguments, folder)
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """As the page says it, at a free port."""
    arguments = shlex.split(COMMAND)[2:]
    port = arguments.index("--port")
    with serving(arguments[:port] + arguments[port + 2 :], tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def root():
    model = AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True, dtype="auto").eval()
    return model, AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


def user(text: str, *images) -> dict:
    """A message in the API's form."""
    parts = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def about_signs(count: int) -> list[tuple[list[dict], str]]:
    """Questions about the writing in as many pictures, and the right answers."""
    scenes = (make_scene("test", seed) for seed in itertools.count())
    questions = ((scene, question) for scene in scenes for question in ask(scene) if question.kind == "read")
    return [([user(question.text, draw(scene))], question.answer) for scene, question in itertools.islice(questions, count)]


def test_the_page(server):
    """Its Python prints what it says, and the server logs what it says."""
    names = {}
    for (language, code), (next_language, expected) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if language == "console":
            missing = [line for line in code.splitlines() if not server.comes_to_log(line)]
            assert not missing, missing
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.chdir(ROOT):
                exec(code.replace("http://localhost:8000", server.url), names)
            assert printed.getvalue().strip() == (expected.strip() if next_language == "text" else ""), code
    assert server.is_well()


def test_answers_are_those_of_generate(server, root):
    """A picture, a second turn with another one, and text alone."""
    model, processor = root
    scenes = [draw(make_scene("test", seed)) for seed in (2, 3)]
    turns = [("What is written on the black sign?", scenes[0]), "CLIFF", ("How many stars are there?", scenes[1])]
    for said in (turns[:1], turns, [("Is there a red star?",)]):
        asked, expected = [], []
        for turn in said:
            if isinstance(turn, str):
                asked.append({"role": "assistant", "content": turn})
                expected.append({"role": "assistant", "content": [{"type": "text", "text": turn}]})
            else:
                text, *images = turn
                asked.append(user(text, *images))
                parts = [{"type": "image", "image": image} for image in images]
                expected.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
        inputs = processor.apply_chat_template(
            expected, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.dtype)
        new = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        answer = processor.decode(new, skip_special_tokens=True)
        assert (server.ask(asked, max_tokens=12), server.stream(asked, max_tokens=12)) == (answer, answer)


@pytest.mark.once
def test_requests_do_not_meet(server):
    """Eight pictures at once, half of them as streams: each answer is the one it gets alone."""
    asked = about_signs(8)
    alone = [server.ask(messages) for messages, _ in asked]
    right = sum(given.strip() == answer for given, (_, answer) in zip(alone, asked, strict=True))
    assert right >= 7 and len(set(alone)) == 8, alone
    ways = [server.ask if number % 2 else server.stream for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda way, question: way(question[0]), ways, asked)) == alone


def test_the_log_says_what_was_kept(server):
    one, two = user("What is it?", picture(1)), user("What are they?", picture(1), picture(2))
    assert server.kept_during(server.ask, [one]) == [(64, 576, 2)]
    assert server.kept_during(server.stream, [two], max_tokens=4) == [(128, 1152, 2)]
    assert server.kept_during(server.ask, [user("What is it?")]) == []


@pytest.mark.once
def test_the_line_is_off_by_default(root, capfd):
    model, processor = root
    inputs = processor(text="<image>", images=picture(1), return_tensors="pt").to(model.dtype)
    handler = logging.StreamHandler(sys.stderr)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.add_handler(handler)
    try:
        for level, count in ((logging.WARNING, 0), (logging.INFO, 1)):
            transformers_logging.set_verbosity(level)
            model(**inputs)
            assert capfd.readouterr().err.count("vlm_pruner kept 64 of 576") == count
    finally:
        transformers_logging.remove_handler(handler)
        transformers_logging.set_verbosity(verbosity)


def with_ratio(ratio) -> dict:
    return {"generation_config": json.dumps({"pruning_ratio": ratio, "max_new_tokens": 4})}


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0, []), (0.667, [(192, 576, 2)]), (0.944, [(32, 576, 2)]), (None, [(64, 576, 2)])]
)
def test_a_ratio_for_one_request(server, ratio, kept):
    """The next one has the config's again."""
    asked = [user("What is it?", picture(1))]
    assert server.kept_during(server.ask, asked, extra_body=with_ratio(ratio)) == kept
    assert server.kept_during(server.stream, asked, extra_body=with_ratio(ratio)) == kept
    assert server.kept_during(server.ask, asked, max_tokens=4) == [(64, 576, 2)]


def test_ratios_do_not_meet(server):
    ratios = [0, 0.667, 0.944, None] * 2
    ways = [server.ask if number % 2 else server.stream for number in range(len(ratios))]

    def ask_all_at_once():
        asked = [user("What is it?", picture(1))]
        with ThreadPoolExecutor(len(ratios)) as pool:
            list(pool.map(lambda way, ratio: way(asked, extra_body=with_ratio(ratio)), ways, ratios))

    assert sorted(server.kept_during(ask_all_at_once)) == [(32, 576, 2)] * 2 + [(64, 576, 2)] * 2 + [(192, 576, 2)] * 2


@pytest.mark.parametrize("ratio", [1, -0.1, "0.5", True])
def test_a_bad_ratio_is_refused_by_name(server, ratio):
    asked = [user("What is it?", picture(1))]
    with pytest.raises(openai.APIError) as error:
        server.stream(asked, extra_body=with_ratio(ratio))
    assert re.fullmatch(rf"pruning_ratio must be a number in \[0, 1\), .* got {ratio!r}\.", error.value.body)
    assert server.kept_during(server.ask, asked, max_tokens=4) == [(64, 576, 2)]


def picture_at(url: str) -> dict:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}


READ = user("What is written on the black sign?", Image.open(ROOT / "docs" / "scene.png"))


@pytest.mark.parametrize(
    ("message", "options", "reason"),
    [
        (picture_at("data:image/png;base64,AAAA"), {}, "Traceback"),
        (picture_at("absent.png"), {}, "Incorrect image source"),
        (user("What is it?"), {"generation_config": "no JSON"}, "JSONDecodeError"),
        (user("What is it?", picture(1)), {"generation_config": '{"prefill_chunk_size": 100}'}, "cuts images into pieces"),
        (user("What is it?", picture(1)), {"generation_config": '{"pruning_ratio": 1}'}, "pruning_ratio must be a number in"),
    ],
    ids=["broken picture", "no picture", "bad options", "refused by the model", "a bad ratio"],
)
def test_an_error_is_logged_and_the_server_lives_on(server, message, options, reason):
    before = len(server.log)
    with pytest.raises(openai.InternalServerError):
        server.client.with_options(max_retries=0).chat.completions.create(model=".", messages=[message], extra_body=options)
    assert server.comes_to_log(reason, before)
    assert server.is_well() and server.ask([READ]).strip() == "CLIFF"


def test_a_stream_ends_with_the_reason(server):
    options = {"generation_config": '{"prefill_chunk_size": 100}'}
    with pytest.raises(openai.APIError) as error:
        server.stream([user("What is it?", picture(1))], extra_body=options)
    assert "prefill_chunk_size=100 cuts images into pieces" in error.value.body
    assert server.is_well() and server.stream([READ]).strip() == "CLIFF"


@pytest.fixture(scope="module")
def server_of_any(tmp_path_factory):
    """A server that loads the models it is asked for, asked for continuous batching."""
    with serving(
        ["--trust-remote-code", "--continuous-batching", "--log-level", "info"], tmp_path_factory.mktemp("server_of_any")
    ) as running:
        yield running


@pytest.mark.between
def test_every_family_is_served(server_of_any, family, tmp_path_factory):
    """Where continuous batching is asked for, too: no picture is dropped without a word, since the server does not use it."""
    repo = str(export_model(family.checkpoint, tmp_path_factory.mktemp(family.name) / "exported", report=lambda line: None))
    asked = [user("What is it?", picture(1, 96, 64))]
    ((kept, of, layer),) = server_of_any.kept_during(server_of_any.ask, asked, model=repo, max_tokens=4)
    assert 0 < kept < of / 2 and layer == family.layer
    assert server_of_any.kept_during(server_of_any.ask, [user("What is it?")], model=repo, max_tokens=4) == []
    assert f"{family.pruned_class.__name__} does not support continuous batching" in server_of_any.log
