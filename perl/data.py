"""Rows in, token batches out.

    file -> read_rows -> rows (dicts of text) -> encode_* -> examples (token ids) -> Batches -> pad
    FILE=WEIGHT ... -> load_files (each of them as above) -> examples of all, in shares -> Batches

`read_rows` takes JSONL, a JSON list or Parquet (.gz too), and turns the published formats of
Taskmaster, HH-RLHF, TL;DR comparisons and SHP into the same plain rows. `row_kind` tells by the
columns what rows are for. Text becomes tokens in one way everywhere: the prompt with the
tokenizer's special tokens, the answer without, then the end-of-sequence token; so a policy
continues a prompt exactly where training cut it. A value may also be a list of {role, content}
messages, rendered by the tokenizer's chat template, or as `role: content` lines without one.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl.config import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# kind -> columns, the most telling first: a file's columns are matched in this order
KINDS = {
    "pairwise": ("prompt", "chosen", "rejected"),
    "pointwise": ("prompt", "completion", "label"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}
OPTIONAL = {"pairwise": ("margin",)}  # kind -> columns that a file may have too, in all its rows


class Rows(list):
    """Rows of one file, each with the place it came from; `notes` says what was left out."""

    def __init__(self, rows: Sequence[dict], places: Sequence[str], notes: Sequence[str] = ()):
        super().__init__(rows)
        self.places = list(places)
        self.notes = list(notes)

    def first(self, count: int) -> Rows:
        """The first `count` rows; 0: all."""
        return Rows(self[:count], self.places[:count], self.notes) if count else self


# ---------------------------------------------------------------------------------------------
# Reading


def read_rows(path: str | Path, format: str = "auto") -> Rows:
    """The rows of a .jsonl, .json (a list, or JSON lines) or .parquet file, .gz allowed.

    format: "auto" tells published formats by their columns; "taskmaster", "hh", "tldr", "shp"
    insist on one. Raises UsageError, naming file and line, for a missing, unreadable or empty file
    and for a line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"data file {path} {what}; give a .jsonl, .json or .parquet file")
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            rows, places = _read_parquet(path)
        else:
            raw = gzip.open(path).read() if path.name.endswith(".gz") else path.read_bytes()
            rows, places = _read_json(raw.decode("utf-8-sig"), path)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path}: {error}; want UTF-8 JSON lines, a JSON list or Parquet"
        ) from None
    if not rows:
        raise UsageError(f"{path} holds no rows; give a file with at least one")
    return _plain(Rows(rows, places), format)


def _read_json(text: str, path: Path) -> tuple[list[dict], list[str]]:
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path}:{error.lineno}: bad JSON: {error.msg} (column "
                f"{error.colno}); mend the file"
            ) from None
        places = [f"{path} row {i}" for i in range(1, len(rows) + 1)]
    else:
        rows, places = [], []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"{path}:{number}: bad JSON: {error.msg} (column {error.colno}); want one "
                    "JSON object on each line, or one list: mend or remove the line"
                ) from None
            places.append(f"{path}:{number}")
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, dict):
            raise UsageError(
                f"{place}: {type(row).__name__} where an object like "
                '{"prompt": ..., "chosen": ..., "rejected": ...} is wanted'
            )
    return rows, places


def _read_parquet(path: Path) -> tuple[list[dict], list[str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{path}: Parquet needs pyarrow; `pip install pyarrow`, or give JSONL"
        ) from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is not Parquet: {str(error).splitlines()[0]}") from None
    return rows, [f"{path} row {i}" for i in range(1, len(rows) + 1)]


# ---------------------------------------------------------------------------------------------
# Published formats -> plain rows

# A converter returns the plain row, or None for one that carries no signal.
Converter = Callable[[dict], dict | None]


def _taskmaster(row: dict) -> dict | None:
    """Taskmaster reward files: context is a JSON list of turns, generation one turn, as text."""
    context, answer = (
        json.loads(v) if isinstance(v, str) else v for v in (row["context"], row["generation"])
    )
    if not context:
        return None
    return {
        "prompt": "".join(_turn(turn) + "\n" for turn in context),
        "completion": _turn(answer),
        "label": row["reward"] > 0,
        "id": row["conversation_id"],
    }


def _turn(turn: dict) -> str:
    """A Taskmaster turn on one line: `user: TEXT`, `agent: TEXT`, `api_call:`, `api_result:`."""
    if "api" in turn:
        return "api_call: " + json.dumps(turn["api"], ensure_ascii=False)
    if "response" in turn:
        return "api_result: " + json.dumps(turn["response"], ensure_ascii=False)
    return f"{turn['role']}: " + turn["text"].replace("\n", " ")


def _hh(row: dict) -> dict | None:
    """HH-RLHF: two whole dialogs that differ after their last "\\n\\nAssistant:"."""
    cut = "\n\nAssistant:"
    (prompt, mark, chosen), (other, _, rejected) = (
        row[side].rpartition(cut) for side in ("chosen", "rejected")
    )
    if not mark or prompt != other or chosen == rejected or not chosen or not rejected:
        return None
    return {"prompt": prompt + cut, "chosen": chosen, "rejected": rejected}


def _tldr(row: dict) -> dict | None:
    """Comparisons of TL;DR summaries: {info: {post, ...}, summaries: [{text}, {text}], choice}."""
    info, texts = row["info"], [summary["text"] for summary in row["summaries"]]
    chosen, rejected = texts[row["choice"]], texts[1 - row["choice"]]
    if chosen == rejected:
        return None
    heads = (
        ("SUBREDDIT: r/", "subreddit"),
        ("TITLE: ", "title"),
        ("POST: ", "post"),
        ("ARTICLE: ", "article"),
    )
    prompt = "\n".join(mark + info[key] for mark, key in heads if info.get(key))
    return {"prompt": prompt + "\nTL;DR:", "chosen": chosen, "rejected": rejected}


def _shp(row: dict) -> dict | None:
    """SHP: the post in `history`, two replies, and labels = 1 where reply A has more votes."""
    a, b = row["human_ref_A"], row["human_ref_B"]
    if a == b:
        return None
    chosen, rejected = (a, b) if row["labels"] == 1 else (b, a)
    return {
        "prompt": f"POST: {row['history']}\n\nRESPONSE:",
        "chosen": " " + chosen,
        "rejected": " " + rejected,
    }


PUBLISHED: dict[str, tuple[tuple[str, ...], Converter]] = {
    "taskmaster": (("context", "generation", "reward", "conversation_id"), _taskmaster),
    "hh": (("chosen", "rejected"), _hh),
    "tldr": (("info", "summaries", "choice"), _tldr),
    "shp": (("history", "human_ref_A", "human_ref_B", "labels"), _shp),
}


def _plain(rows: Rows, format: str) -> Rows:
    if format == "auto":
        format = _published(rows[0])
        if format is None:
            return rows
    if format not in PUBLISHED:
        raise UsageError(f"format is {format!r}; want auto, {', '.join(PUBLISHED)}")
    columns, convert = PUBLISHED[format]
    plain, places, dropped = [], [], 0
    for row, place in zip(rows, rows.places, strict=True):
        _want_columns(row, columns, place, f"{format} rows have")
        try:
            new = convert(row)
        except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            raise UsageError(
                f"{place}: not a {format} row: {type(error).__name__} {error}; see "
                "`python -m perl data --help`"
            ) from None
        if new is None:
            dropped += 1
        else:
            plain.append(new)
            places.append(place)
    if not plain:
        raise UsageError(
            f"{rows.places[0]} and all others carry no signal as {format} rows; is --format right?"
        )
    notes = [f"{dropped} {format} rows without a signal left out"] if dropped else []
    return Rows(plain, places, notes)


def _published(row: dict) -> str | None:
    if "prompt" in row:
        return None
    for name, (columns, _) in PUBLISHED.items():
        if all(column in row for column in columns):
            return name
    return None


# ---------------------------------------------------------------------------------------------
# What rows are for


def row_kind(rows: Sequence[dict], path: str | Path | None = None) -> str:
    """The kind of rows by their columns: a key of KINDS.

    A column that any row has is wanted in all: UsageError names the first row without it, or with
    a value of a wrong type. Pairs may have a margin, by which the chosen answer is to score higher.
    Other columns are ignored.
    """
    columns = set().union(*rows)
    if columns & {"chosen", "rejected"}:
        kind = "pairwise"
    else:
        kind = next((k for k, wanted in KINDS.items() if columns.issuperset(wanted)), None)
    if kind is None:
        wanted = " · ".join("{" + ", ".join(c) + "}" for c in KINDS.values())
        raise UsageError(
            f"{path or _place(rows, 0)}: columns {', '.join(sorted(columns))} are no "
            f"known kind of row; want {wanted}"
        )
    wanted = columns_of(rows, kind)
    for i, row in enumerate(rows):
        place = _place(rows, i)
        _want_columns(row, wanted, place, f"{kind} rows have")
        for column in wanted:
            _check_value(column, row[column], place)
    return kind


def columns_of(rows: Sequence[dict], kind: str) -> tuple[str, ...]:
    """The columns that rows of a kind are read for: those of the kind, and optional ones there."""
    there = set().union(*rows)
    return KINDS[kind] + tuple(c for c in OPTIONAL.get(kind, ()) if c in there)


def want_kind(rows: Sequence[dict], kinds: Sequence[str], command: str) -> str:
    """`row_kind`, which must be one of `kinds`; "prompt" is met by any rows that have prompts."""
    kind = row_kind(rows)
    if kind in kinds:
        return kind
    if "prompt" in kinds and "prompt" in KINDS[kind]:
        return "prompt"
    wanted = " or ".join("{" + ", ".join(KINDS[k]) + "}" for k in kinds)
    raise UsageError(
        f"{command} wants {wanted} rows; {_place(rows, 0)} is {kind}: "
        "{" + ", ".join(KINDS[kind]) + "}"
    )


def without_equal_pairs(rows: Rows) -> Rows:
    """Pairwise rows less those whose two answers are equal, which carry no signal; counted."""
    equal = [row["chosen"] == row["rejected"] for row in rows]
    if not any(equal):
        return rows
    first = rows.places[equal.index(True)]
    if all(equal):
        raise UsageError(f"{first} and all others: chosen and rejected are equal; give real pairs")
    kept = [i for i, same in enumerate(equal) if not same]
    note = f"{sum(equal)} pairs with equal answers left out, the first at {first}"
    return Rows([rows[i] for i in kept], [rows.places[i] for i in kept], [*rows.notes, note])


def note_empty(rows: Rows, columns: Sequence[str]) -> None:
    """Adds to the notes how many rows have nothing but white space in any of `columns`."""
    empty = [any(not plain_text(row[column]).strip() for column in columns) for row in rows]
    if any(empty):
        first = rows.places[empty.index(True)]
        rows.notes.append(f"{sum(empty)} rows with an empty answer, the first at {first}")


def plain_text(value: str | list[dict]) -> str:
    """A text as it is; of messages, what they say."""
    return value if isinstance(value, str) else "\n".join(m["content"] for m in value)


def _place(rows: Sequence[dict], i: int) -> str:
    return rows.places[i] if isinstance(rows, Rows) else f"row {i + 1}"


def _want_columns(row: dict, columns: Sequence[str], place: str, who: str) -> None:
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise UsageError(f"{place}: no {', '.join(missing)!s}; {who} {', '.join(columns)}")


def _check_value(column: str, value: Any, place: str) -> None:
    if column == "label":
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise UsageError(
                f"{place}: label is {value!r}; want true, false or a number from 0 to 1, "
                "without quotes"
            )
    elif column == "margin":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise UsageError(f"{place}: margin is {value!r}; want a number of at least 0")
    elif isinstance(value, list) and column != "text":
        good = value and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
        if not good:
            raise UsageError(
                f"{place}: {column} is not a list of {{role, content}} messages with text in both"
            )
    elif not isinstance(value, str) or column == "messages":
        wanted = "a list of {role, content} messages" if column == "messages" else "text"
        raise UsageError(f"{place}: {column} is {type(value).__name__}; want {wanted}")


# ---------------------------------------------------------------------------------------------
# Text -> tokens


@dataclass(frozen=True)
class Example:
    """A sequence to learn from: `targets[t]` says whether token t is learned (never token 0)."""

    ids: list[int]
    targets: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Pair:
    """Prompt and answer as tokens, twice; `chosen` is to score higher by `margin`."""

    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Labelled:
    """Prompt and answer as tokens, with the probability in [0, 1] that the answer is good."""

    ids: list[int]
    label: float

    def __len__(self) -> int:
        return len(self.ids)


class Encoded(list):
    """Examples (or prompts), the rows they come from, and notes on what was cut or left out.

    rows, places: of each example. mixture: the examples of each file with its weight; empty where
    every example is drawn alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict] = []
        self.places: list[str] = []
        self.notes: list[str] = []
        self.mixture: list[tuple[range, float]] = []

    def part(self, which: slice) -> Encoded:
        """Some of the examples, with their rows and places."""
        part = Encoded()
        part.extend(self[which])
        part.rows, part.places = self.rows[which], self.places[which]
        return part


def token_limit(max_tokens: int, context: int) -> int:
    """The longest sequence in tokens: `max_tokens`, or the model's `context` where that is 0."""
    if max_tokens > context:
        raise UsageError(
            f"--max-tokens is {max_tokens} but the model's context is {context} "
            "tokens; give at most that, or 0"
        )
    return max_tokens or context


def prompt_room(max_tokens: int, max_new_tokens: int, context: int) -> int:
    """The longest prompt in tokens that leaves room for `max_new_tokens` more."""
    longest = token_limit(max_tokens, context)
    if max_new_tokens >= longest:
        raise UsageError(
            f"--max-new-tokens is {max_new_tokens} and a sequence holds {longest}: no "
            "room is left for a prompt; give fewer"
        )
    return longest - max_new_tokens


@dataclass
class Limit:
    """What happens to sequences over `max_tokens`: cut on the left, else left out, else refused."""

    max_tokens: int
    truncate_prompts: bool = False
    drop_long: bool = False
    cut: int = field(default=0, init=False)
    dropped: int = field(default=0, init=False)

    def fit(self, prompt: list[int], rest: int, place: str, bos: int | None) -> list[int] | None:
        """The prompt, cut if it must be and may be, so that `rest` more tokens fit behind it.

        None where the row is to be left out. A beginning-of-sequence token survives the cut.
        """
        length, room = len(prompt) + rest, self.max_tokens - rest
        if room >= len(prompt):
            return prompt
        head = prompt[:1] if prompt[:1] == [bos] else []
        if self.truncate_prompts and room > len(head):
            self.cut += 1
            return head + prompt[len(prompt) - room + len(head) :]
        if self.drop_long:
            self.dropped += 1
            return None
        remedy = "--drop-long" if self.truncate_prompts else "--truncate-prompts or --drop-long"
        raise UsageError(
            f"{place}: {length} tokens ({len(prompt)} of prompt), but at most "
            f"{self.max_tokens} fit; shorten the row, or give {remedy}"
        )

    def notes(self, total: int) -> list[str]:
        counts = ((self.cut, "prompts cut on the left"), (self.dropped, "rows left out"))
        return [
            f"{count} of {total} {what}: longer than {self.max_tokens} tokens"
            for count, what in counts
            if count
        ]


def encode_prompts(
    rows: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    *,
    truncate_prompts: bool = False,
    drop_long: bool = False,
) -> Encoded:
    """Token ids of every row's prompt, each 1 to `max_prompt_tokens` long."""
    limit = Limit(max_prompt_tokens, truncate_prompts, drop_long)

    def encode(row: dict, place: str) -> list[list[int]]:
        prompt = limit.fit(prompt_ids(row["prompt"], tokenizer), 0, place, tokenizer.bos_token_id)
        return [] if prompt is None else [prompt]

    return _encode(rows, encode, limit)


def encode_examples(
    rows: Sequence[dict], kind: str, tokenizer: PreTrainedTokenizerBase, limit: Limit
) -> Encoded:
    """Examples for the language-model loss from rows of `kind` text, completion or messages.

    Learned are: all of a text but its first token; a completion; every assistant message; and the
    end-of-sequence token behind each. Texts over the limit become several examples.
    """

    def encode(row: dict, place: str) -> list[Example]:
        if kind == "text":
            ids = prompt_ids(row["text"], tokenizer) + [_eos(tokenizer)]
            pieces = [ids[i : i + limit.max_tokens] for i in range(0, len(ids), limit.max_tokens)]
            return [Example(p, [False] + [True] * (len(p) - 1)) for p in pieces if len(p) > 1]
        if kind == "completion":
            prompt = prompt_ids(row["prompt"], tokenizer)
            rest = answer_ids(row["prompt"], row["completion"], tokenizer, place)
            targets = [True] * len(rest)
        else:
            ids, learned = _message_ids(row["messages"], tokenizer, place)
            first = learned.index(True)
            prompt, rest, targets = ids[:first], ids[first:], learned[first:]
        prompt = limit.fit(prompt, len(rest), place, tokenizer.bos_token_id)
        if prompt is None:
            return []
        return [Example(prompt + rest, [False] * len(prompt) + targets)]

    return _encode(rows, encode, limit)


def encode_pairs(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, limit: Limit) -> Encoded:
    """Pairs from pairwise rows; both sides of a pair keep the same prompt."""

    def encode(row: dict, place: str) -> list[Pair]:
        chosen, rejected = (
            answer_ids(row["prompt"], row[side], tokenizer, place)
            for side in ("chosen", "rejected")
        )
        prompt = limit.fit(
            prompt_ids(row["prompt"], tokenizer),
            max(len(chosen), len(rejected)),
            place,
            tokenizer.bos_token_id,
        )
        margin = float(row.get("margin", 0.0))
        return [] if prompt is None else [Pair(prompt + chosen, prompt + rejected, margin)]

    return _encode(rows, encode, limit)


def encode_labelled(
    rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, limit: Limit
) -> Encoded:
    """Labelled sequences from pointwise rows."""

    def encode(row: dict, place: str) -> list[Labelled]:
        answer = answer_ids(row["prompt"], row["completion"], tokenizer, place)
        prompt = limit.fit(
            prompt_ids(row["prompt"], tokenizer), len(answer), place, tokenizer.bos_token_id
        )
        return [] if prompt is None else [Labelled(prompt + answer, float(row["label"]))]

    return _encode(rows, encode, limit)


def _encode(rows: Sequence[dict], encode: Callable[[dict, str], list], limit: Limit) -> Encoded:
    encoded = Encoded()
    for i, row in enumerate(rows):
        examples = encode(row, _place(rows, i))
        encoded.extend(examples)
        encoded.rows.extend([row] * len(examples))
        encoded.places.extend([_place(rows, i)] * len(examples))
    encoded.notes = getattr(rows, "notes", []) + limit.notes(len(rows))
    if not encoded:
        raise UsageError(
            f"no row fits in {limit.max_tokens} tokens; raise --max-tokens, or give shorter rows"
        )
    return encoded


def prompt_ids(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """At least one token: the prompt with the tokenizer's special tokens in front.

    Messages end with the header of the assistant's turn, ready to be continued.
    """
    templated = not isinstance(prompt, str) and bool(tokenizer.chat_template)
    text = prompt if isinstance(prompt, str) else _chat(prompt, tokenizer, reply=True)
    ids = tokenizer(text, add_special_tokens=not templated)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not templated:
        ids = ids[:-1]  # a tokenizer that closes every text: the answer is still to come
    return ids or [tokenizer.bos_token_id or _eos(tokenizer)]


def answer_ids(
    prompt: str | list[dict],
    answer: str | list[dict],
    tokenizer: PreTrainedTokenizerBase,
    place: str = "row",
) -> list[int]:
    """The tokens of an answer to `prompt`, with the end-of-sequence token."""
    if not isinstance(answer, str):
        if isinstance(prompt, str):
            raise UsageError(
                f"{place}: the answer is messages but the prompt is text; give both "
                "as messages, or both as text"
            )
        ids, learned = _message_ids([*prompt, *answer], tokenizer, place, first=len(prompt))
        return ids[learned.index(True) :]
    return tokenizer(answer, add_special_tokens=False)["input_ids"] + [_eos(tokenizer)]


def _message_ids(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, place: str, first: int = 0
) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are learned: assistant messages from number `first` on."""
    template = bool(tokenizer.chat_template)
    ids: list[int] = []
    learned: list[bool] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first:
            continue
        before = _chat(messages[:i], tokenizer, reply=True)
        after = _chat(messages[: i + 1], tokenizer)
        if not (before.startswith(done) and after.startswith(before)):
            raise UsageError(
                f"{place}: the tokenizer's chat template rewrites earlier messages; "
                "give {prompt, completion} rows in place of messages"
            )
        if ids or template:
            head = tokenizer(before[len(done) :], add_special_tokens=False)["input_ids"]
        else:
            head = prompt_ids(before, tokenizer)
        body = tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
        body += [] if template else [_eos(tokenizer)]
        ids += head + body
        learned += [False] * len(head) + [True] * len(body)
        done = after
    if not any(learned):
        raise UsageError(
            f"{place}: no assistant message to learn; give at least one message "
            'with "role": "assistant"'
        )
    learned[0] = False
    return ids, learned


def _chat(messages: list[dict], tokenizer: PreTrainedTokenizerBase, reply: bool = False) -> str:
    """Messages as text; `reply` opens the assistant's turn."""
    if tokenizer.chat_template:
        if not messages:
            return ""
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join(lines + ["assistant:"] * reply)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


# ---------------------------------------------------------------------------------------------
# Several files


def load_files(
    data: Sequence[str], validation: str | None, load: Callable[[str], Encoded]
) -> tuple[Encoded, Encoded | None]:
    """The training examples of all files of `data`, and the held-out ones; `load` makes one file's.

    data: words FILE or FILE=WEIGHT. A weight is the file's share of what is drawn, relative to the
    others'; without weights every example is drawn alike. Notes name their file. Raises UsageError
    for a weight that is no number above 0, or that stands on some files only.
    """
    files = [file_and_weight(word) for word in data]
    weights = [weight for _, weight in files if weight is not None]
    if weights and (len(weights) < len(files) or len(files) == 1):
        raise UsageError(
            f"--data {' '.join(data)}: a weight is a share among several files; give one to every "
            "file, or to none"
        )
    examples = _together(files, load)
    return examples, _together([(validation, None)], load) if validation else None


def _together(files: Sequence[tuple[str, float | None]], load: Callable[[str], Encoded]) -> Encoded:
    together = Encoded()
    for path, weight in files:
        encoded = load(path)
        if weight is not None:
            part = range(len(together), len(together) + len(encoded))
            together.mixture.append((part, weight))
        together.extend(encoded)
        together.rows += encoded.rows
        together.places += encoded.places
        together.notes += [f"{path}: {note}" for note in encoded.notes]
    return together


def file_and_weight(word: str) -> tuple[str, float | None]:
    """A word FILE or FILE=WEIGHT in its parts; the name of a file may hold "=" too."""
    path, equals, weight = word.rpartition("=")
    if not equals or Path(word).is_file():
        return word, None
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(f"--data {word}: weight {weight!r} is no number above 0")
    return path, number


# ---------------------------------------------------------------------------------------------
# Examples -> batches


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, both (B, T) int64, T the longest; padding on one side."""
    import torch

    width = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    for i, ids in enumerate(sequences):
        span = slice(width - len(ids), width) if left else slice(0, len(ids))
        input_ids[i, span] = torch.tensor(ids)
        mask[i, span] = 1
    return input_ids, mask


def padding(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens `pad` adds to those of the sequences."""
    lengths = [len(ids) for ids in sequences]
    return max(lengths) * len(lengths) - sum(lengths)


class Batches(Iterator):
    """Endless batches in a seeded order that a resumed run sees again.

    Each epoch is one shuffle of the examples; within a window of 16 batches, examples of like
    length go together, so little is padded. What does not fill a batch waits for another epoch,
    in another shuffle. With a `mixture` an epoch draws about as many examples, each file's share
    of them by going on through shuffles of that file. The order depends on seed and epoch alone:
    the state is two numbers.
    """

    WINDOW = 16  # batches

    def __init__(
        self,
        examples: Sequence[Any],
        batch_size: int,
        seed: int,
        mixture: Sequence[tuple[range, float]] = (),
    ):
        self.examples = examples
        self.seed = seed
        total = sum(weight for _, weight in mixture)
        self.draws = [
            (part, max(1, round(weight / total * len(examples)))) for part, weight in mixture
        ]
        self.batch_size = min(batch_size, len(self._drawn(0)))
        self.epoch = self.position = 0
        self._order = self._shuffled(0)

    def __next__(self) -> list[Any]:
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffled(self.epoch)
        batch = [self.examples[i] for i in self._order[self.position]]
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "examples": len(self.examples)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["examples"] != len(self.examples):
            raise UsageError(
                f"the run was started on {state['examples']} examples, the data file "
                f"now gives {len(self.examples)}; restore the file, or start a new "
                "run"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled(self.epoch)

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/{epoch}")
        order = self._drawn(epoch)
        rng.shuffle(order)
        size, batches = self.batch_size, []
        order = order[: len(order) - len(order) % size]
        for start in range(0, len(order), size * self.WINDOW):
            window = sorted(
                order[start : start + size * self.WINDOW], key=lambda i: len(self.examples[i])
            )
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        rng.shuffle(batches)
        return batches

    def _drawn(self, epoch: int) -> list[int]:
        """The examples of an epoch: each once, or each file's share of them."""
        if not self.draws:
            return list(range(len(self.examples)))
        drawn = []
        for part, count in self.draws:
            first, last = epoch * count, (epoch + 1) * count
            for turn in range(first // len(part), math.ceil(last / len(part))):
                rng = random.Random(f"{self.seed}/{part.start}/{turn}")
                done = turn * len(part)
                drawn += rng.sample(part, len(part))[max(0, first - done) : last - done]
        return drawn
