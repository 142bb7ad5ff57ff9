"""Where rewards come from: functions, endpoints and models with tokenizers of their own."""

from __future__ import annotations

import json
import re
import runpy
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from _commands import read_jsonl, refused, run, save_reward, write_jsonl
from _tiny import SHAPE, save_tiny, tiny_model

from perl import cli, reward_sources
from perl.backbone import Backbone
from perl.cafe import build_tokenizer
from perl.config import ReinforceConfig, UsageError
from perl.functions import SourceFailed
from perl.reward_sources import endpoint, load_reward_function, reencode

# ---------------------------------------------------------------------------------- functions


def write(tmp_path, body: str) -> str:
    (tmp_path / "f.py").write_text(body)
    return f"{tmp_path / 'f.py'}:score"


def test_a_reward_function_is_loaded_and_called(tmp_path):
    function = load_reward_function(
        write(
            tmp_path,
            "def score(prompts, completions):\n"
            "    return [len(p) + 10 * len(c) for p, c in zip(prompts, completions)]\n",
        ),
        timeout=5.0,
    )
    assert function(["a", "bb"], ["x", ""]) == [11.0, 2.0]


@pytest.mark.parametrize(
    "target, words",
    [
        ("score", "want FILE.py:NAME"),
        ("absent.py:score", "absent.py does not exist"),
        ("f.py:", "want FILE.py:NAME"),
    ],
)
def test_targets_that_name_no_function(target, words):
    with pytest.raises(UsageError, match=words):
        load_reward_function(target, 5.0)


@pytest.mark.parametrize(
    "body, words",
    [
        ("def scored(): pass", "has no function score"),
        ("score = 3", "has no function score"),
        ("def score(:", "fails to import: SyntaxError"),
        ("import nowhere_to_be_found", "fails to import: ModuleNotFoundError"),
    ],
)
def test_files_that_do_not_hold_it(tmp_path, body, words):
    with pytest.raises(UsageError, match=words):
        load_reward_function(write(tmp_path, body), 5.0)


def test_a_file_may_hold_what_looks_its_own_module_up(tmp_path):
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Scale:\n    by: float\n"
        "def score(p, c): return [Scale(2.0).by] * len(c)"
    )
    assert load_reward_function(write(tmp_path, body), 5.0)(["a"], ["x"]) == [2.0]


@pytest.mark.parametrize(
    "value, words",
    [
        ("[1.0]", "1 rewards for 2 completions"),
        ("[1.0, float('nan')]", "nan for completion 'y' of prompt 'b'"),
        ("None", "no list of numbers"),
        ("['high', 1]", "no list of numbers"),
        ("'12'", "no list of numbers"),
        ("1 / 0", "ZeroDivisionError.*on line 1 for 2 prompts .the first 'a', answered 'x'"),
    ],
)
def test_wrong_return_values_are_refused(tmp_path, value, words):
    function = load_reward_function(write(tmp_path, f"def score(p, c): return {value}"), 5.0)
    with pytest.raises(SourceFailed, match=words):
        function(["a", "b"], ["x", "y"])


@pytest.mark.parametrize(
    "hang",
    [
        "time.sleep(60)",
        "re.fullmatch('(a+)+', 'a' * 40 + 'b')",  # holds the interpreter's lock, for hours
        "threading.Lock().acquire() and (lock := threading.Lock()).acquire() and lock.acquire()",
    ],
)
def test_a_function_that_hangs_is_interrupted_where_it_stands(tmp_path, hang):
    body = f"import re, threading, time\ndef score(p, c):\n    if p[0] == 'hang':\n        {hang}\n"
    function = load_reward_function(write(tmp_path, body + "    return [1.0]\n"), timeout=0.2)
    start = time.monotonic()
    with pytest.raises(SourceFailed, match="longer than 0.2 s on line 4 .*--reward-timeout"):
        function(["hang"], ["x"])
    assert time.monotonic() - start < 5.0
    assert function(["go"], ["x"]) == [1.0]
    time.sleep(0.3)  # no alarm is left


def test_outside_of_the_main_thread_a_function_has_no_limit(tmp_path):
    body = "import time\ndef score(p, c):\n    time.sleep(0.2)\n    return [1.0]\n"
    function, found = load_reward_function(write(tmp_path, body), timeout=0.1), []
    thread = threading.Thread(target=lambda: found.append(function(["a"], ["x"])))
    thread.start()
    thread.join()
    assert found == [[1.0]]


# ---------------------------------------------------------------------------------- endpoints


@pytest.fixture
def server(monkeypatch):
    """A reward server on a free port: `plan` has what it does, one item a request, then rewards.

    An item is a status, the bytes of a 200, or seconds to be silent.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append(body)
            what = self.server.plan.pop(0) if self.server.plan else None
            if isinstance(what, float):
                time.sleep(what)
            if what == "drop":
                return
            status = what if isinstance(what, int) else 200
            rewards = [float(len(text)) for text in body["completions"]]
            answer = what if isinstance(what, bytes) else json.dumps({"rewards": rewards}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    monkeypatch.setattr(reward_sources, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.plan, server.asked = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/reward"
    threading.Thread(target=server.serve_forever, daemon=True, args=(0.01,)).start()
    yield server
    server.shutdown()
    server.server_close()


MESSAGES = [{"role": "user", "content": "tea?"}]


def test_an_endpoint_is_sent_prompts_and_completions(server):
    rewards = endpoint(server.url, 5.0, 0)(["a", MESSAGES], ["xyz", "ü"])
    assert rewards == [3.0, 1.0]
    assert server.asked == [{"prompts": ["a", MESSAGES], "completions": ["xyz", "ü"]}]


def test_what_may_pass_is_asked_again(server, capsys, monkeypatch):
    monkeypatch.setattr(reward_sources, "LONGEST_WAIT", 0.05)
    server.plan = [500, 429, "drop", 1.0, 503]
    assert endpoint(server.url, 0.3, 5)(["a"], ["xyz"]) == [3.0]
    assert len(server.asked) == 6
    said = capsys.readouterr().err
    for words in ("answered 500", "answered 429", "could not be asked", "silent for 0.3 s"):
        assert words in said
    waits = [float(wait) for wait in re.findall(r"asked again in (\S+) s", said)]
    assert waits == [0.01, 0.02, 0.04, 0.05, 0.05]


@pytest.mark.parametrize(
    "plan, words, requests",
    [
        ([500] * 3, "answered 500 .* 3 times", 3),
        ([404], "answered 404 Not Found; correct --reward-url", 1),
        ([b"<!doctype html>"], "answered '<!doctype html>'; want", 1),
        ([b'{"scores": [1]}'], "answered '.\"scores\": .1..'; want", 1),
        ([b"[1]"], "answered '.1.'; want", 1),
        ([b'{"rewards": 3}'], "no list of numbers", 1),
        ([b'{"rewards": [1]}'], "1 rewards for 2", 1),
        ([b'{"rewards": [1, null]}'], "no list of numbers", 1),
        ([b'{"rewards": [1, NaN]}'], "returned nan for completion 'y' of prompt 'b'", 1),
    ],
)
def test_endpoints_that_do_not_reward_are_named(server, plan, words, requests):
    server.plan = list(plan)
    with pytest.raises(SourceFailed, match=words) as failure:
        endpoint(server.url, 5.0, retries=2)(["a", "b"], ["x", "y"])
    assert server.url in str(failure.value) and len(server.asked) == requests


# ------------------------------------------------------------------------------------ commands

PROMPTS = ["one latte please", "a large tea", "two scones and a tea", "a latte"]


def make_base(folder):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return save_tiny(folder / "base")


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path)


def reinforce(tmp_path, *flags) -> list:
    return [
        "reinforce", "--model", tmp_path / "base", "--data", tmp_path / "prompts.jsonl",
        "--out", tmp_path / "run", "--steps", 3, "--prompts-per-step", 2, "--max-new-tokens", 4,
        "--lora-rank", 2, "--device", "cpu", "--threads", 1, *flags,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Figures take longer than these runs."""
    monkeypatch.setattr("perl.cli._report", lambda config: None)


def test_an_endpoint_rewards_a_policy_and_evaluates_it(tmp_path, base, server, capsys):
    run(capsys, *reinforce(tmp_path, "--reward-url", server.url))
    asked = server.asked
    assert asked[0] == {"prompts": [PROMPTS[0]], "completions": [PROMPTS[0]]}  # before the model
    assert [len(body["prompts"]) for body in asked] == [1, 4, 2, 2, 2, 4]
    last = read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert last["reward"] == sum(map(len, asked[-2]["completions"])) / 2
    figures = json.loads(run(
        capsys, "evaluate", "--model", base, "--data", tmp_path / "prompts.jsonl", "--reward-url",
        server.url, "--batch-size", 3, "--max-new-tokens", 4, "--temperature", 0,
    ))  # fmt: skip
    assert [len(body["prompts"]) for body in server.asked[-2:]] == [3, 1]
    texts = [text for body in server.asked[-2:] for text in body["completions"]]
    assert figures["reward"] == pytest.approx(sum(map(len, texts)) / 4)


def test_a_wrong_url_costs_no_model_and_no_folder(tmp_path, base, server, capsys, monkeypatch):
    monkeypatch.setattr(Backbone, "load", lambda *args, **keywords: pytest.fail("was loaded"))
    server.plan = [404]
    assert "answered 404" in refused(capsys, *reinforce(tmp_path, "--reward-url", server.url))
    server.plan = [503]
    assert "answered 503" in refused(capsys, *reinforce(tmp_path, "--reward-url", server.url))
    assert len(server.asked) == 2
    flags = ["--reward-url", "http://127.0.0.1:9/", "--reward-retries", "0"]
    assert "could not be asked" in refused(capsys, *reinforce(tmp_path, *flags))
    flags = ["--reward-function", tmp_path / "absent.py:f"]
    assert "does not exist" in refused(capsys, *reinforce(tmp_path, *flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"reward_url": "localhost:8000"}, "--reward-url is 'localhost:8000'; want http://"),
        ({"reward_url": "http://host:port/"}, "want http://"),
        ({"reward_url": "http://h/", "reward_function": "f.py:f"}, "exactly one .* 2 given"),
        ({"reward_function": "f.py:f", "reward_retries": 2}, "--reward-retries is for"),
        ({"reward_model": "r", "reward_timeout": 2.0}, "--reward-timeout is for"),
        ({}, "exactly one .* none given"),
    ],
)
def test_flags_of_other_sources_are_refused(flags, words):
    with pytest.raises(UsageError, match=words):
        ReinforceConfig(model="m", data="d", out="o", **flags)


def test_defaults_belong_to_their_source():
    common = dict(model="m", data="d", out="o")
    by_url = ReinforceConfig(**common, reward_url="http://h/")
    assert (by_url.reward_timeout, by_url.reward_retries) == (180.0, 5)
    by_function = ReinforceConfig(**common, reward_function="f.py:f", reward_timeout=3)
    assert (by_function.reward_timeout, by_function.reward_retries) == (3.0, None)


# --------------------------------------------------------------------------- failures in a run

FAILING = """
import os, time
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def vowels(prompts, completions):
    CALLS.touch()
    with CALLS.open("a") as calls:
        calls.write(".")
    if CALLS.stat().st_size == {at} and not os.environ.get("REPAIRED"):
        {failure}
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
"""


def vowels(folder, at: int = 0, failure: str = "pass") -> list[str]:
    """A training on a function that fails at that call."""
    (folder / "reward.py").write_text(FAILING.format(at=at, failure=failure))
    return list(map(str, reinforce(
        folder, "--reward-function", f"{folder / 'reward.py'}:vowels", "--lora-dropout", 0.2,
        "--steps", 5, "--lr", 1e-2, "--validation", folder / "prompts.jsonl", "--validate-every",
        2, "--reward-timeout", 2, "--checkpoint-every", 3,
    )))  # fmt: skip


def lines_of(folder) -> tuple[list[dict], list[dict], dict]:
    """Metrics, without times and memory, samples, and what the guards have seen."""
    unlike = ("_s", "peak_memory_bytes")
    metrics = [
        {k: v for k, v in row.items() if not k.endswith(unlike)}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]
    state = json.loads((folder / "checkpoints/step-5/state.json").read_text())
    return metrics, read_jsonl(folder / "samples.jsonl"), state["guards"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run says."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_report", lambda config: None)
        make_base(folder)
        assert cli.main(vowels(folder)) == 0
    metrics, samples, guards = lines_of(folder / "run")
    assert len(metrics) == 6 and len(samples) == 8 and len(guards["first"]) == 5
    return metrics, samples, guards


# Calls: 1 samples, 2 and 3 validation; 4 step 1; 5 step 2, 6 and 7 validation; 8 step 3; 9 step 4,
# 10 and 11 validation. A checkpoint is due at step 3, and a failure in steps 3 and 4 finds whole
# what step 2 and 3 left; one in a validation comes behind the update.
@pytest.mark.parametrize(
    "at, failure, words, kept",
    [
        (8, "raise KeyError('latte')", "KeyError: 'latte' on line 12", 2),
        (9, "time.sleep(60)", "longer than 2 s on line 12", 3),
        (10, "return [float('inf')] * 9", "returned 9 rewards for 2 completions", 3),
        (6, "return [float('inf')] * 2", "returned inf for completion", 0),
    ],
)
def test_a_source_that_fails_in_a_run_loses_nothing(
    tmp_path, base, capsys, monkeypatch, whole, at, failure, words, kept
):
    code = cli.main(vowels(tmp_path, at, failure))
    said = capsys.readouterr().err.splitlines()[-1]
    folder = tmp_path / "run"
    assert words in said and code == (4 if kept else 2)
    if kept:
        assert f"step-{kept} is kept; go on with: python -m perl reinforce --out {folder}" in said
    monkeypatch.setenv("REPAIRED", "1")
    run(capsys, "reinforce", "--out", folder, "--resume")
    assert lines_of(folder) == whole


# --------------------------------------------------------------- a model with its own tokenizer


def save_stranger(folder, seed: int = 5, template: bool = False):
    """A sequence classifier of another shape and with another tokenizer than the policy."""
    tokenizer = build_tokenizer(["what would you like", "tea with milk", "scones?"], vocab_size=270)
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    model = tiny_model("llama", seed, scalar=True, vocab_size=270, num_hidden_layers=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("template", [False, True])
def test_a_model_with_its_own_tokenizer_reads_the_text(tmp_path, base, capsys, template):
    """Its scores are those of transformers' classifier for the text in its own tokens."""
    model, tokenizer = save_stranger(tmp_path / "stranger", template=template)
    ours = save_reward(tmp_path / "rm", base, 3)
    prompts = PROMPTS
    if template:
        prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    run(capsys, *reinforce(
        tmp_path, "--reward-model", tmp_path / "stranger", "--steps", 1, "--micro-batch-size", 1
    ))  # fmt: skip
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    assert [sample["prompt"] for sample in samples[:4]] == prompts

    def definition(prompt, text) -> float:
        if template:
            messages = [*prompt, {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            ids = ids["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([ids + [tokenizer.eos_token_id]])
        with torch.no_grad():
            return model(ids).logits.item()

    wanted = [definition(sample["prompt"], sample["completion"]) for sample in samples]
    assert [sample["reward"] for sample in samples] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert max(wanted) - min(wanted) > 1e-2
    argv = [
        "evaluate", "--model", base, "--data", tmp_path / "prompts.jsonl", "--max-new-tokens", 4,
        "--temperature", 0, "--device", "cpu", "--reward-model",
    ]  # fmt: skip
    alone, other, both = (
        json.loads(run(capsys, *argv, *folders))["reward"]
        for folders in ([tmp_path / "stranger"], [ours], [tmp_path / "stranger", ours])
    )
    assert both == pytest.approx((alone + other) / 2, rel=1e-4) and alone != pytest.approx(other)
    run(capsys, "generate", "--model", base, "--data", tmp_path / "prompts.jsonl",
        "--max-new-tokens", 4, "--temperature", 0, "--out", tmp_path / "answers.jsonl")  # fmt: skip
    answers = read_jsonl(tmp_path / "answers.jsonl")
    wanted = [definition(row["prompt"], row["completion"]) for row in answers]
    assert alone == pytest.approx(sum(wanted) / 4, rel=1e-4, abs=1e-5)


def test_text_too_long_for_such_a_model_is_named_or_cut(tmp_path, base):
    save_stranger(tmp_path / "stranger")
    backbone = Backbone.load(base)
    folder = tmp_path / "stranger"
    with pytest.raises(UsageError, match="another tokenizer"):
        backbone.load_role("reward", folder, scalar=True)
    backbone.load_role("reward", folder, scalar=True, own_tokenizer=True)
    tokenizer, context = backbone.tokenizer_of("reward"), SHAPE["max_position_embeddings"]
    prompt = "what would you like " * 30
    with pytest.raises(SourceFailed, match="what would you like .* holds 64; give --truncate"):
        reencode(backbone, "reward", [prompt], ["tea"], truncate_prompts=False)
    (ids,) = reencode(backbone, "reward", [prompt], ["tea"], truncate_prompts=True)
    tail = tokenizer("tea", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert len(ids) == context and ids[0] == tokenizer.bos_token_id and ids[-len(tail) :] == tail


def test_an_adapter_of_another_base_is_no_model_of_its_own(tmp_path, base, capsys):
    save_reward(tmp_path / "rm", save_tiny(tmp_path / "other", seed=9), 3)
    capsys.readouterr()  # transformers' progress bar
    said = refused(capsys, *reinforce(tmp_path, "--reward-model", tmp_path / "rm"))
    assert "belongs to another base" in said and not (tmp_path / "run").exists()


def test_the_documented_server_answers(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = Path(__file__).parents[1] / "docs/reward_server.py"
    handler = runpy.run_path(str(path))["Handler"]
    monkeypatch.setattr(handler, "log_message", lambda *args: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True, args=(0.01,)).start()
        ask = endpoint(f"http://127.0.0.1:{server.server_port}/", 5.0, 0)
        assert ask(["a", MESSAGES], ["ten " * 10, "five " * 5]) == [0.0, -0.5]
        server.shutdown()
