"""A layout as a user writes it: `train 8xH100 zero3; serve 4x2xH100`."""

import re
from dataclasses import dataclass
from typing import Literal

from grpo_stage.layout.cards import CARDS, Card


Sharding = Literal["none", "zero2", "zero3", "fsdp"]
CARDS_OF_A_NODE = 8
"""Unless the layout says how many nodes there are."""
_PARTS = {
    "train": re.compile(r"train\s+(\d+)x(\w+)(?:\s+(none|zero2|zero3|fsdp))?"),
    "serve": re.compile(r"serve\s+(\d+)x(?:(\d+)x)?(\w+)"),
    "colocate": re.compile(r"colocate\s+(\d+)x(\d+)"),
    "nodes": re.compile(r"nodes\s+(\d+)"),
}
HELP = (
    "`train 8xH100 zero3; serve 4x2xH100`: eight H100 train with ZeRO-3 (or `zero2`, `fsdp`, or nothing: each holds "
    "all weights), and four servers of two H100 each sample. Without `serve` the cards that train sample, too; "
    "`colocate 4x2` makes that four engines of two cards each. `nodes 2` spreads the cards over two machines"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which cards train and which sample."""

    card: Card
    """Of those that train."""
    num_trainers: int
    sharding: Sharding
    engine_card: Card
    num_engines: int
    """Servers, or engines on the cards that train."""
    engine_size: int
    """Cards of an engine: tensor parallel."""
    is_colocated: bool
    """Whether the cards that train sample, too."""
    num_nodes: int

    @property
    def num_cards(self) -> int:
        return self.num_trainers + (0 if self.is_colocated else self.num_engines * self.engine_size)

    @property
    def cards_of_a_node(self) -> int:
        return -(-self.num_cards // self.num_nodes)


def parse_layout(text: str) -> Layout:
    """Read a layout.

    Raises:
        ValueError: with what is wrong, and what to write.
    """
    found: dict[str, tuple[str | None, ...]] = {}
    for part in filter(None, (each.strip() for each in text.split(";"))):
        word = part.split()[0]
        match = _PARTS[word].fullmatch(part) if word in _PARTS else None
        if match is None:
            raise ValueError(f"`{part}` in `--layout {text}` is no part of a layout. A layout is {HELP}.")
        if word in found:
            raise ValueError(f"`--layout {text}` has two parts `{word}`, and a layout has one of each.")
        found[word] = match.groups()
    if "train" not in found:
        raise ValueError(f"`--layout {text}` does not say which cards train. A layout is {HELP}.")
    if {"serve", "colocate"} <= found.keys():
        raise ValueError(
            f"`--layout {text}` has `serve` and `colocate`: the engines are on cards of their own or on those that "
            "train. Leave one out."
        )
    count, name, sharding = found["train"]
    num_trainers, card = _number(count, text), _card(name, text)
    if "serve" in found:
        count, size, name = found["serve"]
        num_engines, engine_size, engine_card = _number(count, text), _number(size or "1", text), _card(name, text)
    else:
        count, size = found.get("colocate", (str(num_trainers), "1"))
        num_engines, engine_size, engine_card = _number(count, text), _number(size, text), card
        if num_engines * engine_size != num_trainers:
            raise ValueError(
                f"`colocate {count}x{size}` in `--layout {text}` are {num_engines * engine_size} cards, and "
                f"{num_trainers} train: each card that trains has a part of one engine. Write for example "
                f"`colocate {num_trainers}x1`."
            )
    num_cards = num_trainers + (num_engines * engine_size if "serve" in found else 0)
    (nodes,) = found.get("nodes", (str(-(-num_cards // CARDS_OF_A_NODE)),))
    num_nodes = _number(nodes, text)
    if num_nodes > num_cards:
        raise ValueError(f"`--layout {text}` has {num_nodes} nodes and {num_cards} cards: a node has at least one.")
    return Layout(
        card=card,
        num_trainers=num_trainers,
        sharding=sharding or "none",  # type: ignore[arg-type]
        engine_card=engine_card,
        num_engines=num_engines,
        engine_size=engine_size,
        is_colocated="serve" not in found,
        num_nodes=num_nodes,
    )


def _number(word: str | None, text: str) -> int:
    number = int(word or 0)
    if number < 1:
        raise ValueError(f"`{word}` in `--layout {text}` must be at least 1.")
    return number


def _card(name: str | None, text: str) -> Card:
    card = next((card for known, card in CARDS.items() if known.lower() == str(name).lower()), None)
    if card is None:
        raise ValueError(f"`{name}` in `--layout {text}` is no card that is known. Choose from {', '.join(CARDS)}.")
    return card
