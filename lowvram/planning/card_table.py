"""Graphics cards by name: memory, rates, link and compute capability.

Sources: NVIDIA's data sheets and product pages of each card (memory, bandwidth, link, single-precision rate), its
architecture papers (Turing, Ampere GA102, Ada, Blackwell RTX; A100, H100) for what tensor cores do beside that rate,
and for laptops its pages that compare them; laptops of the RTX 50 series by the AI TOPS that were announced. The clocks
of RTX PRO 4500, 4000 and 2000 are those that public databases of cards have. Memory is what the driver reports where
that is known, else what the card is sold with.

Rates are dense, bf16 and fp8 with float32 accumulation. Of GeForce cards tensor cores accumulate in float32 at half
rate: bf16 at twice and fp8 at four times the single-precision rate; of professional ones at full rate, which is twice
that; int8 is eight times on both.
"""

from __future__ import annotations

from lowvram.planning.cards import GIGA, TERA, Card, Rates
from lowvram.planning.memory_costs import GIB, MIB

# GB/s each way that pinned copies of tens of MiB reach over 16 lanes, by generation of PCIe: 25 of 32, 50 of 64.
_LINKS = {3: 12.5, 4: 25.0, 5: 50.0}
# Of a card that also draws a desktop, the share that is left beside that and the CUDA context; of others what the
# context and the driver take. Judged by what was free on cards of both kinds, not measured on each.
_DESKTOP_SHARE, _CONTEXT_GIB, _CONTEXT_SHARE = 0.92, 1.2, 0.01

# Of int8, fp8 (None: no units), bf16 and fp32, in tera operations a second.
Tops = tuple[float, float | None, float, float]

_OF_A_LAPTOP = "rates are those of the highest boost clock: a laptop reaches less, by its power limit"


def link_rate(link: str) -> float:
    """ "4x16" -> bytes a second each way."""
    generation, lanes = (int(part) for part in link.split("x"))
    return _LINKS[generation] * GIGA * lanes / 16


def _card(name: str, sm: int, mib: int, *, rates: Tops, memory: float, link: str, usable: float) -> Card:
    """``memory`` in GB/s, ``usable`` in GiB."""
    int8, fp8, bf16, fp32 = rates
    over = link_rate(link)
    return Card(
        name=name,
        vram_bytes=mib * MIB,
        usable_bytes=int(usable * GIB),
        rates=Rates(
            int8=int8 * TERA,
            fp8=fp8 and fp8 * TERA,
            bf16=bf16 * TERA,
            fp32=fp32 * TERA,
            h2d=over,
            d2h=over,
            memory=memory * GIGA,
            generation=sm,
        ),
        generation=sm,
        said=_OF_A_LAPTOP if name.endswith("-laptop") or "-laptop-" in name else "",
    )


def _desktop(mib: int) -> float:
    return _DESKTOP_SHARE * mib / 1024


def _geforce(
    name: str, sm: int, mib: int, fp32: float, memory: float, link: str = "4x16", usable: float | None = None
) -> Card:
    rates = (8 * fp32, 4 * fp32 if sm >= 89 else None, 2 * fp32, fp32)
    return _card(name, sm, mib, rates=rates, memory=memory, link=link, usable=usable or _desktop(mib))


def _workstation(
    name: str, sm: int, mib: int, fp32: float, memory: float, link: str = "4x16", usable: float | None = None
) -> Card:
    rates = (8 * fp32, 8 * fp32 if sm >= 89 else None, 4 * fp32, fp32)
    return _card(name, sm, mib, rates=rates, memory=memory, link=link, usable=usable or _desktop(mib))


def _data_centre(
    name: str,
    sm: int,
    mib: int,
    rates: Tops,
    memory: float,
    link: str = "4x16",
    usable: float | None = None,
) -> Card:
    left = mib / 1024 * (1 - _CONTEXT_SHARE) - _CONTEXT_GIB
    return _card(name, sm, mib, rates=rates, memory=memory, link=link, usable=usable or left)


def _turing(name: str, mib: int, fp32: float, memory: float) -> Card:
    """No bf16: it is computed in float32. int8 has tensor cores."""
    usable = _desktop(mib)
    return _card(name, 75, mib, rates=(16 * fp32, None, fp32, fp32), memory=memory, link="3x16", usable=usable)


def _older(name: str, sm: int, mib: int, fp32: float, memory: float) -> Card:
    """Everything is computed in float32."""
    usable = _desktop(mib)
    return _card(name, sm, mib, rates=(fp32, None, fp32, fp32), memory=memory, link="3x16", usable=usable)


_GEFORCE = (
    _geforce("rtx3050", 86, 8192, 9.1, 224, "4x8"),
    _geforce("rtx3050-6gb", 86, 6144, 6.8, 168, "4x8"),
    _geforce("rtx3060", 86, 12288, 12.74, 360, usable=11.0),
    _geforce("rtx3060-8gb", 86, 8192, 12.74, 240),
    _geforce("rtx3060ti", 86, 8192, 16.2, 448),
    _geforce("rtx3070", 86, 8192, 20.3, 448),
    _geforce("rtx3070ti", 86, 8192, 21.7, 608),
    _geforce("rtx3080-10gb", 86, 10240, 29.8, 760),
    _geforce("rtx3080-12gb", 86, 12288, 30.6, 912),
    _geforce("rtx3080ti", 86, 12288, 34.1, 912),
    _geforce("rtx3090", 86, 24576, 35.5, 936, usable=22.15),
    _geforce("rtx3090ti", 86, 24564, 40.0, 1008),
    _geforce("rtx4060", 89, 8188, 15.1, 272, "4x8"),
    _geforce("rtx4060ti-8gb", 89, 8188, 22.1, 288, "4x8"),
    _geforce("rtx4060ti-16gb", 89, 16380, 22.1, 288, "4x8"),
    _geforce("rtx4070", 89, 12282, 29.1, 504),
    _geforce("rtx4070super", 89, 12282, 35.5, 504),
    _geforce("rtx4070ti", 89, 12282, 40.1, 504),
    _geforce("rtx4070tisuper", 89, 16376, 44.1, 672),
    _geforce("rtx4080", 89, 16376, 48.75, 717, usable=14.5),
    _geforce("rtx4080super", 89, 16376, 52.2, 736),
    _geforce("rtx4090", 89, 24564, 82.5, 1008, usable=22.15),
    _geforce("rtx4090d", 89, 24564, 73.5, 1008),
    _geforce("rtx5050", 120, 8151, 13.2, 320, "5x8"),
    _geforce("rtx5060", 120, 8151, 19.2, 448, "5x8"),
    _geforce("rtx5060ti-8gb", 120, 8151, 23.7, 448, "5x8"),
    _geforce("rtx5060ti-16gb", 120, 16311, 23.7, 448, "5x8"),
    _geforce("rtx5070", 120, 12227, 30.9, 672, "5x16"),
    _geforce("rtx5070ti", 120, 16303, 43.9, 896, "5x16"),
    _geforce("rtx5080", 120, 16303, 56.3, 960, "5x16"),
    _geforce("rtx5090", 120, 32607, 104.75, 1792, "5x16", usable=30.0),
)
_LAPTOPS = (
    _geforce("rtx3050-laptop-4gb", 86, 4096, 7.1, 192, "4x8"),
    _geforce("rtx3050-laptop-6gb", 86, 6144, 7.6, 168, "4x8"),
    _geforce("rtx3050ti-laptop", 86, 4096, 8.7, 192, "4x8"),
    _geforce("rtx3060-laptop", 86, 6144, 13.1, 336),
    _geforce("rtx3070-laptop", 86, 8192, 16.6, 448),
    _geforce("rtx3070ti-laptop", 86, 8192, 17.5, 448),
    _geforce("rtx3080-laptop-8gb", 86, 8192, 21.0, 448),
    _geforce("rtx3080-laptop-16gb", 86, 16384, 21.0, 448),
    _geforce("rtx3080ti-laptop", 86, 16384, 23.6, 512),
    _geforce("rtx4050-laptop", 89, 6141, 12.1, 192, "4x8"),
    _geforce("rtx4060-laptop", 89, 8188, 14.6, 256, "4x8"),
    _geforce("rtx4070-laptop", 89, 8188, 20.0, 256, "4x8"),
    _geforce("rtx4080-laptop", 89, 12282, 33.9, 432),
    _geforce("rtx4090-laptop", 89, 16376, 39.7, 576),
    _geforce("rtx5050-laptop", 120, 8151, 13.75, 384, "5x8"),
    _geforce("rtx5060-laptop", 120, 8151, 17.9, 384, "5x8"),
    _geforce("rtx5070-laptop", 120, 8151, 24.9, 384, "5x8"),
    _geforce("rtx5070ti-laptop", 120, 12227, 31.0, 672, "5x16"),
    _geforce("rtx5080-laptop", 120, 16303, 41.7, 896, "5x16"),
    _geforce("rtx5090-laptop", 120, 24463, 57.0, 896, "5x16"),
)
_WORKSTATION = (
    _workstation("a2000-6gb", 86, 6138, 8.0, 288),
    _workstation("a2000-12gb", 86, 12282, 8.0, 288),
    _workstation("a4000", 86, 16376, 19.2, 448),
    _workstation("a4500", 86, 20470, 23.7, 640),
    _workstation("a5000", 86, 24564, 27.8, 768),
    _workstation("a5500", 86, 24564, 34.1, 768),
    _workstation("a6000", 86, 49140, 38.75, 768, usable=46.5),
    _workstation("rtx2000-ada", 89, 16380, 12.0, 224, "4x8"),
    _workstation("rtx4000-ada", 89, 20475, 26.7, 360),
    _workstation("rtx4000-sff-ada", 89, 20475, 19.2, 280),
    _workstation("rtx4500-ada", 89, 24570, 39.6, 432),
    _workstation("rtx5000-ada", 89, 32760, 65.3, 576),
    _workstation("rtx5880-ada", 89, 49140, 69.3, 960),
    _workstation("rtx6000-ada", 89, 49140, 91.1, 960),
    _workstation("rtxpro2000-blackwell", 120, 16311, 17.0, 288, "5x8"),
    _workstation("rtxpro4000-blackwell", 120, 24467, 46.9, 672, "5x16"),
    _workstation("rtxpro4500-blackwell", 120, 32623, 54.9, 896, "5x16"),
    _workstation("rtxpro5000-blackwell-48gb", 120, 48935, 64.5, 1344, "5x16"),
    _workstation("rtxpro5000-blackwell-72gb", 120, 73728, 64.5, 1344, "5x16"),
    _workstation("rtxpro6000-blackwell", 120, 97887, 125.0, 1792, "5x16"),
    _workstation("rtxpro6000-blackwell-maxq", 120, 97887, 110.0, 1792, "5x16"),
    _workstation("rtxpro6000-blackwell-server", 120, 97887, 120.0, 1597, "5x16"),
)
_DATA_CENTRE = (
    _data_centre("a2", 86, 15356, (36, None, 18, 4.5), 200, "4x8"),
    _data_centre("a10", 86, 23028, (250, None, 125, 31.2), 600),
    _data_centre("a10g", 86, 23028, (140, None, 70, 35), 600),
    _data_centre("a30", 80, 24576, (330, None, 165, 10.3), 933),
    _data_centre("a40", 86, 46068, (299.3, None, 149.7, 37.4), 696),
    _data_centre("a100-40gb", 80, 40960, (624, None, 312, 19.5), 1555, usable=38.5),
    _data_centre("a100-80gb", 80, 81920, (624, None, 312, 19.5), 1935, usable=78.0),
    _data_centre("l4", 89, 23034, (242, 242, 121, 30.3), 300),
    _data_centre("l20", 89, 46068, (239, 239, 119.5, 59.8), 864),
    _data_centre("l40", 89, 46068, (362, 362, 181, 90.5), 864),
    _data_centre("l40s", 89, 46068, (733, 733, 362, 91.6), 864, usable=43.5),
    _data_centre("h20", 90, 97871, (296, 296, 148, 44), 4000, "5x16"),
    _data_centre("h100", 90, 81559, (1979, 1979, 989, 66.9), 3350, "5x16", usable=78.0),
    _data_centre("h100-pcie", 90, 81559, (1513, 1513, 756, 51.2), 2000, "5x16"),
    _data_centre("h100-nvl", 90, 95830, (1671, 1671, 835, 60), 3938, "5x16"),
    _data_centre("h200", 90, 143771, (1979, 1979, 989, 66.9), 4800, "5x16", usable=138.0),
    _data_centre("h200-nvl", 90, 143771, (1671, 1671, 835, 60), 4800, "5x16"),
    _data_centre("b200", 100, 183359, (4500, 4500, 2250, 75), 7700, "5x16"),
)
_OLD = (
    _turing("rtx2060-6gb", 6144, 6.5, 336),
    _turing("rtx2060-12gb", 12288, 7.2, 336),
    _turing("rtx2060super", 8192, 7.2, 448),
    _turing("rtx2070", 8192, 7.5, 448),
    _turing("rtx2070super", 8192, 9.1, 448),
    _turing("rtx2080", 8192, 10.1, 448),
    _turing("rtx2080super", 8192, 11.2, 496),
    _turing("rtx2080ti", 11264, 13.4, 616),
    _turing("titan-rtx", 24576, 16.3, 672),
    _turing("quadro-rtx4000", 8192, 7.1, 416),
    _turing("quadro-rtx5000", 16384, 11.2, 448),
    _turing("quadro-rtx6000", 24576, 16.3, 672),
    _turing("quadro-rtx8000", 49152, 16.3, 672),
    _turing("t4", 15360, 8.1, 320),
    _older("v100-16gb", 70, 16384, 15.7, 900),
    _older("v100-32gb", 70, 32768, 15.7, 900),
    _older("p40", 61, 24576, 11.8, 346),
    _older("p100", 60, 16384, 9.3, 732),
)

CARDS = {card.name: card for card in (*_GEFORCE, *_LAPTOPS, *_WORKSTATION, *_DATA_CENTRE, *_OLD)}
