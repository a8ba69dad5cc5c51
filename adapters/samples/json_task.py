"""Free text to JSON: short notes and the fields to take from them, scored by field F1.

Knows the notes, the fields and the scorer; knows no model. The held-out split has
names, things and sentences that never occur in training, and one kind of note
(rentals) whose fields training never asks for.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from adapters.samples.task import Item, Split, Task

_MONTHS = ("January February March April May June July August September October November December").split()

_FIRST = {
    "train": (
        "Anna Bruno Carla David Emma Felix Greta Hugo Ines Jonas Karin Luis Marta Nils Olga Pablo "
        "Rosa Stefan Tara Victor Alice Ben Chloe Daniel Elena Frank Grace Henry Iris Jack"
    ).split(),
    "held-out": "Amira Boris Celine Dmitri Esther Farid Gloria Hassan Irina Joel Kenji Leila".split(),
}
_LAST = {
    "train": (
        "Keller Moreau Rossi Novak Silva Jensen Weber Costa Dubois Larsen Meyer Santos Brown Clark "
        "Evans Fischer Green Hill Jones King Lewis Moore Parker Reed Scott Turner"
    ).split(),
    "held-out": "Okafor Tanaka Ivanov Haddad Lindqvist Peralta Whitmore Yilmaz Zhang Abbott".split(),
}
_CITY = {
    "train": (
        "Paris Oslo Madrid Rome Vienna Lisbon Berlin Dublin Prague Milan Zurich Athens Leeds "
        "Bristol Munich Lyon Turin Seville Boston Chicago"
    ).split(),
    "held-out": "Hamburg Genoa Bergen Cork Porto Ghent Graz Nice Denver Osaka".split(),
}
_THING = {
    "train": (
        "desk lamp|office chair|bicycle|coffee machine|laptop|phone case|garden table|toaster|"
        "winter coat|guitar|bookshelf|camera|tent|printer|backpack|vacuum cleaner|mirror|kettle"
    ).split("|"),
    "held-out": (
        "electric piano|rain jacket|standing desk|blender|sewing machine|skateboard|wool carpet|"
        "microscope|camping stove|wall clock"
    ).split("|"),
}
_TOPIC = {
    "train": (
        "budget|hiring|the new website|security|marketing|the annual report|training|travel costs|"
        "the office move|product design|quality control|customer support"
    ).split("|"),
    "held-out": "data privacy|the trade fair|supplier contracts|payroll|the summer party".split("|"),
}


@dataclass(frozen=True)
class Note:
    """A kind of note: its fields, and sentences for training and for the held-out split."""

    fields: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]


# A field is its kind, or `kind:label` where the prompt calls it something else.
_NOTES = (
    Note(
        ("name:customer", "item", "amount", "date"),
        (
            "{customer} bought a {item} for {amount} euros on {date}.",
            "On {date} we sold a {item} to {customer}; the price was {amount} euros.",
            "Payment of {amount} euros received on {date} from {customer} for a {item}.",
            "Receipt: {item}, {amount} euros, {date}. Buyer: {customer}.",
        ),
        (
            "{customer} paid us {amount} euros for the {item} and picked it up on {date}.",
            "The {item} went to {customer} on {date} at a price of {amount} euros.",
        ),
    ),
    Note(
        ("name:organizer", "topic", "city", "date"),
        (
            "{organizer} invites you to a meeting about {topic} in {city} on {date}.",
            "Meeting on {topic}: {date}, {city}, organised by {organizer}.",
            "On {date} we meet in {city} to talk about {topic}. Ask {organizer} for details.",
        ),
        ("Please come to {city} on {date}: {organizer} will lead the talk on {topic}.",),
    ),
    Note(
        ("name:guest", "city", "nights", "date"),
        (
            "{guest} books a room in {city} for {nights} nights from {date}.",
            "Hotel booking: {guest}, {nights} nights in {city}, arriving {date}.",
            "Arriving on {date}, {guest} will stay {nights} nights at our hotel in {city}.",
        ),
        ("Our hotel in {city} expects {guest} on {date}, staying {nights} nights.",),
    ),
    Note(
        ("name:recipient", "item", "quantity", "city"),
        (
            "Please ship {quantity} units of the {item} to {recipient} in {city}.",
            "{recipient} from {city} is waiting for {quantity} pieces of the {item}.",
            "Delivery to {city}: {quantity} x {item}, addressed to {recipient}.",
        ),
        ("We owe {recipient} {quantity} pieces of the {item}; the address is in {city}.",),
    ),
    Note(
        ("name", "age", "city", "phone"),
        (
            "My name is {name}, I am {age} years old, I live in {city}, call me at {phone}.",
            "New member: {name} ({age}) from {city}, phone {phone}.",
            "You can reach {name}, aged {age}, of {city}, on {phone}.",
        ),
        ("I'm {name} from {city}, {age} years of age. My number is {phone}.",),
    ),
    Note(
        ("name:employee", "hours", "topic:project", "date"),
        (
            "{employee} worked {hours} hours on {project} on {date}.",
            "Time sheet of {date}: {employee}, {hours} hours, {project}.",
            "On {date}, {employee} logged {hours} hours for {project}.",
        ),
        ("It took {employee} {hours} hours to finish the work on {project} on {date}.",),
    ),
)
_HELD_OUT_ONLY = Note(
    ("name:tenant", "item:equipment", "amount:deposit", "city:branch"),
    (),
    ("{tenant} rents a {equipment} from our {branch} branch, leaving a deposit of {deposit} euros.",),
)


def _date(rng: random.Random) -> tuple[str, str]:
    year, month, day = rng.randint(2019, 2029), rng.randint(1, 12), rng.randint(1, 28)
    name = _MONTHS[month - 1]
    written = rng.choice((f"{day} {name} {year}", f"{name} {day}, {year}"))
    return written, f"{year}-{month:02d}-{day:02d}"


def _amount(rng: random.Random) -> tuple[str, float]:
    cents = rng.choice((0, 0, 50, 25, 99, 90)) + 100 * rng.randint(3, 999)
    return (f"{cents / 100:.2f}", cents / 100) if cents % 100 else (str(cents // 100), cents // 100)


def _value(rng: random.Random, kind: str, split: Split) -> tuple[str, str | int | float]:
    """Draw one field: how the note writes it and what the JSON says."""
    if kind == "date":
        return _date(rng)
    if kind == "amount":
        return _amount(rng)
    if kind in ("nights", "quantity", "age", "hours"):
        number = rng.randint(2, 9) if kind in ("nights", "hours") else rng.randint(11, 89)
        return str(number), number
    if kind == "phone":
        phone = f"0{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"
        return phone, phone
    if kind == "name":
        name = f"{rng.choice(_FIRST[split])} {rng.choice(_LAST[split])}"
        return name, name
    text = rng.choice({"city": _CITY, "item": _THING, "topic": _TOPIC}[kind][split])
    return text, text


def _draw(rng: random.Random, split: Split) -> Item:
    note = rng.choice(_NOTES if split == "train" else (*_NOTES, _HELD_OUT_ONLY))
    written: dict[str, str] = {}
    values: dict[str, str | int | float] = {}
    for field in note.fields:
        kind, _, label = field.partition(":")
        label = label or kind
        written[label], values[label] = _value(rng, kind, split)
    text = rng.choice(note.train if split == "train" else note.held_out).format(**written)
    # A random subset in random order: the answer follows the request, not the sentence.
    asked = rng.sample(list(values), rng.choice((2, 3, 3, 4)))
    keys = ", ".join("date (YYYY-MM-DD)" if label == "date" else label for label in asked)
    prompt = f"Extract as JSON with keys {keys}.\nText: {text}"
    return Item(prompt, json.dumps({label: values[label] for label in asked}))


def extract_object(reply: str) -> dict[str, object]:
    """Take the first JSON object out of a reply; empty when there is none."""
    decoder = json.JSONDecoder()
    for start, character in enumerate(reply):
        if character == "{":
            try:
                found, _ = decoder.raw_decode(reply, start)
            except ValueError:
                continue
            return found if isinstance(found, dict) else {}
    return {}


def _score(item: Item, reply: str) -> dict[str, float]:
    expected: dict[str, object] = json.loads(item.answer)
    found = extract_object(reply)
    right = sum(key in expected and expected[key] == value for key, value in found.items())
    field_f1 = 2 * right / (len(expected) + len(found))
    return {"field F1": field_f1, "all fields right": float(found == expected)}


JSON = Task("json", _draw, _score, max_new_tokens=80)
