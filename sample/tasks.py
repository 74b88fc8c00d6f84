"""Seeded generators of short documents in which one answer is determined by memory or context."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

KINDS = ("names", "key_value", "maps")

WORDS: tuple[str, ...] = tuple(
    """
    apple arm badge ball band bank barn basket beach bean bear bell bird boat bone book boot bottle
    bowl branch bread brick bridge brook broom brush bucket button cabin cable cake camel camera
    candle canoe card carpet cart castle cat cave chain chair chalk cheese circle clock cloth cloud
    coat coin comb cook cord corn couch crane crown cup curtain dancer deer desk dish doctor dog
    donkey door dragon drawer dress drum duck eagle ear egg elbow engine farm feather fence field
    finger flag flame floor flower flute forest fork fox frog garden gate ghost giant glove goat
    grape guitar hammer hand harbor hat hawk helmet hill hook horn horse hotel house insect island
    jacket jar jewel judge kettle king kite knot ladder lake lamp lantern leg lemon letter lion
    lizard lock magnet map market mask meadow melon mirror monkey moon motor mountain mule nail
    needle nest net nurse oak ocean onion orange orchard oven owl paddle palace paper parrot path
    pear pearl pebble pen pencil pepper piano pillow pilot pipe planet plate plum pocket pond pony
    poet prince pump queen quilt rabbit radio raft ribbon ring river road robot rock roof room rope
    rose sailor salad school scissor seed shadow shell ship shirt shoe shovel silver singer sister
    snake soap sock sofa spider spoon square stable stair star station stone stool storm stove
    street string sugar swan table tailor teacher temple tent thread tiger tower town trail train
    tray tree trumpet tunnel turtle valley village violin wagon wall walnut water wheel whistle
    willow window wing winter wolf worm yard zebra
    """.split()
)

_ONSETS = "b br d dr f g gl h k kr l m n p pl qu r s sk st t th tr v w y z".split()
_VOWELS = "a e i o u ae ai ea io ou".split()
_CODAS = "b d g k l ll m n nd r rn s sk sh t th v x z".split()

PERSON = (
    "{} wrote a long letter about the weather.",
    "The map was drawn by {} in a single night.",
    "Nobody had seen {} since the spring.",
    "A song about {} was heard at the market.",
    "We asked {} to read the last page aloud.",
    "The old clock belonged to {}, who never wound it.",
    "Yesterday {} came back with two baskets of plums.",
    "It was {} who found the key under the stone.",
)
PLACE = (
    "The road to {} is closed in winter.",
    "They sailed from {} before the storm.",
    "In {} the bells ring at noon.",
    "She was born near {} and never left.",
    "The train stops at {} for ten minutes.",
    "A bridge was built at {} after the flood.",
    "Most of the wool comes from {}.",
    "You can see {} from the top of the tower.",
)

# header, one pair, the line that asks; the answer follows the ask directly
LAYOUTS = (
    ("Record:\n", "{}: {}\n", "Which {}?\n{}:"),
    ("", "{} = {}\n", "print {}\n{} ="),
    ("List. ", "The {} has {}. ", "What has the {}? The {} has"),
    ("", "{}: {}\n", "Question: {}\nAnswer {}:"),
)


@dataclass(frozen=True)
class Example:
    """A document whose ``text[answer_start:][:len(answer)]`` is the determined answer."""

    text: str
    answer_start: int
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)


def _lexicon(people: int = 160, places: int = 140, twins: int = 20) -> tuple[tuple[str, ...], ...]:
    """Return the fixed names as word tuples; the last ``2 * twins`` share a first word in pairs."""
    rng = random.Random(1789)
    seen: set[str] = set()

    def word() -> str:
        while True:
            parts = [
                rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 1, 2)))
            ]
            made = (
                "".join(parts) + rng.choice(_ONSETS)[0] + "aeiou"[rng.randrange(5)]
            ).capitalize()
            made += rng.choice(_CODAS)
            if made not in seen and len(made) >= 5:
                seen.add(made)
                return made

    total = people + places
    names = [tuple(word() for _ in range(rng.choice((2, 2, 3)))) for _ in range(total - 2 * twins)]
    for _ in range(twins):
        first = word()
        names += [(first, word(), word()), (first, word(), word())]
    return tuple(names)


NAMES = _lexicon()
_FIRST_WORDS = [name[0] for name in NAMES]


def given_words(name: tuple[str, ...]) -> int:
    """Return after how many words the rest of a name is determined."""
    return 2 if _FIRST_WORDS.count(name[0]) > 1 else 1


def names(rng: random.Random, most: int = 3) -> Example:
    """Return up to ``most`` sentences; the rest of the name in the last one is the answer."""
    chosen = rng.sample(range(len(NAMES)), rng.randint(1, most))
    sentences = [rng.choice(PERSON if index % 2 else PLACE) for index in chosen]
    before = [
        s.format(" ".join(NAMES[i])) for s, i in zip(sentences[:-1], chosen[:-1], strict=True)
    ]
    name = NAMES[chosen[-1]]
    given = given_words(name)
    head, tail = sentences[-1].split("{}")
    start = " ".join([*before, head]) + " ".join(name[:given]) + " "
    answer = " ".join(name[given:])
    meta = {"name": " ".join(name), "given": given, "sentences": len(chosen)}
    return Example(start + answer + tail, len(start), answer, meta)


def _code(rng: random.Random) -> str:
    return f"{rng.choice('abcdefghkmnpqrstuvwxyz')}{rng.randint(10, 99)}"


def _pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Return ``count`` pairs of different strings, keys and values each all words or all codes."""
    words = rng.sample(WORDS, 2 * count)
    codes: dict[str, None] = {}
    while len(codes) < 2 * count:
        codes[_code(rng)] = None
    keys = words[:count] if rng.random() < 0.75 else list(codes)[:count]
    values = words[count:] if rng.random() < 0.75 else list(codes)[count:]
    return list(zip(keys, values, strict=True))


def key_value(rng: random.Random, most: int = 16, least: int = 4, questions: int = 1) -> Example:
    """Return a record of pairs and its questions; the answer is the value asked for last."""
    pairs = _pairs(rng, rng.randint(min(least, most), most))
    layout = rng.randrange(len(LAYOUTS))
    header, line, ask = LAYOUTS[layout]
    text = header + "".join(line.format(key, value) for key, value in pairs)
    end = ".\n" if "." in line else "\n"
    asked = rng.sample(range(len(pairs)), min(questions, len(pairs)))
    position, start, answer = 0, 0, ""
    for position in asked:
        key, answer = pairs[position]
        text += ask.format(key, key) + " "
        start = len(text)
        text += answer + end
    meta = {"position": position, "pairs": len(pairs), "layout": layout}
    return Example(text, start, answer, meta)


def plural(word: str) -> str:
    """Return the regular plural of an English noun."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _letter(rng: random.Random) -> str:
    return rng.choice("bcdefghijklmnopqrstuvwxy")


def _two_words(rng: random.Random) -> str:
    return " ".join(rng.sample(WORDS, 2))


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


# rule: how an input is drawn, what it is mapped to
RULES: dict[str, tuple[Callable[[random.Random], str], Callable[[str], str]]] = {
    "next_letter": (_letter, lambda a: chr(ord(a) + 1)),
    "previous_letter": (_letter, lambda a: chr(ord(a) - 1)),
    "plural": (_word, plural),
    "upper": (_word, str.upper),
    "repeat": (_word, lambda a: f"{a} {a}"),
    "swap": (_two_words, lambda a: " ".join(reversed(a.split()))),
    "first_word": (_two_words, lambda a: a.split()[0]),
    "last_word": (_two_words, lambda a: a.split()[1]),
}


def maps(rng: random.Random, most: int = 12) -> Example:
    """Return shots ``a -> b`` of one hidden rule; the output of the last line is the answer."""
    shots = rng.randint(1, most)
    rule = "dictionary" if rng.random() < 0.5 else rng.choice(list(RULES))
    if rule == "dictionary":
        size = rng.randint(1, min(8, shots))
        words = rng.sample(WORDS, 2 * size)
        table: dict[str, str] = dict(zip(words[:size], words[size:], strict=True))
        inputs = [*table, *rng.choices(list(table), k=shots - size)]
        rng.shuffle(inputs)
        inputs.append(rng.choice(list(table)))
        outputs = [table[a] for a in inputs]
    else:
        draw, apply = RULES[rule]
        inputs = [draw(rng) for _ in range(shots + 1)]
        outputs = [apply(a) for a in inputs]
    lines = [f"{a} -> {b}\n" for a, b in zip(inputs, outputs, strict=True)]
    start = "".join(lines[:-1]) + f"{inputs[-1]} -> "
    earlier = [i for i, a in enumerate(inputs[:-1]) if a == inputs[-1]]
    meta = {"rule": rule, "shots": shots, "position": earlier[-1] if earlier else None}
    return Example(start + outputs[-1] + "\n", len(start), outputs[-1], meta)


GENERATORS: dict[str, Callable[..., Example]] = {
    "names": names,
    "key_value": key_value,
    "maps": maps,
}


def documents(kind: str, n: int, seed: int) -> Iterator[Example]:
    """Yield ``n`` examples of one kind, the same ones for the same seed."""
    rng = random.Random(f"{kind} {seed}")
    for _ in range(n):
        yield GENERATORS[kind](rng)
