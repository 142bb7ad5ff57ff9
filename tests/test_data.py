"""Rows, tokens and batches; the published Taskmaster format against rows rendered elsewhere."""

from __future__ import annotations

import collections
import gzip
import json
import random
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from perl import data
from perl.config import UsageError

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.fixture
def tokenizer():
    """One token per word: <bos> 1, <eos> 2, and w0, w1, ... from 10 on."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "user": 3, "assistant": 4, ":": 5, "<unk>": 6}
    words |= {f"w{i}": 10 + i for i in range(90)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def write(path, *rows, text: str | None = None):
    path.write_text(text if text is not None else "\n".join(json.dumps(r) for r in rows) + "\n")
    return path


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------- reading


def test_jsonl_json_parquet_and_gzip_hold_the_same_rows(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"prompt": "a\u2028b", "completion": "ü", "label": True},
        {"prompt": "c", "completion": "", "label": False},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines + "\n\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "lines.json", "a.jsonl.gz", "a.parquet"):
        assert data.read_rows(tmp_path / name) == rows, name


def test_messages_survive_parquet(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    assert data.row_kind(data.read_rows(tmp_path / "m.parquet")) == "messages"


def test_bad_files_are_refused_with_the_line(tmp_path):
    read = data.read_rows
    assert "does not exist" in refusal(read, tmp_path / "no.jsonl")
    assert "is a folder" in refusal(read, tmp_path)
    assert "holds no rows" in refusal(read, write(tmp_path / "e.jsonl", text=" \n\n"))
    assert "holds no rows" in refusal(read, write(tmp_path / "e.json", text="[]"))
    good = json.dumps(PAIR)
    bad = write(tmp_path / "b.jsonl", text=f'{good}\n\n{{"prompt": "x",}}\n{good}\n')
    assert f"{bad}:3: bad JSON" in refusal(read, bad)
    table = write(tmp_path / "t.csv", text="prompt,completion\nhi,there\n")
    assert "want one JSON object on each line" in refusal(read, table)
    assert "c.json:2: bad JSON" in refusal(read, write(tmp_path / "c.json", text='[\n{"a": }]'))
    number = write(tmp_path / "n.jsonl", text=f"{good}\n7\n")
    assert f"{number}:2: int where an object" in refusal(read, number)
    binary = tmp_path / "x.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in refusal(read, binary)
    fake = write(tmp_path / "f.parquet", text="no parquet")
    assert "is not Parquet" in refusal(read, fake)


@pytest.mark.parametrize(
    "row, kind",
    [
        (PAIR, "pairwise"),
        ({"prompt": "p", "completion": "c", "label": 0.5, "id": 3}, "pointwise"),
        ({"prompt": "p", "completion": "c"}, "completion"),
        ({"prompt": "p", "label": True}, "prompt"),
        ({"text": "t"}, "text"),
        ({"messages": [{"role": "user", "content": "q"}]}, "messages"),
    ],
)
def test_kind_by_columns(row, kind):
    assert data.row_kind([row, row]) == kind


@pytest.mark.parametrize(
    "row, words",
    [
        (
            {"prompt": "p", "chosen": "c"},
            "no rejected; pairwise rows have prompt, chosen, rejected",
        ),
        ({**PAIR, "rejected": None}, "no rejected"),
        ({**PAIR, "chosen": 3}, "chosen is int; want text"),
        ({**PAIR, "prompt": [{"role": "user"}]}, "not a list of {role, content}"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, words):
    file = write(tmp_path / "p.jsonl", PAIR, PAIR, row)
    message = refusal(data.row_kind, data.read_rows(file))
    assert f"{file}:3: " in message and words in message


def test_the_first_row_may_be_the_one_that_lacks_a_column(tmp_path):
    file = write(tmp_path / "p.jsonl", {"prompt": "p", "chosen": "c"}, PAIR)
    assert f"{file}:1: no rejected" in refusal(data.row_kind, data.read_rows(file))


@pytest.mark.parametrize("label", ["yes", 2, -0.1, [1]])
def test_bad_labels_are_refused(label):
    row = {"prompt": "p", "completion": "c", "label": label}
    assert "row 1: label is" in refusal(data.row_kind, [row])


def test_want_kind_takes_prompts_from_any_rows_that_have_them():
    assert data.want_kind([PAIR], ["prompt"], "reinforce") == "prompt"
    assert "sft wants {text}" in refusal(data.want_kind, [PAIR], ["text"], "sft")
    assert "no known kind of row" in refusal(data.row_kind, [{"a": 1}])


# ------------------------------------------------------------------------ published formats


@pytest.mark.parametrize("number", ["00", "03", "06"])
def test_taskmaster_reader_renders_as_the_published_rows_were_rendered(shared_data, number):
    read = data.read_rows(shared_data / f"raw/taskmaster_coffee/reward_{number}.json")
    rendered = {}
    for split in ("train", "validation"):
        for row in data.read_rows(shared_data / f"pointwise/taskmaster_coffee.{split}.jsonl"):
            rendered[row["prompt"], row["completion"]] = row["label"]
    assert data.row_kind(read) == "pointwise"
    assert len(read) > 150
    for row in read:
        assert rendered[row["prompt"], row["completion"]] == row["label"]


def test_taskmaster_rows_without_context_are_left_out_and_counted(shared_data):
    rows = data.read_rows(shared_data / "raw/taskmaster_coffee/reward_06.json")
    assert len(rows) == 196 and rows.notes == ["1 taskmaster rows without a signal left out"]


def test_hh_dialogs_split_at_the_last_assistant_turn(tmp_path):
    shared_part = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    file = write(
        tmp_path / "hh.jsonl",
        {"chosen": shared_part + " good", "rejected": shared_part + " bad"},
        {"chosen": shared_part + " same", "rejected": shared_part + " same"},
        {"chosen": shared_part + " x", "rejected": "\n\nHuman: other\n\nAssistant: y"},
    )
    rows = data.read_rows(file)
    assert rows == [{"prompt": shared_part, "chosen": " good", "rejected": " bad"}]
    assert rows.notes == ["2 hh rows without a signal left out"]
    assert data.row_kind(rows) == "pairwise"


def test_tldr_and_shp(tmp_path):
    info = {"id": "t3", "subreddit": "tea", "title": "Cups", "post": "Long."}
    sides = [{"text": " short", "policy": "x"}, {"text": " wrong", "policy": "y"}]
    file = write(
        tmp_path / "t.jsonl",
        {"info": info, "summaries": sides, "choice": 0},
        {"info": info, "summaries": sides, "choice": 1},
    )
    prompt = "SUBREDDIT: r/tea\nTITLE: Cups\nPOST: Long.\nTL;DR:"
    assert data.read_rows(file, "tldr") == [
        {"prompt": prompt, "chosen": " short", "rejected": " wrong"},
        {"prompt": prompt, "chosen": " wrong", "rejected": " short"},
    ]
    base = {"history": "why?", "human_ref_A": "a", "human_ref_B": "b", "score_A": 9, "score_B": 1}
    file = write(tmp_path / "s.jsonl", {**base, "labels": 1}, {**base, "labels": 0})
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in data.read_rows(file)] == [
        ("POST: why?\n\nRESPONSE:", " a", " b"),
        ("POST: why?\n\nRESPONSE:", " b", " a"),
    ]


def test_a_format_that_is_insisted_on_names_the_row_that_is_not(tmp_path):
    file = write(tmp_path / "t.jsonl", PAIR)
    assert f"{file}:1: no info, summaries, choice; tldr rows have" in refusal(
        data.read_rows, file, "tldr"
    )
    file = write(tmp_path / "u.jsonl", {"info": 3, "summaries": [], "choice": 0})
    assert f"{file}:1: not a tldr row: IndexError" in refusal(data.read_rows, file, "tldr")

    assert "format is 'csv'; want auto, taskmaster" in refusal(data.read_rows, file, "csv")


def test_every_published_file_is_what_its_folder_says(shared_data):
    kinds = {
        "pairwise": {"pairwise"},
        "derived_pairwise": {"pairwise"},
        "pointwise": {"pointwise"},
        "rl_prompts": {"prompt"},
        "sft": {"completion", "messages", "text"},
    }
    text = (shared_data / "README.md").read_text()
    table = re.findall(r"^\| (\S+)/(\S+\.jsonl) \| (\d+) \|", text, flags=re.MULTILINE)
    assert len(table) > 30
    for folder, name, count in table:
        rows = data.read_rows(shared_data / folder / name)
        assert (len(rows), data.row_kind(rows) in kinds[folder]) == (int(count), True), name


# ----------------------------------------------------------------------------------- tokens


def test_prompt_and_answer_meet_where_generation_starts(tokenizer):
    rows = [{"prompt": "w0 w1", "completion": "w2"}]
    [example] = data.encode_examples(rows, "completion", tokenizer, data.Limit(9))
    assert example == data.Example([1, 10, 11, 12, 2], [False, False, False, True, True])
    [prompt] = data.encode_prompts(rows, tokenizer, 9)
    assert prompt == example.ids[:3]
    [pair] = data.encode_pairs(
        [{"prompt": "w0", "chosen": "w1", "rejected": "w2 w3"}], tokenizer, data.Limit(9)
    )
    assert pair == data.Pair([1, 10, 11, 2], [1, 10, 12, 13, 2]) and len(pair) == 5
    [labelled] = data.encode_labelled(
        [{"prompt": "w0", "completion": "w1", "label": True}], tokenizer, data.Limit(9)
    )
    assert labelled == data.Labelled([1, 10, 11, 2], 1.0)


def test_texts_over_the_limit_become_windows_that_lose_nothing(tokenizer):
    text = " ".join(f"w{i}" for i in range(9))
    examples = data.encode_examples([{"text": text}], "text", tokenizer, data.Limit(4))
    assert [e.ids for e in examples] == [[1, 10, 11, 12], [13, 14, 15, 16], [17, 18, 2]]
    assert all(e.targets == [False] + [True] * (len(e) - 1) for e in examples)


def test_messages_learn_every_assistant_turn_and_nothing_else(tokenizer):
    messages = [
        {"role": "user", "content": "w0"},
        {"role": "assistant", "content": "w1"},
        {"role": "user", "content": "w2"},
        {"role": "assistant", "content": "w3"},
    ]
    [example] = data.encode_examples(
        [{"messages": messages}], "messages", tokenizer, data.Limit(99)
    )
    learned = [i for i, t in zip(example.ids, example.targets, strict=True) if t]
    assert learned == [11, 2, 13, 2]
    assert example.ids == [1, 3, 5, 10, 4, 5, 11, 2, 3, 5, 12, 4, 5, 13, 2]
    assert data.prompt_ids(messages[:1], tokenizer) == example.ids[:6]
    assert data.answer_ids(messages[:1], messages[1:2], tokenizer) == [11, 2]


def test_messages_follow_the_chat_template(tokenizer):
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    messages = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
    [example] = data.encode_examples(
        [{"messages": messages}], "messages", tokenizer, data.Limit(99)
    )
    assert example.ids == [1, 3, 5, 10, 2, 4, 5, 11, 2]
    assert example.targets == [False] * 7 + [True, True]
    assert data.prompt_ids(messages[:1], tokenizer) == example.ids[:7]


def test_messages_without_an_answer_are_refused(tokenizer):
    rows = [{"messages": [{"role": "user", "content": "w0"}]}]
    assert "row 1: no assistant message" in refusal(
        data.encode_examples, rows, "messages", tokenizer, data.Limit(9)
    )


def test_a_long_prompt_is_refused_cut_or_left_out_as_told(tokenizer):
    rows = [{"prompt": "w0 w1 w2 w3", "completion": "w4"}, {"prompt": "w5", "completion": "w6"}]
    message = refusal(data.encode_examples, rows, "completion", tokenizer, data.Limit(6))
    assert "row 1: 7 tokens (5 of prompt), but at most 6 fit" in message
    cut = data.encode_examples(rows, "completion", tokenizer, data.Limit(6, truncate_prompts=True))
    assert cut[0].ids == [1, 11, 12, 13, 14, 2]  # <bos> stays, w0 goes
    assert cut[1].ids == [1, 15, 16, 2]
    assert cut.notes == ["1 of 2 prompts cut on the left: longer than 6 tokens"]
    left = data.encode_examples(rows, "completion", tokenizer, data.Limit(6, drop_long=True))
    assert [e.ids for e in left] == [[1, 15, 16, 2]] and left.rows == rows[1:]
    assert left.notes == ["1 of 2 rows left out: longer than 6 tokens"]
    message = refusal(data.encode_prompts, rows, tokenizer, 4)
    assert "row 1: 5 tokens" in message and "--truncate-prompts" in message


def test_an_answer_that_cannot_fit_is_not_cut(tokenizer):
    rows = [{"prompt": "w0", "completion": "w1 w2 w3 w4 w5"}]
    message = refusal(
        data.encode_examples, rows, "completion", tokenizer, data.Limit(6, truncate_prompts=True)
    )
    assert "give --drop-long" in message
    both = data.Limit(6, truncate_prompts=True, drop_long=True)
    rows.append({"prompt": "w0 w1 w2 w3", "completion": "w4 w5"})
    [kept] = data.encode_examples(rows, "completion", tokenizer, both)
    assert kept.ids == [1, 12, 13, 14, 15, 2] and (both.cut, both.dropped) == (1, 1)
    assert "no row fits in 6 tokens" in refusal(
        data.encode_examples, rows[:1], "completion", tokenizer, data.Limit(6, drop_long=True)
    )


def test_both_sides_of_a_pair_keep_the_same_prompt(tokenizer):
    rows = [{"prompt": "w0 w1 w2", "chosen": "w3", "rejected": "w4 w5 w6"}]
    [pair] = data.encode_pairs(rows, tokenizer, data.Limit(6, truncate_prompts=True))
    assert pair == data.Pair([1, 12, 13, 2], [1, 12, 14, 15, 16, 2])


def test_limits_of_the_model():
    assert data.token_limit(0, 512) == 512 and data.token_limit(100, 512) == 100
    assert "--max-tokens is 600 but the model's context is 512" in refusal(
        data.token_limit, 600, 512
    )


# ---------------------------------------------------------------------------------- batches


def test_padding_on_either_side():
    ids, mask = data.pad([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = data.pad([[5, 6, 7], [8]], 9, left=True)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_an_epoch_sees_every_example_once_and_epochs_differ():
    examples = [[i] * (1 + i % 7) for i in range(40)]
    batches = data.Batches(examples, 4, seed=3)
    epochs = [[next(batches) for _ in range(10)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(e[0] for batch in epoch for e in batch) == list(range(40))
    assert epochs[0] != epochs[1]
    again = data.Batches(examples, 4, seed=3)
    assert [next(again) for _ in range(10)] == epochs[0]
    other = data.Batches(examples, 4, seed=4)
    assert [next(other) for _ in range(10)] != epochs[0]


def test_a_restored_iterator_goes_on_in_the_same_order():
    examples = list(map(str, range(37)))
    batches = data.Batches(examples, 5, seed=0)
    for _ in range(11):
        next(batches)
    state = json.loads(json.dumps(batches.state_dict()))
    expected = [next(batches) for _ in range(20)]
    restored = data.Batches(examples, 5, seed=0)
    restored.load_state_dict(state)
    assert [next(restored) for _ in range(20)] == expected
    assert "was started on 37 examples, the data file now gives 36" in refusal(
        data.Batches(examples[1:], 5, seed=0).load_state_dict, state
    )


def test_weighted_files_are_drawn_in_their_shares_and_resume():
    files = {"a": list(range(30)), "b": list(range(100, 106)), "c": [1000]}

    def load(path):
        encoded = data.Encoded()
        encoded.extend([value] for value in files[path])
        encoded.rows = encoded.places = [path] * len(encoded)
        encoded.notes = ["odd"]
        return encoded

    plain, held_out = data.load_files(["a", "b"], "c", load)
    assert plain.mixture == [] and len(plain) == 36 and list(held_out) == [[1000]]
    assert plain.notes == ["a: odd", "b: odd"] and plain.places[30] == "b"
    mixed, _ = data.load_files(["a=1", "b=3", "c=0.01"], None, load)
    # of 38 draws an epoch 9, 28 and 1 (however small its weight); all of a file before one again
    batches = data.Batches(mixed, 1, 0, mixed.mixture)
    counts = collections.Counter(next(batches)[0][0] for _ in range(10 * 38))
    assert [counts[value] for value in files["a"]] == [3] * 30
    assert sorted(counts[value] for value in files["b"]) == [46, 46, 47, 47, 47, 47]
    assert counts[1000] == 10
    batches = data.Batches(mixed, 5, 0, mixed.mixture)
    drawn = [next(batches) for _ in range(70)]
    assert drawn[:7] != drawn[7:14]
    again = data.Batches(mixed, 5, 0, mixed.mixture)
    again.load_state_dict({"epoch": 4, "position": 3, "examples": len(mixed)})
    assert [next(again) for _ in range(70 - 31)] == drawn[31:]


@pytest.mark.parametrize(
    "words, message",
    [
        (["a=1", "b"], "--data a=1 b: a weight is a share among several files"),
        (["a=1"], "a weight is a share among several files"),
        (["a=0", "b=1"], "--data a=0: weight '0' is no number above 0"),
        (["a=much", "b=1"], "weight 'much' is no number above 0"),
    ],
)
def test_files_that_do_not_go_together_are_refused(words, message):
    assert message in refusal(data.load_files, words, None, None)


def test_a_file_name_may_hold_an_equals_sign(tmp_path):
    file = write(tmp_path / "lr=3.jsonl", PAIR)
    seen = []

    def load(path):
        seen.append(path)
        return data.Encoded()

    data.load_files([str(file)], None, load)
    data.load_files([f"{file}=2", f"{file}=1"], None, load)
    assert seen == [str(file)] * 3


def test_padding_counts_what_pad_adds():
    ids, mask = data.pad([[5, 6, 7], [8]], 0)
    assert data.padding([[5, 6, 7], [8]]) == mask.numel() - mask.sum() == 2


def test_pairs_with_equal_answers_are_left_out_and_empty_answers_counted():
    message = [{"role": "assistant", "content": " "}]
    same = {**PAIR, "rejected": "c"}
    rows = data.Rows([PAIR, same, {**PAIR, "chosen": message}, same], ["p:1", "p:2", "p:3", "p:4"])
    kept = data.without_equal_pairs(rows)
    assert kept == [rows[0], rows[2]] and kept.places == ["p:1", "p:3"]
    data.note_empty(kept, ["chosen", "rejected"])
    assert kept.notes == [
        "2 pairs with equal answers left out, the first at p:2",
        "1 rows with an empty answer, the first at p:3",
    ]


def test_a_margin_is_read_where_all_pairs_have_one(tokenizer):
    rows = [{**PAIR, "margin": 0.5}, {**PAIR, "margin": 2}]
    assert data.row_kind(rows) == "pairwise"
    pairs = data.encode_pairs(rows, tokenizer, data.Limit(9))
    assert [pair.margin for pair in pairs] == [0.5, 2.0]
    assert "row 2: no margin" in refusal(data.row_kind, [rows[0], PAIR])
    for bad in (True, "1", float("nan"), float("inf")):
        assert "margin is" in refusal(data.row_kind, [{**PAIR, "margin": bad}])


def test_batches_of_like_length_pad_little():
    rng = random.Random(0)
    examples = [[0] * rng.randint(1, 200) for _ in range(512)]
    batches = data.Batches(examples, 8, seed=0)
    padded = real = 0
    for _ in range(64):
        batch = next(batches)
        padded += 8 * max(map(len, batch))
        real += sum(map(len, batch))
    assert real / padded > 0.85  # without buckets it is about 0.56


def test_a_batch_larger_than_the_data_is_all_of_it():
    batches = data.Batches(["a", "b", "c"], 8, seed=0)
    assert sorted(next(batches)) == sorted(next(batches)) == ["a", "b", "c"]
