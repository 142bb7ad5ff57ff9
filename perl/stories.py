"""Short stories about an animal: prompts, and a reward that a few lines of Python can give.

    Mia met a frog by the lake.

wants a story that mentions the frog and comes to its end within WORDS words:

     The frog was green and very happy. Mia said, "Hello, little frog!" They played all day.

`reward` serves any policy as `--reward-function perl/stories.py:reward`, and as a pattern for
rewards of one's own: NAME(prompts, completions) -> one finite number each. The prompts are such as
a model of TinyStories (arXiv 2305.07759) can go on from. Those that are held out are of names that
no training prompt has; the animals are the same.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence

NAMES = (
    "Lily", "Tim", "Mia", "Ben", "Anna", "Tom", "Lucy", "Max", "Sue", "Sam", "Amy", "Jack",
    "Emma", "Bob",
)  # fmt: skip
ANIMALS = (
    "bear", "bird", "bunny", "cat", "cow", "dog", "fish", "fox", "frog", "horse", "lion",
    "monkey", "mouse", "duck", "pig", "squirrel",
)  # fmt: skip
PLACES = ("in the park", "in the garden", "by the lake", "in the forest", "near a tree")
FORMS = (
    "{name} met a {animal} {place}.",
    "One day, {name} saw a {animal} {place}.",
    "{name} had a pet {animal}. They liked to play {place}.",
    "Once upon a time, a {animal} lived {place}. It had a friend named {name}.",
)
HELD_OUT = ("Lily", "Ben", "Emma")  # of the names
WORDS = 24

_ANIMAL = re.compile(rf"\b({'|'.join(ANIMALS)})\b")


def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1 for each story that mentions its prompt's animal and ends within the limit, else 0.

    Raises:
        ValueError: a prompt names no animal of ANIMALS.
    """
    return [float(_good(*pair)) for pair in zip(prompts, completions, strict=True)]


def _good(prompt: str, story: str) -> bool:
    animal = _ANIMAL.search(prompt)
    if animal is None:
        raise ValueError(f"the prompt {prompt!r} names none of {', '.join(ANIMALS)}")
    ended = re.search(r"[.!?]\"?\s*$", story) and len(story.split()) <= WORDS
    return bool(ended and re.search(rf"\b{animal[0]}s?\b", story))


def prompts(seed: int = 0) -> tuple[list[str], list[str]]:
    """The prompts to learn from and 128 to be judged by, of names that the others lack."""
    rng = random.Random(seed)
    training = list(_prompts([name for name in NAMES if name not in HELD_OUT]))
    return rng.sample(training, len(training)), rng.sample(list(_prompts(HELD_OUT)), 128)


def _prompts(names: Sequence[str]) -> Iterator[str]:
    for form, name, animal, place in itertools.product(FORMS, names, ANIMALS, PLACES):
        yield form.format(name=name, animal=animal, place=place)


def cut(story: str, sentences: int = 2) -> str:
    """A story's first sentences, as far as they are within the limit; "" where none is."""
    ends = [end.end() for end in re.finditer(r"[.!?]\"?(?=\s|$)", story)][:sentences]
    fitting = [end for end in ends if len(story[:end].split()) <= WORDS]
    return story[: fitting[-1]] if fitting else ""
