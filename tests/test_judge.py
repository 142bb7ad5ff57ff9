"""Judges: verdicts of both orders, intervals by hand, and labels read from a language model."""

from __future__ import annotations

import pytest
import torch
from _tiny import save_tiny

from perl import judge
from perl.backbone import Backbone
from perl.config import CompareConfig, EvaluateConfig, UsageError
from perl.data import encode_prompts
from perl.functions import SourceFailed
from perl.judge import LabelReader, Opinion

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# ------------------------------------------------------------------------------------- verdicts


def test_a_win_needs_both_orders_and_the_margin():
    pairs = [(2, 3), (0.5, 3), (-2, -3), (2, -3), (-2, 3), (0, 0), (2, 0)]
    wanted = ["first", "first", "second", "tie", "tie", "tie", "tie"]
    assert [judge.verdict(pair) for pair in pairs] == wanted
    assert [judge.verdict(pair, 0.5) for pair in pairs] == [*wanted[:1], "tie", *wanted[2:]]


def test_win_figures_by_hand():
    pairs = [(2, 3), (2, 1), (-2, -3), (2, -3), (4, -1), (-1, 1), (0, 0), (2, 0)]
    figures = judge.win_figures(pairs)
    assert [figures[name] for name in ("wins", "ties", "losses")] == [2, 5, 1]
    assert figures["win_rate"] == (2 + 5 / 2) / 8
    assert figures["win_rate_interval"] == judge.wilson(4.5 / 8, 8)
    assert figures["split"] == 3 / 8
    # of the verdicts for an answer, 7 of the first order and 6 of the second: 5 + 3 for that shown
    # first, which is the first policy's where p > 0, and the second's where q < 0
    assert figures["shown_first"] == (5 + 3) / 13
    assert judge.win_figures([(0, 0)])["shown_first"] is None
    # with a margin of 2: (2, 3) and (-2, -3) are for somebody in one order alone
    assert judge.win_figures(pairs, 2)["ties"] == 8
    assert judge.win_figures(pairs, 2)["split"] == 0


def test_wilson_intervals_by_hand():
    """z = 1.959964, z² = 3.841459; (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)."""
    assert judge.wilson(0.8, 10) == pytest.approx([0.490162, 0.943318], abs=1e-6)
    assert judge.wilson(0.0, 10) == pytest.approx([0, 3.841459 / 13.841459], abs=1e-6)
    assert judge.wilson(1.0, 1) == pytest.approx([1 / 4.841459, 1], abs=1e-6)
    assert judge.wilson(0.5, 100) == pytest.approx([0.403832, 0.596168], abs=1e-6)


def test_yes_figures_by_hand():
    found = [Opinion(1.0, 0.5), Opinion(-3.0, 0.1), Opinion(0.0, 0.3), Opinion(2.0, 0.1)]
    figures = judge.yes_figures(found)
    assert figures["yes_rate"] == 0.5 and figures["yes_rate_interval"] == judge.wilson(0.5, 4)
    sigmoids = (0.7310586, 0.0474259, 0.5, 0.8807971)
    assert figures["yes_probability"] == pytest.approx(sum(sigmoids) / 4, abs=1e-6)
    assert figures["judge_mass"] == pytest.approx(0.25)


# ------------------------------------------------------------------------------------ functions


def function(tmp_path, body: str, timeout: float = 5.0) -> judge.Judge:
    path = tmp_path / "j.py"
    path.write_text(f"def better(prompts, first, second):\n    {body}\n")
    return judge.load_judge_function(f"{path}:better", timeout, batch_size=4)


def test_functions_return_words_or_numbers(tmp_path):
    given = "{'a': 'first', 'b': 'second', 'c': 'tie', 'd': 0.25, 'e': -3, 'f': True}"
    ask = function(tmp_path, f"assert len(second) <= 4; return map({given}.get, prompts)")
    found = ask("abcdef", "ghijkl", "mnopqr", [])
    assert [opinion.preference for opinion in found] == [1, -1, 0, 0.25, -3, 1]
    lengths = function(tmp_path, "return [len(a) - len(b) for a, b in zip(first, second)]")
    assert lengths(["p"], ["long"], ["s"], []) == [Opinion(3.0)]


@pytest.mark.parametrize(
    "body, words",
    [
        (
            "return 1 / 0",
            "raised ZeroDivisionError: division by zero on line 2 for 2 prompts (the first 'p', "
            "answered 'a' and 'c'); make it return for any answer",
        ),
        (
            "while True: pass",
            "took longer than 0.2 s on line 2 for 2 prompts (the first 'p', answered 'a' and 'c'); "
            "make it quicker, or raise --judge-timeout",
        ),
        ("return ['first']", "returned 1 verdicts for 2 prompts"),
        ("return ['first', 'A']", "returned 'A'; return \"first\""),
        ("return ['first', '1']", "returned '1'"),
        ("return [1, float('nan')]", "returned nan"),
        ("return [1, None]", "returned None"),
        ("return (1 / 0 for _ in prompts)", "raised ZeroDivisionError"),
        ("return 3", "returned no list of verdicts: 'int' object is not iterable"),
    ],
)
def test_functions_that_judge_nothing_are_named(tmp_path, body, words):
    with pytest.raises(SourceFailed) as caught:
        function(tmp_path, body, 0.2)(["p", "q"], ["a", "b"], ["c", "d"], [])
    assert f"{tmp_path / 'j.py'}:better {words}" in str(caught.value)


def test_a_function_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"--judge-function: .* has no function worse; define"):
        function(tmp_path, "return []")
        judge.load_judge_function(f"{tmp_path / 'j.py'}:worse", 5.0, 4)


# ------------------------------------------------------------------------------------- templates


def test_templates_are_text_or_a_file_and_name_their_fields(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("{prompt}? {first} or {second}:\n\n")
    assert judge.read_template(str(path), "", judge.PAIR) == "{prompt}? {first} or {second}:"
    assert judge.read_template("{prompt} {completion}", "", judge.SINGLE) == "{prompt} {completion}"
    assert judge.read_template(None, "mine", judge.PAIR) == "mine"
    with pytest.raises(UsageError, match=r"lacks \{second\}; give a file, or a text"):
        judge.read_template("{prompt} {first}" * 1000, "", judge.PAIR)
    for template, fields in ((judge.COMPARISON, judge.PAIR), (judge.QUESTION, judge.SINGLE)):
        assert judge.read_template(template, "", fields) == template


def test_braces_in_answers_are_only_text():
    values = {"prompt": " {first} ", "first": "{second}{other}", "second": "\\1"}
    text = judge.fill("{prompt}|{first}|{second}|{third} {{", values)
    assert text == "{first}|{second}{other}|\\1|{third} {{"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert judge.fill("{prompt}", {"prompt": messages}) == "user: hi\nassistant: yo"


# --------------------------------------------------------------------------------------- labels


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Backbone:
    return Backbone.load(save_tiny(tmp_path_factory.mktemp("judge") / "model"))


def log_prob(backbone: Backbone, text: str, label: str, special: bool = True) -> float:
    """The definition: log-softmax of all logits, label tokens in turn, one text alone."""
    prompt, ids = (
        backbone.tokenizer(t, add_special_tokens=special)["input_ids"] for t in (text, text + label)
    )
    assert ids[: len(prompt)] == prompt
    with torch.no_grad():
        log_p = backbone.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    label_ids = ids[len(prompt) :]
    return log_p[len(prompt) - 1 : -1][range(len(label_ids)), label_ids].sum().item()


# one token each; several, the same but for the last; several, apart from the start; one begins
# with tokens that the other has in common
@pytest.mark.parametrize("labels", [("A", "B"), ("one", "on"), ("latte", "scones"), ("tea", "ten")])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_preferences_are_those_of_all_logits(backbone, labels, batch_size):
    reader = LabelReader(backbone, "{prompt} is {completion}:", labels, batch_size)
    values = [
        {"prompt": "a large tea and two scones", "completion": "one latte please"},
        {"prompt": "tea", "completion": ""},
        {"prompt": "Anything else?", "completion": "That is 7 euros."},
        {"prompt": "two", "completion": "scones and a large tea, please"},
    ]
    found = reader.read(values, list("abcd"))
    for opinion, each in zip(found, values, strict=True):
        text = f"{each['prompt']} is {each['completion']}:"
        one, other = (log_prob(backbone, text, " " + label) for label in labels)
        assert opinion.preference == pytest.approx(one - other, abs=2e-5)
        mass = torch.tensor([one, other], dtype=torch.float64).exp().sum().item()
        assert opinion.mass == pytest.approx(mass, rel=2e-5)


def test_labels_that_differ_in_their_last_token_share_a_row(backbone, monkeypatch):
    rows, whole = [], backbone.hidden
    monkeypatch.setattr(
        backbone, "hidden", lambda *given: rows.append(len(given[1])) or whole(*given)
    )
    for labels, of_each in ((("A", "B"), 1), (("latte", "scones"), 2)):
        reader = LabelReader(backbone, "{prompt}", labels, 4)
        reader.read([{"prompt": "tea"}, {"prompt": "two"}], ["a", "b"])
        assert rows.pop() == 2 * of_each and not rows


def test_a_chat_template_wraps_the_question(backbone, monkeypatch):
    plain = LabelReader(backbone, "{prompt}?", ["one", "two"], 2)
    monkeypatch.setattr(backbone.tokenizer, "chat_template", CHAT)
    reader = LabelReader(backbone, "{prompt}?", ["one", "two"], 2)
    (opinion,) = reader.read([{"prompt": "tea"}], ["a"])
    one, other = (log_prob(backbone, "<user>tea?\n<assistant>", w, False) for w in ("one", "two"))
    assert opinion.preference == pytest.approx(one - other, abs=2e-5)
    assert plain.read([{"prompt": "tea"}], ["a"])[0].preference != opinion.preference


def test_labels_that_are_one_or_begin_the_other_are_refused(backbone):
    for labels in (["A", "A"], ["two", "two scones"], ["two scones", "two"]):
        with pytest.raises(UsageError, match="one is the other, or how it begins"):
            LabelReader(backbone, "{prompt}", labels, 2)


def test_a_text_that_does_not_fit_the_judge_names_its_prompt(backbone):
    reader = LabelReader(backbone, "{prompt} {completion}", ["yes", "no"], 2)
    with pytest.raises(UsageError, match=r"file:7: the judge would read \d+ tokens, but the cont"):
        reader.read([{"prompt": "tea " * 40, "completion": "tea " * 40}], ["file:7"])
    rows = [{"prompt": "tea"}, {"prompt": "tea " * 20}]
    prompts = encode_prompts(rows, backbone.tokenizer, 64)
    judge.check_room(reader, judge.SINGLE, prompts, 20)
    with pytest.raises(UsageError, match="row 2: the judge would read"):
        judge.check_room(reader, judge.SINGLE, prompts, 45)
    judge.check_room(reader, judge.SINGLE, prompts, 23)
    of_pairs = LabelReader(backbone, "{prompt} {first} {second}", ["yes", "no"], 2)
    with pytest.raises(UsageError, match="row 2: the judge would read"):  # there are two answers
        judge.check_room(of_pairs, judge.PAIR, prompts, 23)


def test_the_judge_is_the_backbone_where_it_is_its_base(backbone, tmp_path):
    config = CompareConfig(
        first="base", second="base", data="d", out="o",
        model=backbone.name, judge_model=backbone.name + "/.",
    )  # fmt: skip
    assert judge.open_reader(config, backbone, "{prompt}", ["A", "B"]).backbone is backbone
    other = save_tiny(tmp_path / "other", seed=3)
    config = EvaluateConfig(data="d", model=backbone.name, judge_model=str(other))
    reader = judge.open_reader(config, backbone, "{prompt}", ["yes", "no"])
    assert reader.backbone.identity["weights"] != backbone.identity["weights"]
