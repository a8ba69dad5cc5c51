"""Text to SQL: questions over generated tables, scored by running the query in SQLite.

Knows the tables, the questions and the scorer; knows no model. The held-out split
uses tables and values that never occur in training. Over 300 lines, since two thirds
are word lists and templates, which say nothing without the generator that draws on
them: a file of its own would only be read beside this one.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from adapters.samples.task import Item, Split, Task

# A runaway query (a recursive WITH, a huge cross join) is cut off after this many
# SQLite virtual machine steps: the tables have 24 rows, a sane query needs a few hundred.
_MAX_STEPS = 200_000
_ROWS = 24
_DATABASES = 2

Row = tuple[object, ...]


@dataclass(frozen=True)
class Table:
    """A table to ask about: text columns with their values, number columns with a range."""

    name: str
    texts: dict[str, tuple[str, ...]]
    numbers: dict[str, tuple[int, int]]


def _table(name: str, texts: dict[str, str], numbers: dict[str, tuple[int, int]]) -> Table:
    return Table(name, {column: tuple(v.split("|")) for column, v in texts.items()}, numbers)


_TRAIN_TABLES = (
    _table(
        "employees",
        {"city": "Paris|Oslo|Madrid|Rome", "department": "sales|legal|finance|support"},
        {"salary": (2000, 9000), "age": (18, 67)},
    ),
    _table(
        "orders",
        {"customer": "Anna|Bruno|Carla|David", "status": "open|paid|shipped|cancelled"},
        {"amount": (5, 900), "quantity": (1, 60)},
    ),
    _table(
        "books",
        {"author": "Austen|Borges|Camus|Dickens", "genre": "crime|poetry|history|fantasy"},
        {"pages": (60, 900), "year": (1900, 2020)},
    ),
    _table(
        "cars",
        {"brand": "Fiat|Volvo|Toyota|Skoda", "colour": "red|blue|white|black"},
        {"price": (900, 60000), "mileage": (10, 200000)},
    ),
    _table(
        "songs",
        {"artist": "Mira|Tonic|Delta Five|Juno", "genre": "rock|jazz|folk|techno"},
        {"seconds": (90, 600), "plays": (10, 90000)},
    ),
    _table(
        "students",
        {"name": "Emma|Felix|Greta|Hugo", "subject": "physics|music|biology|law"},
        {"grade": (1, 100), "age": (17, 40)},
    ),
    _table(
        "products",
        {"category": "toys|garden|kitchen|sports", "supplier": "Acme|Nordix|Solano|Vertex"},
        {"price": (2, 500), "stock": (0, 900)},
    ),
    _table(
        "trips",
        {"destination": "Lisbon|Vienna|Athens|Dublin", "driver": "Ivan|Julia|Karim|Lena"},
        {"distance": (3, 900), "cost": (10, 800)},
    ),
    _table(
        "invoices",
        {"client": "Baker Ltd|Orion|Lumen|Petra", "currency": "EUR|USD|GBP|CHF"},
        {"total": (20, 9000), "days": (1, 90)},
    ),
    _table(
        "patients",
        {"doctor": "Adler|Brandt|Conti|Duval", "ward": "north|south|east|west"},
        {"weight": (40, 140), "visits": (1, 50)},
    ),
    _table(
        "matches",
        {"team": "Lions|Bears|Hawks|Wolves", "stadium": "Arena|Park|Dome|Oval"},
        {"goals": (0, 40), "spectators": (100, 60000)},
    ),
    _table(
        "houses",
        {"street": "Main Street|Oak Lane|Mill Road|High Street", "type": "villa|flat|cottage|loft"},
        {"rent": (300, 4000), "rooms": (1, 50)},
    ),
    _table(
        "flights",
        {"airline": "Condor|Finnair|Iberia|Swiss", "origin": "Berlin|Zurich|Prague|Milan"},
        {"delay": (0, 300), "seats": (20, 400)},
    ),
    _table(
        "recipes",
        {"cuisine": "Thai|Greek|Indian|Mexican", "level": "easy|medium|hard|expert"},
        {"minutes": (5, 240), "calories": (80, 1500)},
    ),
    _table(
        "tickets",
        {"priority": "low|normal|high|urgent", "agent": "Mona|Nils|Olga|Pedro"},
        {"hours": (1, 90), "replies": (0, 50)},
    ),
    _table(
        "machines",
        {"model": "X100|X200|Z5|Z9", "site": "Hall A|Hall B|Hall C|Yard"},
        {"power": (5, 500), "runtime": (10, 9000)},
    ),
    _table(
        "films",
        {"director": "Kubrick|Varda|Leone|Ozu", "country": "France|Japan|Italy|Spain"},
        {"rating": (1, 100), "budget": (10, 9000)},
    ),
    _table(
        "accounts",
        {"owner": "Quinn|Rosa|Stefan|Tara", "branch": "Leeds|Bristol|York|Bath"},
        {"balance": (10, 90000), "year": (1990, 2024)},
    ),
    _table(
        "plants",
        {"species": "oak|maple|birch|pine", "garden": "rose garden|orchard|meadow|terrace"},
        {"height": (5, 900), "age": (1, 300)},
    ),
    _table(
        "courses",
        {"teacher": "Weber|Young|Ziegler|Moreau", "room": "A1|B2|C3|D4"},
        {"credits": (1, 60), "hours": (5, 300)},
    ),
)

_HELD_OUT_TABLES = (
    _table(
        "ships",
        {"port": "Hamburg|Genoa|Bergen|Cork", "flag": "Malta|Panama|Greece|Norway"},
        {"length": (20, 400), "crew": (3, 90)},
    ),
    _table(
        "players",
        {"club": "Tigers|Rovers|Comets|Sharks", "position": "keeper|striker|winger|defender"},
        {"points": (1, 400), "height": (150, 215)},
    ),
    _table(
        "hotels",
        {"town": "Nice|Graz|Porto|Ghent", "chain": "Bellevue|Astoria|Regent|Mirador"},
        {"beds": (10, 800), "price": (40, 900)},
    ),
    _table(
        "phones",
        {"maker": "Nokia|Sony|Fairphone|Motorola", "system": "Android|KaiOS|Symbian|Sailfish"},
        {"weight": (90, 300), "storage": (4, 1024)},
    ),
    _table(
        "parcels",
        {"sender": "Ulrich|Vera|Wanda|Xavier", "country": "Peru|Chile|Kenya|Nepal"},
        {"postage": (3, 120), "grams": (50, 20000)},
    ),
    _table(
        "wines",
        {"grape": "Merlot|Riesling|Malbec|Syrah", "region": "Mosel|Rioja|Douro|Alsace"},
        {"vintage": (1980, 2022), "bottles": (6, 900)},
    ),
)

_AGGREGATES = {
    "AVG": ("average", "mean"),
    "MAX": ("highest", "maximum", "largest"),
    "MIN": ("lowest", "minimum", "smallest"),
    "SUM": ("total", "sum of the"),
}


@dataclass(frozen=True)
class Draw:
    """One table with the columns and values a question is about."""

    table: str
    text: str
    value: str
    other: str
    number: str
    limit: int


Question = tuple[str, str]


def _count(rng: random.Random, d: Draw) -> Question:
    asked = rng.choice(
        (f"How many {d.table} have {d.text} {d.value}?", f"Count the {d.table} with {d.text} {d.value}.")
    )
    return asked, f"SELECT COUNT(*) FROM {d.table} WHERE {d.text} = '{d.value}';"


def _aggregate(rng: random.Random, d: Draw) -> Question:
    function = rng.choice(sorted(_AGGREGATES))
    word = rng.choice(_AGGREGATES[function])
    asked = f"What is the {word} {d.number} of all {d.table}?"
    return asked, f"SELECT {function}({d.number}) FROM {d.table};"


def _aggregate_where(rng: random.Random, d: Draw) -> Question:
    function = rng.choice(sorted(_AGGREGATES))
    word = rng.choice(_AGGREGATES[function])
    asked = f"What is the {word} {d.number} of {d.table} with {d.text} {d.value}?"
    return asked, f"SELECT {function}({d.number}) FROM {d.table} WHERE {d.text} = '{d.value}';"


def _compare(rng: random.Random, d: Draw) -> Question:
    sign, word = rng.choice(((">", "above"), ("<", "below"), (">", "more than"), ("<", "less than")))
    asked = f"List the {d.other} of {d.table} with {d.number} {word} {d.limit}."
    return asked, f"SELECT {d.other} FROM {d.table} WHERE {d.number} {sign} {d.limit};"


def _count_compare(rng: random.Random, d: Draw) -> Question:
    sign, word = rng.choice(((">", "above"), ("<", "below"), (">", "more than"), ("<", "less than")))
    asked = f"How many {d.table} with {d.text} {d.value} have {d.number} {word} {d.limit}?"
    query = f"SELECT COUNT(*) FROM {d.table} WHERE {d.text} = '{d.value}' AND {d.number} {sign} {d.limit};"
    return asked, query


def _top(rng: random.Random, d: Draw) -> Question:
    order, word = rng.choice((("DESC", "highest"), ("ASC", "lowest")))
    count = rng.randint(2, 9)
    asked = f"Show the {d.other} of the {count} {d.table} with the {word} {d.number}."
    return asked, f"SELECT {d.other} FROM {d.table} ORDER BY {d.number} {order} LIMIT {count};"


def _distinct(rng: random.Random, d: Draw) -> Question:
    asked = rng.choice((f"Which different {d.text} values are in {d.table}?", f"List each {d.text} in {d.table} once."))
    return asked, f"SELECT DISTINCT {d.text} FROM {d.table};"


def _sorted(rng: random.Random, d: Draw) -> Question:
    order, word = rng.choice((("DESC", "highest"), ("ASC", "lowest")))
    asked = f"List the {d.other} of all {d.table}, {word} {d.number} first."
    return asked, f"SELECT {d.other} FROM {d.table} ORDER BY {d.number} {order};"


def _filter(rng: random.Random, d: Draw) -> Question:
    asked = rng.choice(
        (
            f"Show the {d.number} of {d.table} with {d.text} {d.value}.",
            f"What {d.number} do {d.table} with {d.text} {d.value} have?",
        )
    )
    return asked, f"SELECT {d.number} FROM {d.table} WHERE {d.text} = '{d.value}';"


def _group_count(rng: random.Random, d: Draw) -> Question:
    asked = rng.choice((f"How many {d.table} are there for each {d.text}?", f"Count the {d.table} per {d.text}."))
    return asked, f"SELECT {d.text}, COUNT(*) FROM {d.table} GROUP BY {d.text};"


def _group_aggregate(rng: random.Random, d: Draw) -> Question:
    function = rng.choice(sorted(_AGGREGATES))
    word = rng.choice(_AGGREGATES[function])
    asked = f"What is the {word} {d.number} for each {d.text} in {d.table}?"
    return asked, f"SELECT {d.text}, {function}({d.number}) FROM {d.table} GROUP BY {d.text};"


_QUESTIONS: tuple[Callable[[random.Random, Draw], Question], ...] = (
    _count,
    _aggregate,
    _aggregate_where,
    _compare,
    _count_compare,
    _top,
    _sorted,
    _filter,
    _distinct,
    _group_count,
    _group_aggregate,
)


def _columns(rng: random.Random, table: Table, needed: set[str]) -> list[str]:
    """Choose three or four columns, the needed ones among them, and sometimes an id."""
    spare = [column for column in (*table.texts, *table.numbers) if column not in needed]
    columns = [*sorted(needed), *rng.sample(spare, rng.randint(max(0, 3 - len(needed)), len(spare)))]
    rng.shuffle(columns)
    return columns if rng.random() < 0.5 else ["id", *columns]


def _draw(rng: random.Random, split: Split) -> Item:
    table = rng.choice(_TRAIN_TABLES if split == "train" else _HELD_OUT_TABLES)
    text, number = rng.choice(sorted(table.texts)), rng.choice(sorted(table.numbers))
    low, high = table.numbers[number]
    other = rng.choice([column for column in (*table.texts, *table.numbers) if column != number])
    # The limit stays away from both ends, so that the comparison separates the rows.
    limit = rng.randint(low + (high - low) // 4, high - (high - low) // 4)
    draw = Draw(table.name, text, rng.choice(table.texts[text]), other, number, limit)
    asked, query = rng.choice(_QUESTIONS)(rng, draw)
    columns = ", ".join(_columns(rng, table, {text, number, other}))
    prompt = f"Write one SQLite query.\nTable: {table.name}({columns})\nQuestion: {asked}"
    return Item(prompt, query, facts=f"{table.name}({columns})")


def _column(rng: random.Random, table: Table, column: str) -> list[str] | list[int]:
    """Fill one column; numbers are all different, so that every order is defined."""
    if column in table.texts:
        return [rng.choice(table.texts[column]) for _ in range(_ROWS)]
    low, high = table.numbers.get(column, (1, 10 * _ROWS))
    return rng.sample(range(low, high + 1), _ROWS)


def _fill(schema: str, seed: int) -> sqlite3.Connection:
    """Make an in-memory database with the one table of a prompt, `name(column, ...)`."""
    name, _, listed = schema.removesuffix(")").partition("(")
    table = next(t for t in (*_TRAIN_TABLES, *_HELD_OUT_TABLES) if t.name == name)
    rng = random.Random(f"{schema} {seed}")
    columns = [_column(rng, table, column) for column in listed.split(", ")]
    database = sqlite3.connect(":memory:")
    database.execute(f"CREATE TABLE {schema}")
    places = ", ".join("?" * len(columns))
    rows = zip(*columns, strict=True)
    database.executemany(f"INSERT INTO {name} VALUES ({places})", rows)
    database.commit()
    database.execute("PRAGMA query_only = ON")
    database.set_progress_handler(lambda: 1, _MAX_STEPS)
    return database


def _rows(database: sqlite3.Connection, query: str, ordered: bool) -> list[Row] | None:
    """Run the query; None when SQLite rejects it. Columns may come in any order."""
    try:
        found = database.execute(query).fetchmany(10 * _ROWS)
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None
    rows = [tuple(sorted(row, key=repr)) for row in found]
    return rows if ordered else sorted(rows, key=repr)


def extract_query(reply: str) -> str:
    """Take the first SELECT out of a reply, from a code block or from among prose."""
    match = re.search(r"\b(?:SELECT|WITH)\b.*?(?:;|```|\n\s*\n|$)", reply, re.IGNORECASE | re.DOTALL)
    return match.group(0).removesuffix("```") if match else ""


def _score(item: Item, reply: str) -> dict[str, float]:
    query = extract_query(reply)
    ordered = "ORDER BY" in item.answer
    matches = bool(query)
    for seed in range(_DATABASES):
        database = _fill(item.facts, seed)
        expected = _rows(database, item.answer, ordered)
        matches = matches and _rows(database, query, ordered) == expected
        database.close()
    return {"execution accuracy": float(matches)}


SQL = Task("sql", _draw, _score, max_new_tokens=56)
