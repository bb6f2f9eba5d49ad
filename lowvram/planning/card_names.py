"""Cards as people call them: in any spelling, or described by what is known of them."""

from __future__ import annotations

import dataclasses
import functools
import re

from lowvram.byte_sizes import parse_bytes
from lowvram.planning.card_table import CARDS, link_rate
from lowvram.planning.cards import GIGA, TERA, Card
from lowvram.planning.memory_costs import GIB
from lowvram_kernels.errors import ConfigError

CUSTOM = "custom:"
DEFAULT_CARD = "rtx4090"
EXPECTED = (
    'expected auto (the card at hand), a card as rtx4090 or "RTX 4060 Ti 16GB" (--gpu list has them all), or '
    f"{CUSTOM}vram=24GiB,like=rtx3090"
)
# What a name is made of, in the order of looking: words that say which card it is, memory, models, all else.
_TOKEN = re.compile(
    r"(?P<word>rtx|gtx|pro|titan|quadro|super|laptop|mobile|notebook|max\W?q|ti|sff|ada|blackwell|server|nvl|pcie?)"
    r"|(?P<slot>sxm\d?)|g?ddr\w*|hbm\w*"
    r"|(?P<memory>\d{1,3})\s*g(?:i?b)?(?![a-z0-9])"
    r"|(?P<model>(?:[abhlptv](?=\d))?\d+)(?P<suffix>[sgdm](?![a-z]))?"
    r"|(?P<other>[a-z]+)"
)
_SAME = {"mobile": "laptop", "notebook": "laptop", "pci": "pcie"}
_SUFFIXES = {"s": "super", "m": "laptop", "d": "d", "g": "g"}
# Words that say nothing, where a card is not told from another by them.
_IDLE = frozenset({"rtx", "gtx", "sxm", "pcie"})
# Of these the slot tells which one it is.
_BY_SLOT = frozenset({"h100", "h200"})
_OTHERS = frozenset({"amd", "radeon", "rx", "intel", "arc", "apple", "instinct", "ryzen"})
# A card is sold with a little more than its driver reports.
_CLOSE = 0.08


@dataclasses.dataclass(frozen=True)
class Named:
    """``words`` of a name, models among them, and the gigabytes that it gives, None where it gives none."""

    words: frozenset[str]
    models: frozenset[str]
    memory_gb: int | None
    others: frozenset[str]


@functools.lru_cache(maxsize=256)
def read_name(text: str) -> Named:
    """Take a name apart: "RTX 4060 Ti 16GB" -> rtx, 4060, ti and 16."""
    words: set[str] = set()
    others: set[str] = set()
    models: list[str] = []
    memory: int | None = None
    for match in _TOKEN.finditer(text.lower()):
        if match["memory"]:
            memory = int(match["memory"])
        elif match["word"]:
            word = re.sub(r"\W", "", match["word"])
            words.add(_SAME.get(word, word))
        elif match["slot"]:
            words.add("sxm")
        elif match["model"]:
            bare = match["model"].isdecimal()
            if bare and models and len(match["model"]) < 4:
                memory = int(match["model"])
                continue
            models.append(match["model"])
            words |= _with_suffix(models, match["suffix"])
        elif match["other"] in _SUFFIXES and models:  # "4090 D", "L40 S"
            words |= _with_suffix(models, match["other"])
        elif match["other"]:
            others.add(match["other"])
    if "maxq" in words and "pro" not in words:
        words = words - {"maxq"} | {"laptop"}
    return Named(frozenset({*words, *models}), frozenset(models), memory, frozenset(others))


def _with_suffix(models: list[str], suffix: str | None) -> set[str]:
    """A letter behind a model: a word of its own on GeForce cards, a part of the model on others."""
    if not suffix:
        return set()
    if models[-1].isdecimal():
        return {_SUFFIXES[suffix]}
    models[-1] += suffix
    return set()


def cards_called(text: str) -> list[Card]:
    """All cards that a name may mean: those that it names exactly, else those that it names in part. Empty where it
    means none, or gives another amount of memory than they have."""
    asked = read_name(text)
    if not asked.models and "titan" not in asked.words:
        return []
    names = {card.name: read_name(card.name) for card in CARDS.values()}
    exact = [name for name, own in names.items() if _means(asked, own)]
    found = exact or [name for name, own in names.items() if asked.models and asked.words - _IDLE <= own.words]
    if asked.memory_gb is not None:
        return [CARDS[name] for name in found if _has(CARDS[name], asked.memory_gb)]
    usual = [name for name in found if names[name].memory_gb is None]  # "rtx3060" is not its edition with 8 GB
    return [CARDS[name] for name in (usual if exact and usual else found)]


def _means(asked: Named, own: Named) -> bool:
    """Every word that tells the card is there, and none that tells another."""
    idle = _IDLE - {"pcie"} if own.models & _BY_SLOT else _IDLE
    telling = own.words - idle - {"blackwell"} if own.models else own.words
    return telling <= asked.words and asked.words - idle <= own.words


def _has(card: Card, memory_gb: int) -> bool:
    there = card.vram_bytes / GIB
    return abs(memory_gb - there) <= _CLOSE * there


def card_named(text: str) -> Card:
    """The card of a name in any spelling, or of a description; see ``custom_card``.

    Raises:
        ConfigError: no card of the table, or one of several, which the error names.
    """
    if text.lower().strip().startswith(CUSTOM.rstrip(":")):
        return custom_card(text)
    found = cards_called(text)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(card.name for card in found)
        raise ConfigError(f"--gpu is {text!r}, which names several cards; expected one of them: {names}")
    if read_name(text).others & _OTHERS:
        raise ConfigError(f"--gpu is {text!r}, and cards of NVIDIA are all that this runs on; {EXPECTED}")
    near = _near(text)
    raise ConfigError(f"--gpu is {text!r}, which is no card that is known{near}; {EXPECTED}")


def _near(text: str) -> str:
    """Cards with the same number, of which one may be meant."""
    numbers = {number for model in read_name(text).models for number in re.findall(r"\d{3,}", model)}
    names = [name for name in CARDS if numbers & set(re.findall(r"\d{3,}", name))]
    return f" (near it are {', '.join(names)})" if names else ""


def custom_card(text: str) -> Card:
    """``custom:vram=24GiB,like=rtx3090,bandwidth=936GB/s,pcie=4x16,int8=284,bf16=71,fp32=35,fp8=none,usable=22GiB,sm=86``.

    All but ``vram`` may be left out, and is then what the card of ``like`` has. Rates are tera operations a second,
    dense; ``bandwidth`` is that of the card's memory; ``pcie`` generation and lanes, or GB/s each way.

    Raises:
        ConfigError: a field that is unknown, missing, given twice, or no number above 0.
    """
    given = _fields(text)
    like = card_named(given.pop("like", DEFAULT_CARD))
    vram = parse_bytes(given.pop("vram"), "--gpu custom: vram")
    share = like.usable_bytes / like.vram_bytes
    usable = parse_bytes(given.pop("usable"), "--gpu custom: usable") if "usable" in given else int(share * vram)
    if usable > vram:
        raise ConfigError(f"--gpu is {text!r}; expected usable to be vram at the most")
    rates: dict[str, float | None] = {}
    for name, value in given.items():
        if name == "pcie":
            rates |= dict.fromkeys(("h2d", "d2h"), _link(value))
        elif name == "bandwidth":
            rates["memory"] = _number(name, value, r"(g|t)?i?b?(/s|ps)?", {"": GIGA, "g": GIGA, "t": TERA})
        elif name == "fp8" and value.lower() in ("none", "no", "0"):
            rates["fp8"] = None
        elif name != "sm":
            rates[name] = _number(name, value, r"(t|p)?(ops|flops)?(/s)?", {"": TERA, "t": TERA, "p": 1000 * TERA})
    sm = _generation(given["sm"]) if "sm" in given else like.generation
    if sm is not None and sm < 89 and "fp8" not in rates:
        rates["fp8"] = None
    taken = [name for name in ("bandwidth", "pcie", "int8", "bf16", "fp8", "fp32") if name not in given]
    taken = [name for name in taken if name != "fp8" or rates.get("fp8", like.rates.fp8) is not None]
    return dataclasses.replace(
        like,
        name="custom",
        vram_bytes=vram,
        usable_bytes=usable,
        rates=dataclasses.replace(like.rates, **rates, generation=sm),  # type: ignore[arg-type]  # fields are _FIELDS'
        generation=sm,
        said=f"{', '.join(taken)} of the custom card are those of {like.name}" if taken else "",
    )


_FIELDS = ("vram", "usable", "like", "bandwidth", "pcie", "int8", "bf16", "fp8", "fp32", "sm")


def _fields(text: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for part in text.strip()[len(CUSTOM) :].split(","):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        name = name.lower()
        if not sign or not value or name not in _FIELDS or name in given:
            raise ConfigError(
                f"--gpu is {text!r}, and {part.strip()!r} in it cannot be; expected {CUSTOM}vram=24GiB and of "
                f"{', '.join(_FIELDS[1:])} what is known, each once as name=value, commas between"
            )
        given[name] = value
    if "vram" not in given:
        raise ConfigError(f"--gpu is {text!r}, without vram; expected {CUSTOM}vram=24GiB at the least")
    return given


def _number(name: str, value: str, unit: str, sizes: dict[str, float]) -> float:
    found = re.fullmatch(rf"(\d+\.?\d*)\s*{unit}", value.lower(), flags=re.ASCII)
    number = float(found[1]) * sizes[found[2] or ""] if found else 0.0
    if not 0 < number < 1e20:
        example = {"bandwidth": "936GB/s", "int8": "284 (TOPS)"}.get(name, "71 (TFLOPS)")
        raise ConfigError(f"--gpu custom: {name} is {value!r}; expected a number above 0, as {example}")
    return number


def _link(value: str) -> float:
    lanes = re.fullmatch(r"(?:gen\s*)?([345])(?:\.0)?\s*x\s*(1|2|4|8|16)", value.lower(), flags=re.ASCII)
    if lanes:
        return link_rate(f"{lanes[1]}x{lanes[2]}")
    try:
        return _number("pcie", value, r"(g|t)?b?(/s|ps)?", {"": GIGA, "g": GIGA, "t": TERA})
    except ConfigError:
        raise ConfigError(
            f"--gpu custom: pcie is {value!r}; expected generation and lanes, as 4x16, or GB/s each way, as 25"
        ) from None


def _generation(value: str) -> int:
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", value.lower(), flags=re.ASCII)
    if found is None:
        raise ConfigError(f"--gpu custom: sm is {value!r}; expected a compute capability, as 8.6 or sm_86")
    return int(found[1] + found[2])
