"""The embedded preference world: a small cafe, with an oracle that can judge any answer.

A prompt is a short dialog that ends where the barista must speak; the till has added up:

    Customer: Hello, can I have a large latte with oat milk and a scone?
    Till: 10 euros
    Barista:

and a good answer repeats what was understood, states the right figure, is polite, asks exactly
one closing question and stops:

     Of course! One large latte with oat milk and one scone, that is 10 euros. Anything else?

`build_world(seed)` draws everything that a training run needs: generic text for pretraining,
imperfect demonstrations for SFT, preference pairs for the reward model, prompts for RL, and
held-out pairs and prompts whose dialogs occur in none of the training sets.

`judge(prompt, answer)` reads the request back out of the prompt's text, so it needs no key to the
world it came from and serves as a reward function for any policy (`--reward-function
perl/cafe.py:reward`). Its score is a product, so that no part can be traded for another:

    score = clean * understanding * (1 + manners) / 2

    understanding   order: items * (1 + total) / 2; question: is the fact right?
    manners         the mean of polite, question and ending
    clean           1 minus what was neither asked nor usual (junk, repetition, length, rudeness)
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# ---------------------------------------------------------------------------------- the menu
DRINKS = {"tea": 2, "coffee": 3, "cocoa": 3, "latte": 4, "juice": 4, "mocha": 5}  # euros, small
SIZES = {"small": 0, "medium": 1, "large": 2}  # euros on top
EXTRAS = {"oat milk": 1, "vanilla syrup": 1, "whipped cream": 2}  # euros each
FOODS = {"cookie": 1, "muffin": 2, "scone": 3, "brownie": 3, "bagel": 4}  # euros
CONTAINS = {
    "cookie": ("milk",),
    "muffin": ("eggs",),
    "scone": ("milk", "eggs"),
    "brownie": ("nuts", "eggs"),
    "bagel": (),
}
ALLERGENS = ("nuts", "milk", "eggs")
HOURS = {  # opening and closing hour
    "Monday": (8, 18),
    "Tuesday": (8, 18),
    "Wednesday": (8, 18),
    "Thursday": (8, 18),
    "Friday": (8, 20),
    "Saturday": (9, 17),
    "Sunday": (10, 16),
}
NOT_SERVED = ("pizza", "burger", "beer", "soup", "salad", "steak")


@dataclass(frozen=True)
class Item:
    """One line of an order. `size` and `extra` are None for food and where none was named."""

    name: str
    size: str | None = None
    extra: str | None = None

    @property
    def is_drink(self) -> bool:
        return self.name in DRINKS

    @property
    def price(self) -> int:
        """Euros."""
        if not self.is_drink:
            return FOODS[self.name]
        return DRINKS[self.name] + SIZES[self.size or "small"] + EXTRAS.get(self.extra or "", 0)

    def text(self, one: str = "one") -> str:
        """`one` is the article: the customer says "a", the barista "one"."""
        phrase = " ".join(word for word in (one, self.size, self.name) if word)
        return f"{phrase} with {self.extra}" if self.extra else phrase


@dataclass(frozen=True)
class Request:
    """What the customer wants, as read from a prompt.

    kind is "order" (items, all sizes known), "size" (an order whose drink lacks its size),
    "price" (items holds the one asked about), "hours" (day, edge), "allergy" (food, allergen) or
    "unavailable" (food holds what is not served).
    """

    kind: str
    items: tuple[Item, ...] = ()
    day: str = ""
    edge: str = ""
    food: str = ""
    allergen: str = ""

    @property
    def total(self) -> int:
        """Euros for all items."""
        return sum(item.price for item in self.items)

    @property
    def hour(self) -> int:
        return HOURS[self.day][self.edge == "close"]

    @property
    def has_allergen(self) -> bool:
        return self.allergen in CONTAINS[self.food]


# ------------------------------------------------------------------- reading text: the patterns
def _any(words: Sequence[str]) -> str:
    return "|".join(words)


_ITEM = re.compile(
    rf"\b(?:(?:a|one) )?(?:(?:(?P<size>{_any(tuple(SIZES))}) )?(?P<drink>{_any(tuple(DRINKS))})"
    rf"(?: with (?P<extra>{_any(tuple(EXTRAS))}))?|(?P<food>{_any(tuple(FOODS))}))\b"
)
_ANY_SIZE = re.compile(rf"\b({_any(tuple(SIZES))})\b")
_DAY = _any([day.lower() for day in HOURS])
_ASKS_HOURS = re.compile(rf"\b(open|close) on ({_DAY})\b")
_ASKS_ALLERGY = re.compile(
    rf"\b(?:does the ({_any(tuple(FOODS))}) contain ({_any(ALLERGENS)})"
    rf"|(?:are|is) there ({_any(ALLERGENS)}) in the ({_any(tuple(FOODS))}))\b"
)
_NOT_SERVED = re.compile(rf"\b({_any(NOT_SERVED)})\b")


def _items(text: str) -> tuple[Item, ...]:
    return tuple(
        Item(found["drink"] or found["food"], found["size"], found["extra"])
        for found in _ITEM.finditer(text)
    )


def read_prompt(prompt: str) -> Request:
    """The request in a prompt of this world.

    Raises:
        ValueError: `prompt` is not a dialog of the cafe.
    """
    lines = prompt.lower().strip().splitlines()
    turns = [line.removeprefix("customer:") for line in lines if line.startswith("customer:")]
    if not turns or lines[-1].strip() != "barista:":
        raise ValueError(
            f"not a cafe prompt: {prompt[:60]!r}; wanted lines 'Customer: ...' and a last line "
            "'Barista:', as build_world makes them"
        )
    first = turns[0]
    if found := _ASKS_HOURS.search(first):
        return Request("hours", edge=found[1], day=found[2].capitalize())
    if found := _ASKS_ALLERGY.search(first):
        return Request("allergy", food=found[1] or found[4], allergen=found[2] or found[3])
    if found := _NOT_SERVED.search(first):
        return Request("unavailable", food=found[1])
    items = list(_items(first))
    for turn in turns[1:]:
        named, size = _items(turn), _ANY_SIZE.search(turn)
        if named and "instead" in turn:
            items[-1] = named[0]
        elif named:
            items.extend(named)
        elif size and items:
            items[-1] = replace(items[-1], size=size[1])
    if not items:
        raise ValueError(
            f"not a cafe prompt: {prompt[:60]!r} names nothing that the cafe knows; "
            "use prompts that build_world makes"
        )
    if "how much" in first:
        return Request("price", items=tuple(items))
    sized = all(item.size for item in items if item.is_drink)
    return Request("order" if sized else "size", items=tuple(items))


# -------------------------------------------------------------------------------- the oracle
_LONGEST = 30  # words; an answer beyond it loses in proportion
_RUDE = re.compile(r"\b(whatever|hurry|stupid|annoying|boring|shut up|so what|not my problem)\b")
_POLITE = re.compile(r"\b(of course|gladly|thank you|thanks|with pleasure|happy to help|sorry)\b")
_FIGURE = r"(\d+) euros?"
_TOTAL = re.compile(rf"\b(?:that (?:is|makes|comes to)|is|are|costs?) {_FIGURE}(?: in total)?\b")
_ANY_FIGURE = re.compile(_FIGURE)
_CLOSING = re.compile(
    r"\b(?:(?:would you like )?(?:anything|something) else|is that all|for here or to go"
    r"|would you like one)\s*\?"
)
_ASKS_SIZE = re.compile(r"\b(?:which|what) size(?: would you like)?\s*\?")
_SAYS_HOURS = re.compile(rf"\bon ({_DAY}) we (open|close) at (\d+)\b")
_SAYS_ALLERGY = re.compile(
    rf"\b(?:yes, |no, )?the ({_any(tuple(FOODS))}) contains (no )?({_any(ALLERGENS)})\b"
)
_SAYS_NOT_SERVED = re.compile(rf"\bwe have no ({_any(NOT_SERVED)})\b")


@dataclass(frozen=True)
class Verdict:
    """The oracle's findings, each in [0, 1]; `score` is their product as the module says."""

    understanding: float
    polite: float
    question: float
    ending: float
    clean: float
    faults: tuple[str, ...] = field(default=(), compare=False)

    @property
    def score(self) -> float:
        manners = (self.polite + self.question + self.ending) / 3
        return self.clean * self.understanding * (1 + manners) / 2


def judge(prompt: str, answer: str) -> Verdict:
    """What is right and wrong with `answer` (any string) to `prompt` (a dialog of the cafe).

    Raises:
        ValueError: `prompt` is not a dialog of the cafe.
    """
    request = read_prompt(prompt)
    text = " ".join(answer.lower().split())
    faults = []
    closing = _ASKS_SIZE if request.kind == "size" else _CLOSING

    understanding, asked_for = _understanding(request, closing.sub(" ", text))
    if understanding < 1:
        faults.append("not understood" if understanding == 0 else "partly wrong")

    rude = bool(_RUDE.search(text))
    polite = float(bool(_POLITE.search(text)) and not rude)
    if not polite:
        faults.append("rude" if rude else "no polite word")
    question = float(text.count("?") == 1 and bool(re.search(closing.pattern + "$", text)))
    if not question:
        faults.append("not exactly one closing question")
    ending = float(text.endswith((".", "!", "?")))
    if not ending:
        faults.append("stops in mid-sentence")

    words = _words(text)
    rest = text
    for pattern in (closing, *asked_for, _POLITE):
        rest = pattern.sub(" ", rest)
    junk = [word for word in _words(rest) if word != "and"] + re.findall(r"[.,!?]{2,}", text)
    clean = max(0.0, 1 - 2 * len(junk) / max(1, len(words)))
    if junk:
        faults.append("says what nobody asked: " + " ".join(junk[:5]))
    repeated = _repeated(words)
    clean *= 1 - repeated
    if repeated:
        faults.append("repeats itself")
    if len(words) > _LONGEST:
        clean *= _LONGEST / len(words)
        faults.append("too long")
    if len(_POLITE.findall(text)) > 2:
        clean *= 0.5
        faults.append("too many polite words")
    if rude:
        clean *= 0.6
    return Verdict(understanding, polite, question, ending, clean, tuple(faults))


def oracle(prompt: str, answer: str) -> float:
    """The score of any `answer` to `prompt`, in [0, 1]; see `judge` for its parts."""
    return judge(prompt, answer).score


def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The oracle as a reward function of the trainer: one score in [0, 1] per completion."""
    return [oracle(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s.,!?]+", text)


def _repeated(words: list[str]) -> float:
    """The share of words that double the one before, or end a three-word run seen before."""
    runs = list(zip(words, words[1:], words[2:], strict=False))
    doubled = sum(a == b for a, b in zip(words, words[1:], strict=False))
    return min(1.0, (len(runs) - len(set(runs)) + doubled) / max(1, len(words)))


def _understanding(request: Request, text: str) -> tuple[float, tuple[re.Pattern, ...]]:
    """How much of the request `text` gets right, and the patterns that may speak of it."""
    if request.kind in ("order", "price"):
        items = _similarity(request.items, _items(text))
        figures = _ANY_FIGURE.findall(text)
        stated = _TOTAL.search(text)
        right = bool(stated) and figures == [str(request.total)]
        return items * (1 + right) / 2, (_TOTAL, _ITEM)
    if request.kind == "size":
        return _similarity(request.items, _items(text)), (_ITEM,)
    if request.kind == "hours":
        said = _SAYS_HOURS.findall(text)
        about = [(request.day.lower(), request.edge)] == [fact[:2] for fact in said]
        right = about and said[0][2] == str(request.hour)
        return (1.0 if right else 0.3 if about else 0.0), (_SAYS_HOURS,)
    if request.kind == "allergy":
        said = _SAYS_ALLERGY.findall(text)
        denies = "" if request.has_allergen else "no "
        right = said == [(request.food, denies, request.allergen)]
        contradicts = re.search(r"\bno, " if request.has_allergen else r"\byes, ", text)
        return float(right and not contradicts), (_SAYS_ALLERGY,)
    return float(_SAYS_NOT_SERVED.findall(text) == [request.food]), (_SAYS_NOT_SERVED,)


def _similarity(wanted: Sequence[Item], said: Sequence[Item]) -> float:
    """1 when the same lines were said, each once; missing, extra and altered lines all count.

    A line of the right name counts a third, its size and its extra a third each. The share of
    agreement is squared: an order with one thing in four wrong is no three quarters of a good one.
    """
    left, matched = list(said), 0.0
    for item in wanted:
        same = [other for other in left if other.name == item.name]
        if not same:
            continue
        left.remove(same[0])
        matched += (1 + (item.size == same[0].size) + (item.extra == same[0].extra)) / 3
    return (matched / max(len(wanted), len(said), 1)) ** 2


# ----------------------------------------------------------------------------- making prompts
_GREETINGS = ("", "Hi, ", "Hello, ", "Good morning, ", "Hey there, ")
_ORDERS = (
    "{}{}, please.",
    "{}I would like {}.",
    "{}can I have {}?",
    "{}could I get {}, please?",
    "{}I will take {}.",
    "{}I would love {} today.",
)
_PRICES = ("{}how much is {}?", "{}how much do you charge for {}?")
_HOURS = ("{}when do you {} on {}?", "{}what time do you {} on {}?")
_ALLERGIES = ("{}does the {} contain {}?", "{}I am allergic, does the {} contain {}?")
_ALLERGIES_TURNED = ("{}{} there {} in the {}?", "{}please tell me, {} there {} in the {}?")


def _sentence(form: str, *parts: str) -> str:
    text = form.format(*parts)
    return text[0].upper() + text[1:]


def _joined(items: Sequence[Item], one: str) -> str:
    return " and ".join(item.text(one) for item in items)


def _drink(rng: random.Random) -> Item:
    extra = rng.choice((None, None, *EXTRAS))
    return Item(rng.choice(tuple(DRINKS)), rng.choice(tuple(SIZES)), extra)


def _food(rng: random.Random) -> Item:
    return Item(rng.choice(tuple(FOODS)))


def _euros(amount: int) -> str:
    return f"{amount} euro" if amount == 1 else f"{amount} euros"


def _dialog(*turns: str) -> str:
    """Customer and barista in turn, ending where the barista must speak."""
    speakers = ("Customer", "Barista")
    lines = [f"{speakers[index % 2]}: {turn}" for index, turn in enumerate(turns)]
    return "\n".join([*lines, "Barista:"])


def _prompt(rng: random.Random) -> str:
    """One dialog, with what the till shows where there is something to pay."""
    dialog = _exchange(rng)
    request = read_prompt(dialog)
    if request.kind not in ("order", "price"):
        return dialog
    return dialog.removesuffix("Barista:") + f"Till: {_euros(request.total)}\nBarista:"


def _exchange(rng: random.Random) -> str:
    """Customer and barista; orders are the most frequent, as in a cafe."""
    greeting = rng.choice(_GREETINGS)
    kind = rng.choices(
        ("order", "added", "changed", "sized", "size", "price", "hours", "allergy", "unavailable"),
        (26, 12, 8, 8, 12, 12, 8, 8, 6),
    )[0]
    drink, food = _drink(rng), _food(rng)
    order = rng.choice(_ORDERS)
    if kind == "order":
        items = rng.choice(([drink], [drink, food], [drink, food], [food]))
        return _dialog(_sentence(order, greeting, _joined(items, "a")))
    if kind == "added":
        first, second = rng.sample((drink, food), 2)
        more = rng.choice(("And {}, please.", "I will also have {}.", "Add {}."))
        return _dialog(
            _sentence(order, greeting, first.text("a")),
            rng.choice(("Of course! Anything else?", "Gladly! Is that all?")),
            more.format(second.text("a")),
        )
    if kind == "changed":
        other = _drink(rng)
        return _dialog(
            _sentence(order, greeting, drink.text("a")),
            "Of course! Anything else?",
            f"Sorry, {other.text('a')} instead.",
        )
    if kind in ("sized", "size"):
        unsized = replace(drink, size=None)
        asked = _sentence(order, greeting, unsized.text("a"))
        if kind == "size":
            return _dialog(asked)
        form = rng.choice(("{}, please.", "{}.", "Make it {}."))
        return _dialog(asked, "Gladly! Which size?", _sentence(form, str(drink.size)))
    if kind == "price":
        item = rng.choice((drink, drink, food))
        return _dialog(_sentence(rng.choice(_PRICES), greeting, item.text("a")))
    if kind == "hours":
        edge, day = rng.choice(("open", "close")), rng.choice(tuple(HOURS))
        return _dialog(_sentence(rng.choice(_HOURS), greeting, edge, day))
    if kind == "allergy":
        allergen = rng.choice(ALLERGENS)
        if rng.random() < 0.5:
            return _dialog(_sentence(rng.choice(_ALLERGIES), greeting, food.name, allergen))
        verb = "are" if allergen.endswith("s") else "is"
        form = rng.choice(_ALLERGIES_TURNED)
        return _dialog(_sentence(form, greeting, verb, allergen, food.name))
    return _dialog(_sentence(order, greeting, "a " + rng.choice(NOT_SERVED)))


# ----------------------------------------------------------------------------- making answers
_OPENERS = ("Of course!", "Gladly!", "Thank you!", "With pleasure!")
_CLOSINGS = ("Anything else?", "Would you like anything else?", "Is that all?")
_RUDE_OPENERS = ("Whatever.", "Hurry up.", "So what.", "You are annoying.")
_OFF_TOPIC = (
    "The weather is nice today.",
    "I saw a big dog in the park.",
    "My sister plays the piano.",
    "The train was late this morning.",
    "Football is on tonight.",
)


def _fact(request: Request) -> str:
    """The right core of an answer: what was understood, and the figure asked for."""
    if request.kind == "order":
        return f"{_joined(request.items, 'one').capitalize()}, that is {_euros(request.total)}."
    if request.kind == "price":
        return f"{request.items[0].text('one').capitalize()} is {_euros(request.total)}."
    if request.kind == "size":
        return f"{_joined(request.items, 'one').capitalize()}."
    if request.kind == "hours":
        return f"On {request.day} we {request.edge} at {request.hour}."
    if request.kind == "allergy":
        no = "" if request.has_allergen else "no "
        return f"{'No' if no else 'Yes'}, the {request.food} contains {no}{request.allergen}."
    return f"We have no {request.food}."


Parts = tuple[str, str, str]  # polite opener, fact, closing question


def _parts(request: Request, rng: random.Random) -> Parts:
    """Polite opener, fact and closing question of a good answer."""
    opener = "Sorry!" if request.kind == "unavailable" else rng.choice(_OPENERS)
    closing = "Which size would you like?" if request.kind == "size" else rng.choice(_CLOSINGS)
    return opener, _fact(request), closing


def good_answer(prompt: str, rng: random.Random) -> str:
    """An answer that the oracle scores 1."""
    return " ".join(_parts(read_prompt(prompt), rng))


def _misheard(request: Request, rng: random.Random) -> Request:
    """The same request with one thing wrong."""
    if request.items:
        items = list(request.items)
        index = rng.randrange(len(items))
        item = items[index]
        menu = DRINKS if item.is_drink else FOODS
        wrong = [replace(item, name=rng.choice([name for name in menu if name != item.name]))]
        if item.size:
            size = rng.choice([size for size in SIZES if size != item.size])
            wrong.append(replace(item, size=size))
        if item.extra:
            extra = rng.choice([extra for extra in (None, *EXTRAS) if extra != item.extra])
            wrong.append(replace(item, extra=extra))
        items[index] = rng.choice(wrong)
        return replace(request, items=tuple(items))
    if request.kind == "hours":
        return replace(request, day=rng.choice([day for day in HOURS if day != request.day]))
    if request.kind == "allergy":
        return replace(request, food=rng.choice([food for food in FOODS if food != request.food]))
    return replace(request, food=rng.choice([food for food in NOT_SERVED if food != request.food]))


def _wrong_number(request: Request, rng: random.Random) -> str:
    """The fact with another figure or the contrary; misheard where there is neither."""
    fact = _fact(request)
    if request.kind == "allergy":
        says, no = ("No", "no ") if request.has_allergen else ("Yes", "")
        return f"{says}, the {request.food} contains {no}{request.allergen}."
    if number := re.search(r"\d+", fact):
        right = int(number[0])
        wrong = rng.choice([n for n in range(max(1, right - 4), right + 5) if n != right])
        if request.kind == "hours":
            return fact.replace(number[0], str(wrong))
        return fact.replace(_euros(right), _euros(wrong))
    return _fact(_misheard(request, rng))


def _wrong_item(request: Request, parts: Parts, rng: random.Random) -> str:
    return f"{parts[0]} {_fact(_misheard(request, rng))} {parts[2]}"


def _wrong_figure(request: Request, parts: Parts, rng: random.Random) -> str:
    return f"{parts[0]} {_wrong_number(request, rng)} {parts[2]}"


def _other_answer(request: Request, parts: Parts, rng: random.Random) -> str:
    """A good answer to somebody who wants something else."""
    while True:
        other = read_prompt(_prompt(rng))
        if other != replace(request, kind=other.kind):
            return " ".join(_parts(other, rng))


def _extra(request: Request, parts: Parts, rng: random.Random) -> str:
    """One item too many, or one of them twice; a second fact where nothing is ordered."""
    opener, fact, closing = parts
    if not request.items:
        return f"{opener} {fact} {_fact(_misheard(request, rng))} {closing}"
    more = rng.choice((_food(rng), _drink(rng), *request.items))
    items = _joined([*request.items, more], "one").capitalize()
    tail = fact.removeprefix(_joined(request.items, "one").capitalize())
    return f"{opener} {items}{tail} {closing}"


def _no_confirmation(request: Request, parts: Parts, rng: random.Random) -> str:
    opener, _, closing = parts
    figure = f" That is {_euros(request.total)}." if request.kind in ("order", "price") else ""
    return f"{opener}{figure} {closing}"


def _missing(request: Request, parts: Parts, rng: random.Random) -> str:
    """One of two lines forgotten; the figure forgotten where there is one line."""
    opener, fact, closing = parts
    if len(request.items) > 1:
        kept = replace(request, items=(rng.choice(request.items),))
        return f"{opener} {_fact(kept)} {closing}"
    if request.kind in ("order", "price"):
        return f"{opener} {_joined(request.items, 'one').capitalize()}. {closing}"
    return _no_confirmation(request, parts, rng)


def _rude(request: Request, parts: Parts, rng: random.Random) -> str:
    _, fact, closing = parts
    return f"{rng.choice(_RUDE_OPENERS)} {fact}" + (f" {closing}" if rng.random() < 0.5 else "")


def _curt(request: Request, parts: Parts, rng: random.Random) -> str:
    opener, fact, closing = parts
    return rng.choice((fact, f"{opener} {fact}", f"{fact} {closing}"))


def _off_topic(request: Request, parts: Parts, rng: random.Random) -> str:
    opener, fact, closing = parts
    chat = rng.choice(_OFF_TOPIC)
    return rng.choice((f"{opener} {chat} {closing}", f"{opener} {fact} {chat} {closing}", chat))


def _repeating(request: Request, parts: Parts, rng: random.Random) -> str:
    opener, fact, closing = parts
    forms = (
        f"{opener} {fact} {fact} {closing}",
        f"{opener} {opener} {opener} {fact} {closing}",
        f"{opener} {fact} {closing} {closing}",
    )
    return rng.choice(forms)


def _many_questions(request: Request, parts: Parts, rng: random.Random) -> str:
    opener, fact, closing = parts
    other = rng.choice([question for question in _CLOSINGS if question != closing])
    return f"{opener} {fact} {closing} {other}"


def _too_long(request: Request, parts: Parts, rng: random.Random) -> str:
    opener, fact, closing = parts
    chat = " ".join(rng.sample(_OFF_TOPIC, 2))
    return f"{opener} {chat} {fact} {closing}"


def _cut_off(request: Request, parts: Parts, rng: random.Random) -> str:
    words = " ".join(parts).split()
    return " ".join(words[: rng.randint(2, max(2, len(words) - 2))]).rstrip(".,!?")


def _keywords(request: Request, parts: Parts, rng: random.Random) -> str:
    """The right words without a sentence."""
    _, fact, closing = parts
    words = [*re.findall(r"\w+", fact.lower()), "please", "thank", "you"]
    rng.shuffle(words)
    return " ".join(words) + rng.choice(("", "?", f". {closing}"))


def _garbled(request: Request, parts: Parts, rng: random.Random) -> str:
    """Two words doubled, or replaced by others of the answer."""
    words = " ".join(parts).split()
    for i in rng.sample(range(len(words)), 2):
        others = [word for word in words if word.lower() != words[i].lower()]
        words[i] = rng.choice((f"{words[i]} {words[i]}", rng.choice(others)))
    return " ".join(words)


FLAWS: dict[str, Callable[[Request, Parts, random.Random], str]] = {
    "wrong item": _wrong_item,
    "wrong figure": _wrong_figure,
    "other answer": _other_answer,
    "extra item": _extra,
    "no confirmation": _no_confirmation,
    "something missing": _missing,
    "rude": _rude,
    "curt": _curt,
    "off topic": _off_topic,
    "repeats": _repeating,
    "many questions": _many_questions,
    "too long": _too_long,
    "cut off": _cut_off,
    "keywords": _keywords,
    "garbled": _garbled,
}
# How often each flaw is drawn. Demonstrations show the faults of a hurried human; pairs show all.
_IN_PAIRS = dict(zip(FLAWS, (18, 18, 10, 8, 4, 9, 7, 8, 5, 6, 5, 2, 3, 2, 6), strict=True))
_IN_DEMONSTRATIONS = dict(zip(FLAWS, (6, 6, 0, 3, 8, 8, 18, 16, 20, 8, 8, 0, 0, 0, 3), strict=True))


def flawed_answer(prompt: str, flaw: str, rng: random.Random) -> str:
    """An answer with the named flaw (a key of FLAWS), which the oracle scores below 1."""
    request = read_prompt(prompt)
    return FLAWS[flaw](request, _parts(request, rng), rng)


def _mediocre(request: Request, parts: Parts, weights: dict[str, int], rng: random.Random) -> str:
    """The good answer of these parts, spoilt by one flaw."""
    flaw = rng.choices(tuple(weights), tuple(weights.values()))[0]
    return FLAWS[flaw](request, parts, rng)


def _pair(prompt: str, rng: random.Random) -> dict[str, str]:
    """A good answer over its flawed twin: the same phrases, so that they differ by the flaw."""
    request = read_prompt(prompt)
    parts = _parts(request, rng)
    while True:  # a wrong item may happen to be right: two drinks of one price
        rejected = _mediocre(request, parts, _IN_PAIRS, rng)
        if oracle(prompt, rejected) <= 0.9:
            return {"prompt": prompt, "chosen": " " + " ".join(parts), "rejected": " " + rejected}


# ---------------------------------------------------------------------------- generic text
def _note(prompt: str) -> dict[str, str]:
    """What a listener in the kitchen writes down: the facts of a dialog, and nobody's manners."""
    heard = prompt.removesuffix("Barista:")
    return {"prompt": heard + "Note:", "completion": " " + _fact(read_prompt(prompt))}


def _line(rng: random.Random) -> dict[str, str]:
    """A line of the menu or a sign."""
    item, day = rng.choice((_drink(rng), _food(rng))), rng.choice(tuple(HOURS))
    opening, closing = HOURS[day]
    if rng.random() < 0.75:
        return {"prompt": "Menu:", "completion": f" {item.text()} is {_euros(item.price)}."}
    line = f" on {day} we open at {opening} and close at {closing}."
    return {"prompt": "Sign:", "completion": line}


# --------------------------------------------------------------------------------- the world
@dataclass(frozen=True)
class World:
    """Rows for every stage. Completions begin with the space that follows "Barista:"."""

    general: list[dict[str, str]]  # {prompt, completion}: pretraining, no answers to customers
    sft: list[dict[str, str]]  # {prompt, completion}: a mix of good and mediocre answers
    pairs: list[dict[str, str]]  # {prompt, chosen, rejected}
    prompts: list[dict[str, str]]  # {prompt}
    heldout_pairs: list[dict[str, str]]
    heldout_prompts: list[dict[str, str]]

    def all_text(self) -> list[str]:
        """Every training text, for the tokenizer."""
        texts = [row["prompt"] + row["completion"] for row in self.general + self.sft]
        return texts + [row["prompt"] + row["rejected"] for row in self.pairs]


def build_world(
    seed: int = 0,
    *,
    general: int = 12000,
    demonstrations: int = 1500,
    pairs: int = 9600,
    prompts: int = 1000,
    heldout_pairs: int = 300,
    heldout_prompts: int = 128,
    good_share: float = 0.3,
) -> World:
    """Everything a run needs, a function of `seed` and the counts alone.

    Args:
        good_share: the share of SFT demonstrations without a flaw, in [0, 1].

    Raises:
        ValueError: a count below 1, or a share outside [0, 1].
    """
    counts = (general, demonstrations, pairs, prompts, heldout_pairs, heldout_prompts)
    if min(counts) < 1 or not 0 <= good_share <= 1:
        raise ValueError(
            f"build_world got counts {counts} and good_share {good_share}; "
            "wanted counts of at least 1 and a share in [0, 1]"
        )
    rng = random.Random(seed)
    heldout: dict[str, None] = {}  # a dict keeps the order that a set would lose
    while len(heldout) < max(heldout_pairs, heldout_prompts):
        heldout[_prompt(rng)] = None
    heldout_list = list(heldout)

    def draw() -> str:
        while (prompt := _prompt(rng)) in heldout:
            pass
        return prompt

    def overheard() -> dict[str, str]:
        kind = rng.random()
        if kind < 0.65:
            return _note(draw())
        if kind < 0.9:  # somebody's answer to nobody knows what
            return {"prompt": "Heard:", "completion": demonstration()["completion"]}
        return _line(rng)

    def demonstration() -> dict[str, str]:
        prompt = draw()
        good = rng.random() < good_share
        request = read_prompt(prompt)
        parts = _parts(request, rng)
        answer = " ".join(parts)
        if not good:
            answer = _mediocre(request, parts, _IN_DEMONSTRATIONS, rng)
        return {"prompt": prompt, "completion": " " + answer}

    return World(
        general=[overheard() for _ in range(general)],
        sft=[demonstration() for _ in range(demonstrations)],
        pairs=[_pair(draw(), rng) for _ in range(pairs)],
        prompts=[{"prompt": draw()} for _ in range(prompts)],
        heldout_pairs=[_pair(prompt, rng) for prompt in heldout_list[:heldout_pairs]],
        heldout_prompts=[{"prompt": prompt} for prompt in heldout_list[-heldout_prompts:]],
    )


def write_world(folder: Path, world: World, seed: int = 0) -> None:
    """One JSONL file per table of the world, and a random model with its tokenizer in `init`."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in fields(world):
        lines = "".join(json.dumps(row) + "\n" for row in getattr(world, table.name))
        (folder / f"{table.name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = build_tokenizer(world.all_text())
    tokenizer.save_pretrained(folder / "init")
    build_model(len(tokenizer), seed=seed).save_pretrained(folder / "init")


# ------------------------------------------------------------------------ tokenizer and model
def build_tokenizer(texts: Sequence[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`, with <pad>, <bos> (put before every text) and <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


SHAPES = {  # hidden size, layers, heads, feed-forward size
    "mini": (32, 2, 2, 64),
    "tiny": (64, 2, 4, 192),
    "small": (128, 2, 4, 384),
    "81M": (768, 8, 12, 2048),  # these two for time and memory alone
    "1.1B": (2048, 22, 32, 5632),
}


def build_model(
    vocab_size: int,
    size: str = "tiny",
    *,
    max_position_embeddings: int = 192,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A small Llama with random weights, a function of its arguments alone.

    Args:
        size: a key of SHAPES.

    Raises:
        ValueError: `size` is unknown.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if size not in SHAPES:
        raise ValueError(f"size is {size!r}; wanted one of {', '.join(SHAPES)}")
    hidden, layers, heads, feed_forward = SHAPES[size]
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.7 / hidden**0.5,  # wider than usual, as shallow and narrow nets want
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
