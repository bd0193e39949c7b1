"""The comparison of methods: what is equal among them, what it costs, and a run that goes on where it stopped."""

# ruff: noqa: E402 - the benchmarks are scripts in a folder of their own, which has to be on the path first

import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare
from compare import Comparison, cell_name, difference, matched_budget, matrix, parse_method, planned_tokens, rows_of, shown
from geometries import DecoderSizes, LayerSizes
from measurement import table

from benchmarks import accuracy
from vlmpruner.pruning_methods import METHODS


LAYER = LayerSizes(hidden=2, intermediate=3, query=2, key_value=2)
SIZES = DecoderSizes(hidden=2, vocabulary=7, layers=(LAYER,) * 6)


RESULTS = ROOT / "benchmarks" / "results"
DOCS = (ROOT / "docs" / "compare.md").read_text()
INTERVAL = r"[-+]?[0-9.]+ \[[^]]+\]"
COSTS = ("method", "tokens", "KV MB", "FLOPs", "7B", "selection ms", "prefill ms")  # columns of the page's table


def committed() -> tuple[dict, list[str]]:
    """What was measured, and the methods in the order in which they were."""
    content = json.loads((RESULTS / "compare.json").read_text())
    return content, list(dict.fromkeys(name.split(" ")[2] for name in content["results"] if not name.endswith(" unpruned")))


def method(name: str, num_layers: int = 6):
    return METHODS[name](METHODS[name].Parameters(), 2, num_layers)


def test_a_method_is_named_with_its_preset_and_parameters():
    assert parse_method("random") == ("random", {})
    assert parse_method("vlm_pruner:fine,threshold=0.5,fill_budget=true") == (
        "vlm_pruner",
        {"pruning_preset": "fine", "pruning_threshold": 0.5, "pruning_fill_budget": True},
    )
    with pytest.raises(ValueError, match=r"NAME=VALUE.*'threshold'"):
        parse_method("vlm_pruner,threshold")


def test_a_plan_says_what_each_layer_sees():
    assert planned_tokens(method("random"), 576, 64) == [576, 576, 64, 64, 64, 64]
    assert planned_tokens(method("divprune"), 576, 64) == [64] * 6
    staged = planned_tokens(method("pyramiddrop"), 576, 64)
    assert staged[0] == 576 and sorted(staged, reverse=True) == staged and len(set(staged)) > 2


def test_equal_budgets_are_equal_in_what_was_asked_for():
    def budget(name, match):
        return matched_budget(method(name), 576, 64, match, SIZES, num_text=16)

    assert {budget(name, "kept") for name in METHODS} == {64}
    assert budget("random", "layers") == budget("random", "flops") == 64
    assert budget("divprune", "layers") == 235  # (2 * 576 + 4 * 64) / 6
    reference = planned_tokens(method("random"), 576, 64)
    for name in ("divprune", "pyramiddrop", "btp"):
        layers = planned_tokens(method(name), 576, budget(name, "layers"))
        assert sum(layers) == pytest.approx(sum(reference), abs=6)
        flops = planned_tokens(method(name), 576, budget(name, "flops"))
        costs = [SIZES.flops([16 + count for count in counts]) for counts in (flops, reference)]
        assert costs[0] == pytest.approx(costs[1], rel=0.02)
    assert budget("divprune", "flops") > budget("divprune", "layers")  # attention grows with the square


def test_costs_by_hand():
    # A layer: 2 * (4 * 2 + 4 * 2 ... ) = 2 * (2*2 + 2*2 + 3*3) = 34 weights; attention 2 n^2 * 2.
    sizes = DecoderSizes(hidden=2, vocabulary=7, layers=(LAYER,) * 2)
    assert sizes.flops([3, 0.5]) == 2 * (3 * 34 + 2 * 9 * 2) + 2 * (0.5 * 34 + 2 * 0.25 * 2)
    assert sizes.kv_bytes([3, 2], itemsize=4) == 2 * 2 * 4 * 5


def test_a_difference_is_paired():
    unpruned = {"read": "1111111111", "count": "1111100000"}
    worse = {"read": "1111100000", "count": "1111100000"}
    assert difference(worse, worse, unpruned) == (0, 0, 0)
    middle, low, high = difference(worse, unpruned, unpruned)
    assert middle == pytest.approx(-25) and low < middle < high <= 0


def test_a_table_of_a_run_that_has_not_ended_shows_what_there_is():
    right = {"read": "1111111111", "count": "1111100000"}
    cell = {"right": right, "large_flops": 0.5, "mean_tokens": 64, "kv_bytes": 1e6, "flops": 0.5}
    names = [
        "test unpruned",
        "crowded_test unpruned",
        "test 64 btp",
        "crowded_test 64 btp",
        "crowded_test 64 saint",
        "test 8 btp",
    ]
    content = {
        "results": dict.fromkeys(names, cell),
        "times": {},
        "about": {"splits": ["test", "crowded_test"], "tokens": [64, 8]},
    }
    content["results"]["crowded_test 64 saint"] = cell | {"large_flops": None}
    rows = rows_of(content, ["btp", "saint", "random"], "btp")
    assert [(row["budget"], row["method"]) for row in rows] == [("all", "unpruned"), (64, "btp"), (64, "saint (own number)")]
    assert [row["test [95 %]"] for row in rows] == [*["100.0 [100.0, 100.0]"] * 2, "-"]
    assert matrix(content, ["btp", "random"], "crowded_test") == [{"crowded_test": "btp", "64 tokens": "100.0 [100.0, 100.0]"}]
    assert compare.per_type(content, "test") == 10


@pytest.mark.once
def test_the_committed_tables_are_of_the_committed_numbers(tmp_path):
    content, specs = committed()
    assert set(specs) == set(accuracy.METHODS)
    assert compare.write_report(content, specs, "vlm_pruner", tmp_path / "compare.json") == (RESULTS / "compare.md").read_text()


@pytest.mark.once
def test_the_page_has_the_committed_numbers():
    """Its tables are made of them, and it quotes no other intervals."""
    content, specs = committed()
    rows = rows_of(content, specs, "vlm_pruner")
    costs = [{name: row[name] for name in COSTS} for row in rows if row["budget"] in ("all", 64)]
    for part in (*(matrix(content, specs, split) for split in content["about"]["splits"]), costs):
        assert table(part) in DOCS
    measured = DOCS.partition("## What was measured")[2].partition("## Presets that were looked for")[0]
    quoted = set(re.findall(INTERVAL, measured))
    known = set(re.findall(INTERVAL, (RESULTS / "compare.md").read_text()))
    results = content["results"]
    pruned = [name.split(" ") for name in results if not name.endswith(" unpruned")]
    for split, num_keep, spec in pruned:  # and the differences to either preset
        for preset in ("vlm_pruner", "vlm_pruner:fine"):
            names = (cell_name(split, spec, num_keep), cell_name(split, preset, num_keep), cell_name(split, "", None))
            known.add(shown(difference(*(results[name]["right"] for name in names)), "+"))
    assert len(quoted) > 60 and quoted <= known, quoted - known


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the comparison on a question of each type; gives its JSON and what was measured anew."""
    output = tmp_path_factory.mktemp("compare") / "compare.json"

    def run_with(*options: str) -> tuple[dict, list[str]]:
        measured, evaluate = [], Comparison.evaluate

        def counted(self, split, configuration):
            measured.append(f"{split} {configuration.name}")
            return evaluate(self, split, configuration)

        fixed = ["compare.py", "--per-type", "1", "--splits", "test", "--output", str(output)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Comparison, "evaluate", counted)
            patch.setattr(sys, "argv", [*fixed, *options])
            compare.main()
        return json.loads(output.read_text()), measured

    return run_with


@pytest.mark.once
def test_a_run_measures_answers_costs_and_times_and_goes_on_where_it_stopped(run, capsys):
    options = ("--methods", "vlm_pruner", "divprune", "--repeats", "1")
    content, measured = run(*options, "--tokens", "64")
    assert len(measured) == 4 and measured[0] == "test unpruned"
    ours, before = content["results"]["test 64 vlm_pruner"], content["results"]["test 64 divprune"]
    assert ours["tokens"] == [576, 576, 64, 64, 64, 64] and before["tokens"] == [64] * 6
    assert {kind: len(outcome) for kind, outcome in ours["right"].items()} == dict.fromkeys(compare.QUESTION_TYPES, 1)
    unpruned = content["results"]["test unpruned"]
    assert unpruned["flops"] == 1 and unpruned["kv_bytes"] > ours["kv_bytes"] > before["kv_bytes"]
    # LLaVA-1.5-7B at 64 of 576 tokens: 636 tokens of text and picture in 2 of 32 layers, 124 in the others.
    assert ours["large_flops"] == pytest.approx((2 * 636 + 30 * 124) / (32 * 636), abs=0.02)
    for times in content["times"].values():
        assert 0 <= times["selection_s"] < times["prefill_s"]
    assert content["times"]["unpruned"]["selection_s"] == 0 < content["times"]["64 vlm_pruner"]["selection_s"]

    content, measured = run(*options, "--tokens", "64", "8")
    assert [name.split(" ")[1] for name in measured] == ["vlm_pruner", "divprune", "random"]
    rows = rows_of(content, ["vlm_pruner", "divprune", "random"], "vlm_pruner")
    assert [row["budget"] for row in rows] == ["all", *[64] * 3, *[8] * 3]
    assert [row["method"] for row in rows if not row["against"]] == ["unpruned", "vlm_pruner", "vlm_pruner"]
    assert rows[0]["test [95 %]"] == "100.0 [100.0, 100.0]"

    with pytest.raises(SystemExit):
        run(*options, "--per-type", "2")
    assert "has other questions of test. Give the same --per-type" in capsys.readouterr().err


@pytest.mark.once
def test_what_is_shared_between_methods_changes_no_answer(monkeypatch):
    model, processor, _ = accuracy.load(ROOT)
    questions = accuracy.collect_questions(1)
    comparison = Comparison(model, processor, {"test": questions}, 4, "kept")
    given, answers_to = [], compare.answers_to
    monkeypatch.setattr(compare, "answers_to", lambda *args: given.append(answers_to(*args)) or given[-1])
    specs = ("random", "btp", "visionzip", "vlm_pruner")  # of two, one and no layers below the first pruning, and what is known
    found = {}
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(comparison.prompts, "of", lambda *args: nullcontext())
        for spec in specs:
            given.clear()
            comparison.evaluate("test", comparison.configuration(spec, 16))
            chosen = [[image.order.tolist() for image in record] for _, record in given]
            found[spec, shares] = [answers for answers, _ in given], chosen
    for spec in specs:
        assert found[spec, True] == found[spec, False]
    layers = {key[1] for key in comparison.prompts.known if isinstance(key[1], int)}
    assert layers == {0, 1}


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tokens", "576"), "--tokens must be from 1 to 575"),
        (("--methods", "vlm_pruner:coarse"), "pruning_preset must be one of"),
        (("--methods", "divprune,threshold=1"), "pruning_threshold is set to 1, but pruning_method is 'divprune'"),
    ],
    ids=["tokens", "preset", "parameter"],
)
def test_a_bad_option_is_named(run, capsys, options, said):
    with pytest.raises(SystemExit):
        run("--repeats", "0", *options)
    assert said in capsys.readouterr().err
