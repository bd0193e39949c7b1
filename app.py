"""A page to look at pruning: ask about a picture, and see what the model answers unpruned and pruned, and what was kept.

`python app.py [--model FOLDER_OR_ID]`; `make app` sets up an environment first. The model is chosen as in demo.py: a repo made
by export.py, a base checkpoint of a supported family, or, without `--model`, the small one of this repo. On a Space of the Hub
the file is what is run.

Notable choices:
- The method is a key of the model's config, which all who ask share. So one request is answered at a time, the others wait in
  Gradio's queue, and the config is as it was afterwards. What is drawn belongs to the session that asked.
- What cannot be answered (no picture, no question, a method that this model refuses) is a sentence on the page.
- The page loads nothing from elsewhere, and the server connects to nothing: fonts are Gradio's own files, analytics are off.
"""

import argparse
import html
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import, too
try:
    import gradio as gr
except ImportError as error:
    sys.exit(f'app.py: error: {error}. The page needs Gradio: pip install ".[app]"')

from demo import Run, costs, inputs_of, load_pruned, measure, open_picture
from export import ROOT, Base, describe_pruning


# Drawn scenes that the model at the root was not trained on, each with a question that it can answer.
PICTURES = ROOT / "examples" / "pictures"
EXAMPLES = (
    ("signs.webp", "What is written on the black sign?"),
    ("stars.webp", "How many stars are there?"),
    ("colors.webp", "What color is the star?"),
    ("places.webp", "Is the red square below the orange cross?"),
)
DEFAULT_RATIO = 0.889
MOST_PIXELS = 50_000_000
MOST_BYTES = "30mb"
MOST_CHARACTERS = 500
MOST_WAITING = 20
KEPT_FOR = 3600  # seconds that a session's picture stays without being looked at
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


class Unanswerable(Exception):
    """Why a request gets no answer, in a sentence for the page."""


@dataclass(frozen=True)
class Choice:
    """How to prune: the values of the config's keys, of which the ratio is the call's own."""

    method: str
    preset: str
    ratio: float | None  # of an emptied box there is none


@dataclass(frozen=True)
class Drawing:
    """What is needed to draw the tokens that a request kept: its record and the pixels that the model saw."""

    record: object
    pixels: dict[str, torch.Tensor]

    @property
    def num_steps(self) -> int:
        """How many tokens were selected, of the grid where they are most."""
        return max(entry.num_kept for entry in self.record)


class Asker:
    """One model, and the pruning methods that its code has, for all who ask."""

    def __init__(self, processor, model, max_new_tokens: int):
        self.processor, self.model, self.max_new_tokens = processor, model, max_new_tokens
        self.config = deepcopy(model.config)  # as it is while nobody is answered
        code = sys.modules[type(model.config).__module__]  # the repo's own, which may be of another version than this file
        self.methods, self.parameter_keys = code.METHODS, [f"pruning_{name}" for name in code.METHODS_WITH]
        self.lock = threading.Lock()

    def presets(self, method: str) -> list[str]:
        return list(self.methods[method].presets)

    def first_choice(self) -> Choice:
        """What the model's config says, where it prunes."""
        method = self.config.pruning_method if self.config.pruning_method in self.methods else next(iter(self.methods))
        preset = self.config.pruning_preset if self.config.pruning_preset in self.presets(method) else self.presets(method)[0]
        return Choice(method, preset, self.config.pruning_ratio or DEFAULT_RATIO)

    def keys_of(self, choice: Choice) -> dict:
        """The values of the config's keys. Those of a method's own parameters stay with the method that the config names."""
        keys = {"pruning_method": choice.method, "pruning_preset": choice.preset, "pruning_ratio": choice.ratio}
        return keys | (dict.fromkeys(self.parameter_keys) if choice.method != self.config.pruning_method else {})

    def config_of(self, choice: Choice):
        """A copy of the config with this choice.

        Raises:
            Unanswerable: where the model cannot be pruned so.
        """
        if choice.ratio is None:
            raise Unanswerable("The ratio is a number between 0 and 1: the fraction of visual tokens to remove.")
        config = deepcopy(self.config)
        for key, value in self.keys_of(choice).items():
            setattr(config, key, value)
        try:
            settings = config.pruning_settings()
            if settings is not None:
                self.model.model.refuse_unknown_tower(settings)
        except ValueError as error:
            raise Unanswerable(str(error)) from error
        if settings is None:
            raise Unanswerable("With a ratio of 0 nothing is pruned.")
        return config

    def about(self, choice: Choice) -> str:
        """A sentence on the method and one on what it does to this model, or why it does not."""
        try:
            config = self.config_of(choice)
        except Unanswerable as error:
            return f"**Not with this model.** {error}"
        docstring = " ".join(self.methods[choice.method].__doc__.split())
        return f"{docstring.split('. ')[0].rstrip('.')}. Here {describe_pruning(config)}."

    @contextmanager
    def configured(self, choice: Choice) -> Iterator[None]:
        """The model's config with this choice, for one who waits until no other has it."""
        keys = self.keys_of(choice)
        with self.lock:
            try:
                for key, value in keys.items():
                    setattr(self.model.config, key, value)
                yield
            finally:
                for key in keys:
                    setattr(self.model.config, key, getattr(self.config, key))

    def read(self, path: str | None, question: str | None, choice: Choice):
        """The model's inputs.

        Raises:
            Unanswerable: where there are none.
        """
        question = (question or "").strip()
        if not path:
            raise Unanswerable("Choose a picture, or upload one.")
        if not question:
            raise Unanswerable("Ask a question about the picture.")
        if len(question) > MOST_CHARACTERS:
            raise Unanswerable(f"The question has {len(question)} characters, and {MOST_CHARACTERS} are the most.")
        self.config_of(choice)
        try:
            picture = open_picture(path, MOST_PIXELS)
            return inputs_of(self.processor, picture, question).to(self.model.device)
        except (ValueError, OSError) as error:
            raise Unanswerable(str(error).replace(str(path), Path(path).name)) from error

    def answers(
        self, path: str | None, question: str | None, choice: Choice
    ) -> Iterator[tuple[Run, Run | None, Drawing | None]]:
        """(unpruned `Run`, None, None) as soon as there is one, then (unpruned, pruned `Run`, `Drawing`).

        Raises:
            Unanswerable: where there are none.
        """
        inputs = self.read(path, question, choice)
        pixels = {name: value.cpu() for name, value in inputs.items() if name not in TEXT_INPUTS}
        try:
            with self.configured(choice):
                unpruned = measure(self.processor, self.model, inputs, 0.0, self.max_new_tokens, repeats=1)
            yield unpruned, None, None
            with self.configured(choice):
                pruned = measure(self.processor, self.model, inputs, choice.ratio, self.max_new_tokens, repeats=1)
            yield unpruned, pruned, Drawing(pruned.record, pixels)
        except torch.OutOfMemoryError as error:
            raise Unanswerable(
                "The picture and the answer do not fit into the memory of the GPU. Try a smaller one."
            ) from error
        except ValueError as error:
            raise Unanswerable(str(error)) from error

    def draw(self, drawing: Drawing, first: int) -> Image.Image:
        return self.processor.draw_kept_tokens(record=drawing.record, inputs=drawing.pixels, first=first)[0]


CSS = """
.gradio-container {
  max-width: 1180px !important;
  margin: 0 auto !important;
}
#title h1 {
  font-size: 1.9rem;
  margin: 0.4rem 0 0.1rem;
  letter-spacing: -0.02em;
}
#title p {
  color: var(--body-text-color-subdued);
  margin: 0;
}
#notice {
  border-left: 4px solid var(--color-accent);
  padding: 0.5rem 0.9rem;
  background: var(--color-accent-soft);
  border-radius: 4px;
}
#about {
  color: var(--body-text-color-subdued);
  font-size: 0.9rem;
}
.cards {
  display: grid;
  grid-template-columns: 1fr 1fr;
  gap: 12px;
}
.card {
  border: 1px solid var(--border-color-primary);
  border-radius: 10px;
  padding: 12px 16px;
  background: var(--block-background-fill);
}
.card h3 {
  margin: 0;
  font-size: 0.78rem;
  text-transform: uppercase;
  letter-spacing: 0.08em;
  color: var(--body-text-color-subdued);
}
.card p {
  margin: 6px 0 2px;
  font-size: 1.35rem;
  line-height: 1.35;
  font-weight: 600;
  overflow-wrap: anywhere;
}
.card.pruned {
  border-color: var(--color-accent);
}
.card .long {
  font-size: 1rem;
  font-weight: 400;
}
.costs {
  border: none !important;
  width: 100%;
  border-collapse: collapse;
  margin-top: 12px;
  font-variant-numeric: tabular-nums;
}
.costs th, .costs td {
  padding: 5px 8px;
  text-align: right;
  border-bottom: 1px solid var(--border-color-primary);
}
.costs th, .costs td, .costs tr {
  border-left: none !important;
  border-right: none !important;
  border-top: none !important;
}
.costs th:first-child, .costs td:first-child {
  text-align: left;
  color: var(--body-text-color-subdued);
}
.costs th {
  font-weight: 600;
  color: var(--body-text-color-subdued);
}
.costs td:last-child {
  color: var(--color-accent);
  font-weight: 600;
}
.hint {
  color: var(--body-text-color-subdued);
  padding: 12px 2px;
}
"""
HINT = '<p class="hint">Choose a picture, ask, and read both answers here.</p>'


def cards(unpruned: Run, pruned: Run | None) -> str:
    """Both answers and what they cost, as HTML."""

    def card(kind: str, run: Run | None) -> str:
        answer = "…" if run is None else html.escape(run.answer) or "(no text)"
        size = "long" if len(answer) > 80 else "short"
        return f'<div class="card {kind}"><h3>{kind}</h3><p class="answer {size}">{answer}</p></div>'

    shown = f'<div class="cards">{card("unpruned", unpruned)}{card("pruned", pruned)}</div>'
    if pruned is None:
        return shown
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in costs(unpruned, pruned))
    head = "<tr><th></th><th>unpruned</th><th>pruned</th><th></th></tr>"
    return f'{shown}<table class="costs">{head}{rows}</table>'


def page(asker: Asker, name: str) -> gr.Blocks:
    """The page for one model, which it calls `name`."""
    first = asker.first_choice()
    with gr.Blocks(title="VLM-Pruner", analytics_enabled=False, delete_cache=(KEPT_FOR, KEPT_FOR)) as blocks:
        gr.Markdown(
            "# VLM-Pruner\nAsk about a picture. The model answers with all of its visual tokens, and with the few that pruning "
            f"keeps. Model: {name}.",
            elem_id="title",
        )
        drawing = gr.State(time_to_live=KEPT_FOR)
        with gr.Row():
            with gr.Column(scale=5):
                picture = gr.Image(
                    str(PICTURES / EXAMPLES[0][0]),
                    label="Picture",
                    sources=["upload", "clipboard"],
                    height=330,
                    buttons=[],
                    interactive=True,
                    elem_id="picture",
                )
                gallery = gr.Gallery(
                    [str(PICTURES / file) for file, _ in EXAMPLES],
                    show_label=False,
                    columns=len(EXAMPLES),
                    height=140,
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
                question = gr.Textbox(EXAMPLES[0][1], label="Question", max_lines=3, elem_id="question")
                with gr.Row():
                    method = gr.Dropdown(list(asker.methods), value=first.method, label="Method", elem_id="method")
                    preset = gr.Dropdown(asker.presets(first.method), value=first.preset, label="Preset", elem_id="preset")
                ratio = gr.Slider(
                    0.1,
                    0.98,
                    value=first.ratio,
                    step=0.001,
                    label="Ratio: the fraction of visual tokens to remove",
                    elem_id="ratio",
                )
                about = gr.Markdown(asker.about(first), elem_id="about")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=6):
                notice = gr.Markdown(visible=False, elem_id="notice")
                answers = gr.HTML(HINT, elem_id="answers")
                kept = gr.Image(
                    show_label=False, interactive=False, visible=False, buttons=["download", "fullscreen"], elem_id="kept"
                )
                step = gr.Slider(0, 1, value=1, step=1, label="Order of selection", visible=False, elem_id="step")

        def show_example(event: gr.SelectData):
            file, text = EXAMPLES[event.index]
            return str(PICTURES / file), text

        def show_method(method: str, ratio: float):
            presets = asker.presets(method)
            return gr.Dropdown(presets, value=presets[0]), asker.about(Choice(method, presets[0], ratio))

        def show_about(method: str, preset: str, ratio: float):
            return asker.about(Choice(method, preset, ratio))

        def answer(picture, question, method, preset, ratio):
            path = picture and picture["path"]
            unseen = {kept: gr.Image(visible=False), step: gr.Slider(visible=False)}
            try:
                for unpruned, pruned, seen in asker.answers(path, question, Choice(method, preset, ratio)):
                    shown = {notice: gr.Markdown(visible=False), answers: cards(unpruned, pruned), drawing: seen}
                    if seen is None:
                        yield shown | unseen
                        continue
                    most = seen.num_steps
                    label = f"The first in the order of selection, of {most}"
                    yield shown | {
                        kept: gr.Image(asker.draw(seen, most), visible=True),
                        step: gr.Slider(0, max(most, 1), value=most, label=label, visible=most > 0),
                    }
            except Unanswerable as error:
                yield {notice: gr.Markdown(str(error), visible=True), answers: HINT, drawing: None} | unseen

        def draw(seen: Drawing | None, step: float | None):
            if seen is None or step is None:
                return gr.skip()
            return asker.draw(seen, round(min(max(step, 0), seen.num_steps)))

        # Values come as the browser sends them. Gradio's own checks have a traceback and a pop-up for a file that is no picture
        # and for a number of which only the first digit is typed; here they are sentences on the page.
        private = {"api_visibility": "private", "preprocess": False}
        smooth = {"show_progress": "hidden", "trigger_mode": "always_last", **private}
        choice = [method, preset, ratio]
        gallery.select(show_example, None, [picture, question], **private)
        method.input(show_method, [method, ratio], [preset, about], **private)
        for component in (preset, ratio):
            component.input(show_about, choice, about, **smooth)
        gr.on(
            [ask.click, question.submit],
            answer,
            [picture, question, *choice],
            [notice, answers, drawing, kept, step],
            concurrency_id="model",
            concurrency_limit=1,
            **private,
        )
        step.input(
            draw, [drawing, step], kept, show_progress="hidden", trigger_mode="always_last", concurrency_limit=4, **private
        )
    return blocks.queue(max_size=MOST_WAITING)


def serve(arguments: argparse.Namespace) -> None:
    name = arguments.model or str(ROOT)
    processor, model = load_pruned(Base.open(name), name)
    shown = f"`{Path(name).name}`" if arguments.model else "the small one of this repository"
    blocks = page(Asker(processor, model, arguments.max_new_tokens), shown)
    try:
        blocks.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            theme=gr.themes.Soft(primary_hue="purple", secondary_hue="purple", neutral_hue="slate"),
            css=CSS,
            footer_links=[],
            run_history=False,
            allowed_paths=[str(PICTURES)],
            max_file_size=MOST_BYTES,
            state_session_capacity=100,
            enable_monitoring=False,
            share=False,
        )
    finally:
        blocks.close(verbose=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="pruned model repo or base checkpoint, folder or id on the Hub")
    parser.add_argument("--host", help="address to listen on, by default 127.0.0.1 or GRADIO_SERVER_NAME")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on, or GRADIO_SERVER_PORT")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        serve(arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"app.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
