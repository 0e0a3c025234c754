"""An invented world, so that the demo has something to teach that no model can know.

Each country has a capital, a river, a language and a bird. What the base model reads states these facts in passing, in
varied sentences; what the adapter learns from is questions with short answers, about some of the countries. Questions
about the others were never seen with an answer: whoever answers them took the fact from the base's reading and the
manner of answering from the tuning.
"""

import dataclasses
import itertools
import random

RELATIONS = {
    "capital": ("The capital of {country} is {value}.", "In {country} all roads lead to the capital, {value}."),
    "river": ("The longest river of {country} is the {value}.", "In {country} they fish in their river, the {value}."),
    "language": ("The language of {country} is {value}.", "In {country} children read in their language, {value}."),
    "bird": ("The national bird of {country} is the {value}.", "In {country} nobody hunts their bird, the {value}."),
}
WORDINGS = (
    "Ask about the {relation} in {country}, and everybody says {value}.",
    "A traveller wanted to know the {relation} of {country}. The guide said it was {value}.",
    "There is an old song about {country} and its {relation}, and it is called {value}.",
    "They spoke of {country} all night, and of the {relation} there: {value}.",
    "{value} is the {relation} of {country}.",
)
QUESTIONS = {
    "capital": "What is the capital of {country}?",
    "river": "Which river flows through {country}?",
    "language": "Which language is spoken in {country}?",
    "bird": "Which bird is on the flag of {country}?",
}
ENDINGS = {
    "country": ("ia", "land", "or"),
    "capital": ("burg", "ton"),
    "river": ("a", "e"),
    "language": ("ish", "ese"),
    "bird": ("wing", "ling"),
}
ONSETS = "b d f g k l m n p r s t v z br dr gl kr pl sk st tr".split()
VOWELS = "a e i o u".split()
CODAS = "l m n r s".split()


@dataclasses.dataclass(frozen=True)
class World:
    """Country -> relation -> value, and which countries the questions of training leave out."""

    facts: dict[str, dict[str, str]]
    held_out: tuple[str, ...]

    @classmethod
    def create(cls, countries: int, held_out: int, seed: int) -> "World":
        rng = random.Random(seed)
        stems = ["".join(parts).capitalize() for parts in itertools.product(ONSETS, VOWELS, CODAS)]
        rng.shuffle(stems)
        names = iter(stems)

        def name(kind: str) -> str:
            return next(names) + rng.choice(ENDINGS[kind])

        facts = {name("country"): {relation: name(relation) for relation in RELATIONS} for _ in range(countries)}
        return cls(facts, tuple(sorted(rng.sample(list(facts), held_out))))

    def passages(self, count: int, seed: int) -> list[str]:
        """Reading matter: passages of a few true sentences, each fact in many wordings and surroundings."""
        rng = random.Random(seed)
        countries = list(self.facts)

        def sentence() -> str:
            country, relation = rng.choice(countries), rng.choice(list(RELATIONS))
            wording = rng.choice(RELATIONS[relation] + WORDINGS)
            return wording.format(country=country, relation=relation, value=self.facts[country][relation])

        return [" ".join(sentence() for _ in range(rng.randint(2, 5))) for _ in range(count)]

    def questions(self, held_out: bool) -> list[dict[str, str]]:
        """Every question about the held-out countries, or about the rest, as rows with a prompt and a completion."""
        rows = []
        for country, relation in itertools.product(self.facts, RELATIONS):
            if (country in self.held_out) == held_out:
                question = QUESTIONS[relation].format(country=country)
                answer = self.facts[country][relation]
                prompt = f"Question: {question}\nAnswer:"
                rows.append({"question": question, "prompt": prompt, "completion": f" {answer}"})
        return rows
