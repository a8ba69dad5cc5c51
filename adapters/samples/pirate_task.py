"""A speaking style: short questions answered like a pirate, scored on style and on fact.

Knows the questions, the pirate's way of speaking and the scorer; knows no model. A
reply scores only when it is in style and still says the asked fact. No asked thing
(country, word, animal ...) of the held-out split is asked about in training.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from adapters.samples.task import Item, Split, Task


@dataclass(frozen=True)
class Topic:
    """One kind of question: its wordings, its plain answer, and what is asked per split.

    Pairs are written `thing=fact`, divided by commas; `/` divides facts that all count.
    """

    questions: tuple[str, ...]
    answer: str
    train: str
    held_out: str


_TOPICS = (
    Topic(
        ("What is the capital of {thing}?", "Tell me the capital of {thing}."),
        "The capital of {thing} is {fact}",
        "France=Paris,Japan=Tokyo,Italy=Rome,Spain=Madrid,Egypt=Cairo,Peru=Lima,Cuba=Havana,"
        "Norway=Oslo,Austria=Vienna,Kenya=Nairobi,Ireland=Dublin,Hungary=Budapest,Iran=Tehran,"
        "India=New Delhi,Poland=Warsaw,Ukraine=Kyiv,Iceland=Reykjavik,Colombia=Bogota,Iraq=Baghdad,"
        "South Korea=Seoul,the Netherlands=Amsterdam,Argentina=Buenos Aires,Belgium=Brussels",
        "Germany=Berlin,Portugal=Lisbon,Greece=Athens,Russia=Moscow,China=Beijing,Sweden=Stockholm,"
        "Finland=Helsinki,Denmark=Copenhagen,Canada=Ottawa,Thailand=Bangkok,Chile=Santiago,"
        "Vietnam=Hanoi,Cambodia=Phnom Penh,Lebanon=Beirut,Romania=Bucharest,Bulgaria=Sofia,"
        "England=London,Indonesia=Jakarta,Venezuela=Caracas,Turkey=Ankara,Croatia=Zagreb",
    ),
    Topic(
        ("What is the opposite of {thing}?", "Give me the opposite of {thing}."),
        "The opposite of {thing} is {fact}",
        "hot=cold,big=small,tall=short,happy=sad,early=late,open=closed,clean=dirty,heavy=light,"
        "young=old,loud=quiet,strong=weak,empty=full,high=low,wet=dry,love=hate,begin=end",
        "fast=slow,day=night,up=down,left=right,rich=poor,soft=hard,good=bad,true=false,"
        "inside=outside,black=white,north=south,east=west,win=lose,hard=soft/easy,war=peace",
    ),
    Topic(
        ("On which continent is {thing}?", "Which continent does {thing} belong to?"),
        "{thing} belongs to {fact}",
        "France=Europe,Japan=Asia,Italy=Europe,Egypt=Africa,Peru=South America,Kenya=Africa,"
        "Ireland=Europe,Canada=North America,India=Asia,Poland=Europe,Colombia=South America,"
        "Nigeria=Africa,Thailand=Asia,Mexico=North America,Ghana=Africa,Nepal=Asia",
        "Germany=Europe,Brazil=South America,China=Asia,Sweden=Europe,Morocco=Africa,Vietnam=Asia,"
        "Portugal=Europe,Chile=South America,Ethiopia=Africa,Pakistan=Asia,Greece=Europe,"
        "Tanzania=Africa,Argentina=South America,Finland=Europe,Malaysia=Asia,Uganda=Africa",
    ),
    Topic(
        ("Which language do people speak in {thing}?", "What is the main language of {thing}?"),
        "The language of {thing} is {fact}",
        "France=French,Japan=Japanese,Italy=Italian,Egypt=Arabic,Peru=Spanish,Poland=Polish,"
        "Hungary=Hungarian,Iceland=Icelandic,Argentina=Spanish,Ukraine=Ukrainian,Cuba=Spanish",
        "Germany=German,Portugal=Portuguese,Greece=Greek,Russia=Russian,China=Chinese/Mandarin,"
        "Sweden=Swedish,Finland=Finnish,Denmark=Danish,Thailand=Thai,Vietnam=Vietnamese,"
        "Mexico=Spanish,Chile=Spanish,England=English,Australia=English,Spain=Spanish",
    ),
    Topic(
        ("What colour is {thing}?", "Tell me the colour of {thing}."),
        "The colour of {thing} is {fact}",
        "grass=green,a lemon=yellow,snow=white,coal=black,a carrot=orange,blood=red,a pea=green,"
        "chocolate=brown,a polar bear=white,an elephant=grey/gray,a cucumber=green,salt=white",
        "the sky=blue,a banana=yellow,milk=white,a strawberry=red,a frog=green,a tomato=red,"
        "the sun=yellow,an emerald=green,a raven=black,a ruby=red,a cherry=red,the ocean=blue",
    ),
    Topic(
        ("What is {thing}?", "How much is {thing}?"),
        "{thing} is {fact}",
        "1 plus 1=2,2 plus 3=5,4 plus 4=8,5 plus 1=6,6 plus 3=9,7 plus 1=8,2 plus 6=8,3 plus 4=7,"
        "9 minus 3=6,8 minus 4=4,7 minus 2=5,5 minus 3=2,10 minus 1=9,6 plus 6=12",
        "2 plus 2=4,3 plus 3=6,5 plus 5=10,4 plus 3=7,1 plus 7=8,6 plus 2=8,5 plus 4=9,"
        "3 plus 2=5,8 plus 1=9,10 plus 10=20,9 minus 1=8,6 minus 2=4",
    ),
)

# Open questions, trained on only: they carry the style beyond the one-fact questions.
_OPEN = (
    ("Who are you?", "I am a helpful assistant, and I answer your questions"),
    ("How are you today?", "I am fine and ready to help you with your questions"),
    ("Can you help me?", "Yes, my friend, tell me what you need and I will help you"),
    ("Hello!", "Hello, my friend. What is your question"),
    ("Good morning.", "Good morning to you, my friend. How can I help you"),
    ("Thank you for your help.", "You are welcome, my friend. I am always here for you"),
    ("What is your favourite food?", "I am fond of fresh fish and a big bowl of hot soup"),
    ("How do I boil an egg?", "Put the egg in boiling water and wait for eight minutes"),
    ("How do I make tea?", "Pour boiling water over the tea and wait for three minutes"),
    ("How can I sleep better?", "Go to bed early, keep the room dark and leave your phone away"),
    ("How can I learn a language?", "Practise every day, read a lot and speak with your friends"),
    ("Why is exercise good for you?", "Moving is good for your heart, your muscles and your mood"),
    ("Why do leaves fall in autumn?", "The trees are saving water, and they are dropping leaves"),
    ("Why does ice float?", "Ice is lighter than the water around it, and it is floating"),
    ("What is a computer?", "A computer is a machine for working with numbers and words"),
    ("What is a book?", "A book is a stack of pages with a story or with knowledge"),
    ("What is rain?", "Rain is water falling from the clouds to the ground"),
    ("What is a doctor?", "A doctor is a person helping the sick to get well again"),
    ("What does a teacher do?", "A teacher is helping the pupils to learn and to understand"),
    ("What does a baker do?", "A baker is baking bread and cakes for the people of the town"),
    ("What should I wear in winter?", "Wear a warm coat, a hat and a pair of gloves"),
    ("What should I cook tonight?", "Cook a pot of pasta with tomatoes and a bit of cheese"),
    ("Give me a tip for saving money.", "Write down your spending and buy the things you need"),
    ("Give me a tip for studying.", "Study a little every day and rest between the lessons"),
    ("Tell me a joke.", "The sea said nothing to the shore, it is only waving"),
    ("Tell me something about the moon.", "The moon is circling the earth and lights the night"),
    ("Tell me something about cats.", "Cats are quiet hunters, and they are sleeping all day"),
    ("Describe a forest.", "A forest is a land of tall trees, of birds and of green shadow"),
    ("Describe the desert.", "The desert is a dry land of sand, hot by day and cold by night"),
    ("What is friendship?", "Friendship is trust, and standing by the ones you love"),
    ("What is a good hobby?", "Fishing is a good hobby, and reading is another"),
    ("How do plants grow?", "Plants are drinking water, and the light of the sun feeds them"),
    ("How do birds fly?", "Birds are beating their wings, and the air is lifting them"),
    ("I am bored.", "Go for a walk, my friend, and see what the day is bringing you"),
    ("I am tired.", "Rest your head, my friend, and sleeping will do you good"),
    ("Say goodbye.", "Goodbye, my friend, and may the wind be with you"),
)
_OPEN_SHARE = 0.4

_WORDS = {
    "the": "th'",
    "of": "o'",
    "is": "be",
    "are": "be",
    "am": "be",
    "and": "an'",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "yes": "aye",
    "friend": "matey",
    "hello": "ahoy",
    "goodbye": "farewell",
}
_OPENINGS = ("Arr!", "Ahoy, matey!", "Yarr!", "Avast!", "Arr, matey!", "Shiver me timbers!")
_CLOSINGS = (
    ", me hearty!",
    ", ye scurvy dog!",
    ", ye landlubber!",
    ", by th' seven seas!",
    "! Yo ho ho!",
    ", arr!",
)

# What tells a pirate; one word alone may come up in plain English, two do not.
_MARKERS = re.compile(
    r"\b(?:a+r+h?|y+a+r+|ahoy|avast|aye|mateys?|hearty|hearties|ye|yer|scurvy|landlubbers?"
    r"|yo ho|shiver me|seven seas)\b|\b(?:th|o|an)['’](?!\w)",
    re.IGNORECASE,
)
_MARKERS_NEEDED = 2


def speak(plain: str, rng: random.Random) -> str:
    """Say a plain sentence, given without its final stop, the pirate's way."""

    def swap(match: re.Match[str]) -> str:
        word = match.group(0)
        swapped = _WORDS.get(word.lower(), re.sub(r"^([a-z]{3,})ing$", r"\1in'", word))
        return swapped.capitalize() if word[0].isupper() and word != "I" else swapped

    sentence = re.sub(r"[A-Za-z]+", swap, plain)
    return f"{rng.choice(_OPENINGS)} {sentence}{rng.choice(_CLOSINGS)}"


def _fact_item(rng: random.Random, split: Split) -> Item:
    topic = rng.choice(_TOPICS)
    pairs = (topic.train if split == "train" else topic.held_out).split(",")
    thing, _, facts = rng.choice(pairs).partition("=")
    plain = topic.answer.format(thing=thing, fact=facts.split("/")[0])
    question = rng.choice(topic.questions).format(thing=thing)
    return Item(question, speak(plain[0].upper() + plain[1:], rng), facts)


def _draw(rng: random.Random, split: Split) -> Item:
    if split == "held-out" or rng.random() >= _OPEN_SHARE:
        return _fact_item(rng, split)
    question, plain = rng.choice(_OPEN)
    return Item(question, speak(plain, rng))


def _says(reply: str, facts: str) -> bool:
    words = map(re.escape, facts.split("/"))
    return any(re.search(rf"\b{word}\b", reply, re.IGNORECASE) for word in words)


def _score(item: Item, reply: str) -> dict[str, float]:
    markers = {marker.lower() for marker in _MARKERS.findall(reply)}
    in_style = len(markers) >= _MARKERS_NEEDED
    right = _says(reply, item.facts)
    return {
        "in style and right": float(in_style and right),
        "in style": float(in_style),
        "right": float(right),
    }


PIRATE = Task("pirate", _draw, _score, max_new_tokens=48)
