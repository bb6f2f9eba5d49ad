"""Cards by whatever people call them, and by what is known of them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from lowvram.cli import main
from lowvram.doctor.wants import _card_like
from lowvram.offload.placement import Placement
from lowvram.planning import CARDS, Workload
from lowvram.planning.activation_passes import pass_bytes
from lowvram.planning.card_names import card_named, cards_called
from lowvram.planning.operation_rates import OPERATION_RATES
from lowvram.planning.rank_layout import whole
from lowvram.planning.timing import seconds_of
from lowvram_kernels.errors import ConfigError

GIB, TERA, GIGA = 2**30, 1e12, 1e9


@pytest.mark.parametrize("name", CARDS)
def test_every_card_has_its_own_name(name):
    assert card_named(name) is CARDS[name]
    assert card_named(name.upper()) is CARDS[name]
    assert card_named(f"NVIDIA {name.replace('-', ' ')}") is CARDS[name]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        # GeForce, in all spellings.
        ("3090", "rtx3090"),
        ("RTX 3090", "rtx3090"),
        ("rtx-3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("3090ti", "rtx3090ti"),
        ("RTX 4060 Ti 16GB", "rtx4060ti-16gb"),
        ("4060ti16g", "rtx4060ti-16gb"),
        ("rtx 4060 ti 8 GB", "rtx4060ti-8gb"),
        ("4070s", "rtx4070super"),
        ("RTX 4070 Ti SUPER", "rtx4070tisuper"),
        ("4070 Ti S", "rtx4070tisuper"),
        ("4090 D", "rtx4090d"),
        ("RTX 5090", "rtx5090"),
        ("5080", "rtx5080"),
        ("geforce rtx 5070 ti", "rtx5070ti"),
        ("5060 Ti 16g", "rtx5060ti-16gb"),
        ("rtx 3060", "rtx3060"),
        ("rtx 3060 8gb", "rtx3060-8gb"),
        ("3080 12GB", "rtx3080-12gb"),
        ("ASUS TUF RTX 4080 Super OC", "rtx4080super"),
        # Laptops.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090-laptop"),
        ("rtx4070 laptop", "rtx4070-laptop"),
        ("4060m", "rtx4060-laptop"),
        ("RTX 3080 Ti mobile", "rtx3080ti-laptop"),
        ("RTX 5090 Notebook", "rtx5090-laptop"),
        ("RTX 3080 Max-Q 16GB", "rtx3080-laptop-16gb"),
        # Workstations.
        ("RTX A6000", "a6000"),
        ("a4000", "a4000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("6000 ada", "rtx6000-ada"),
        ("NVIDIA RTX 4000 SFF Ada Generation", "rtx4000-sff-ada"),
        ("RTX PRO 6000", "rtxpro6000-blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtxpro6000-blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtxpro6000-blackwell-maxq"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000-blackwell-server"),
        ("rtx pro 5000 72GB", "rtxpro5000-blackwell-72gb"),
        # Data centres, also as CUDA calls them.
        ("l4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("l40 s", "l40s"),
        ("A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("a100 40", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("h100 sxm5", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("H100 NVL", "h100-nvl"),
        ("h200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("B200", "b200"),
        # Older ones.
        ("t4", "t4"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("2080 Ti", "rtx2080ti"),
        ("TITAN RTX", "titan-rtx"),
        ("Quadro RTX 6000", "quadro-rtx6000"),
    ],
)
def test_names_as_people_write_them(text, name):
    assert card_named(text).name == name


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rtx 4060 ti", ["rtx4060ti-8gb", "rtx4060ti-16gb"]),
        ("5060ti", ["rtx5060ti-8gb", "rtx5060ti-16gb"]),
        ("3080", ["rtx3080-10gb", "rtx3080-12gb"]),
        ("a100", ["a100-40gb", "a100-80gb"]),
        ("V100", ["v100-16gb", "v100-32gb"]),
        ("rtx 3080 laptop", ["rtx3080-laptop-8gb", "rtx3080-laptop-16gb"]),
        ("rtx a2000", ["a2000-6gb", "a2000-12gb"]),
        ("rtx 6000", ["rtx6000-ada", "rtxpro6000-blackwell", "quadro-rtx6000"]),
        ("rtx 4000", ["rtx4000-ada", "rtx4000-sff-ada", "rtxpro4000-blackwell", "quadro-rtx4000"]),
    ],
)
def test_names_of_several_cards_list_them(text, names):
    with pytest.raises(ConfigError, match=r"names several cards; expected one of them: ") as error:
        card_named(text)
    listed = str(error.value).rpartition(": ")[2].split(", ")
    assert set(names) <= set(listed)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("voodoo2", "'voodoo2', which is no card that is known; expected auto"),
        ("", "no card that is known"),
        ("16", "no card that is known"),
        ("rtx 4090 48GB", "near it are rtx4090, rtx4090d, rtx4090-laptop"),
        ("rtx 4090 ti", "near it are rtx4090"),
        ("rtx 4080 12GB", "near it are rtx4080"),
        ("5090 D", "near it are rtx5090"),
        ("titan v", "no card that is known"),
        ("gtx 1080 ti", "no card that is known"),
        ("RX 7900 XTX", "cards of NVIDIA are all"),
        ("Arc A770", "cards of NVIDIA are all"),
        ("AMD Instinct MI300X", "cards of NVIDIA are all"),
    ],
)
def test_what_is_no_card_is_refused_with_what_was_expected(text, part):
    with pytest.raises(ConfigError) as error:
        card_named(text)
    assert part in str(error.value)
    assert "--gpu list" in str(error.value)
    assert "custom:vram=24GiB" in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090ti"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090-laptop"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx4060ti-8gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA RTX 5000 Ada Generation Laptop GPU", "rtx4090"),
        ("NVIDIA GB10", "rtx4090"),
    ],
)
def test_doctor_judges_by_the_card_that_is_here(name, expected):
    assert _card_like(name).name == expected


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("custom:vram=24GiB", {"vram": 24 * GIB, "int8": 660 * TERA, "sm": 89}),
        ("custom:vram=24", {"vram": 24 * GIB}),
        ("CUSTOM: VRAM = 16g , Like = RTX 3090", {"vram": 16 * GIB, "int8": 284 * TERA, "fp8": None, "sm": 86}),
        ("custom:vram=48GiB,like=4090,bandwidth=1008GB/s", {"vram": 48 * GIB, "memory": 1008 * GIGA}),
        (
            "custom:vram=8GiB,bandwidth=1.5TB/s,pcie=4x8",
            {"memory": 1500 * GIGA, "h2d": 12.5 * GIGA, "d2h": 12.5 * GIGA},
        ),
        ("custom:vram=8GiB,pcie=5.0 x16", {"h2d": 50 * GIGA}),
        ("custom:vram=8GiB,pcie=12GB/s", {"h2d": 12 * GIGA}),
        ("custom:vram=8GiB,int8=100,bf16=25TFLOPS,fp8=50T", {"int8": 100e12, "bf16": 25e12, "fp8": 50e12}),
        ("custom:vram=8GiB,int8=1.5POPS,fp8=none", {"int8": 1.5e15, "fp8": None}),
        ("custom:vram=8GiB,sm=8.6", {"sm": 86, "fp8": None}),
        ("custom:vram=8GiB,sm=sm_120,usable=7GiB", {"sm": 120, "usable": 7 * GIB}),
    ],
)
def test_cards_that_are_described(text, wanted):
    card = card_named(text)
    found = {"vram": card.vram_bytes, "usable": card.usable_bytes, "sm": card.generation}
    found |= {name: getattr(card.rates, name) for name in ("int8", "fp8", "bf16", "h2d", "d2h", "memory")}
    assert {name: found[name] for name in wanted} == wanted
    assert 0 < card.usable_bytes < card.vram_bytes


def test_what_a_description_leaves_out_is_said():
    assert card_named("custom:vram=24GiB,like=3090,pcie=4x8").notes == (
        "bandwidth, int8, bf16, fp32 of the custom card are those of rtx3090",
    )
    every = "custom:vram=24GiB,bandwidth=936,pcie=25,int8=284,bf16=71,fp32=35,fp8=none,sm=86"
    assert card_named(every).notes == ()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("custom", "expected custom:vram=24GiB"),
        ("custom:", "expected custom:vram=24GiB"),
        ("custom:bandwidth=900", "without vram"),
        ("custom:vram=cats", "vram is 'cats', which is no amount of memory"),
        ("custom:vram=0", "no memory"),
        ("custom:vram=24GiB,speed=9", "'speed=9' in it cannot be"),
        ("custom:vram=24GiB,vram=8GiB", "'vram=8GiB' in it cannot be"),
        ("custom:vram=24GiB,int8", "'int8' in it cannot be"),
        ("custom:vram=24GiB,int8=-3", "int8 is '-3'; expected a number above 0"),
        ("custom:vram=24GiB,bf16=nan", "bf16 is 'nan'"),
        ("custom:vram=24GiB,bandwidth=0", "bandwidth is '0'; expected a number above 0, as 936GB/s"),
        ("custom:vram=24GiB,pcie=9x16", "pcie is '9x16'; expected generation and lanes"),
        ("custom:vram=24GiB,sm=new", "sm is 'new'"),
        ("custom:vram=24GiB,like=voodoo2", "'voodoo2', which is no card"),
        ("custom:vram=24GiB,usable=25GiB", "expected usable to be vram at the most"),
    ],
)
def test_descriptions_that_cannot_be(text, part):
    with pytest.raises(ConfigError) as error:
        card_named(text)
    assert part in str(error.value)


PLAN = ["plan", "--preset", "tiny", "--ram", "64", "--size", "128*128", "--infer_frames", "12", "--sample_steps", "1"]


def planned(*more: str) -> dict:
    result = CliRunner().invoke(main, [*PLAN, *more, "--json"])
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def test_a_card_s_own_memory_may_be_what_limits_it(sizes):
    model, work = sizes("int8"), Workload.of_size("384*256")
    share = whole(model.config, work)

    def arithmetic(gpu: str) -> float:
        return seconds_of(model, work, Placement(kv="int8"), card_named(gpu).rates, share).arithmetic

    slow = arithmetic("custom:vram=24GiB,bandwidth=10")
    # Layers of 16 GB, and the rings of a step (19.3 GiB of four at 704*384, which has 44 * 24 tokens to 24 * 16 here);
    # and what passes between products move.
    rings = 19.3 * GIB / 4 * (24 * 16) / (44 * 24)
    passes = pass_bytes(model.config, work, share, "int8", eight_bit=True)
    reached = OPERATION_RATES["own memory"].share.expected
    assert slow == pytest.approx(4 * (16e9 + rings + passes.between + passes.rings) / (10e9 * reached), rel=0.02)
    assert arithmetic("custom:vram=24GiB,bandwidth=1008") == arithmetic("rtx4090") < slow / 4


@pytest.mark.parametrize(
    ("gpu", "part"),
    [
        ("t4", "t4 has sm_75, and sm_80 is the oldest that is supported"),
        ("V100 32GB", "v100-32gb has sm_70"),
        ("p40", "p40 has sm_61"),
        ("2080 Ti", "rtx2080ti has sm_75"),
        ("quadro rtx 8000", "quadro-rtx8000 has sm_75"),
        ("b200", "b200 has sm_100: kernels have no settings of their own"),
        ("rtx 4090 laptop", "a laptop reaches less, by its power limit"),
        ("custom:vram=24GiB,sm=7.5", "custom has sm_75"),
    ],
)
def test_plans_say_what_makes_them_unsure(gpu, part):
    assert any(part in note for note in planned("--gpu", gpu)["notes"])


def test_plans_for_usual_cards_say_nothing_more():
    seconds, vae = planned("--gpu", "RTX 4060 Ti 16GB", "--audio-duration", "10")["notes"]
    assert seconds.startswith("seconds are predicted from data-sheet rates")
    assert "decoder is widened once" in vae


def test_a_budget_beyond_the_card_is_said():
    assert (
        "--vram-budget is 48.00 GiB, more than the 23.99 GiB that rtx4090 has"
        in planned("--gpu", "4090", "--vram", "48")["notes"]
    )


def test_all_cards_are_listed():
    result = CliRunner().invoke(main, ["plan", "--gpu", "list"])
    assert result.exit_code == 0
    assert all(f"\n{name} " in result.stdout for name in CARDS)
    assert set(json.loads(CliRunner().invoke(main, ["plan", "--gpu", "list", "--json"]).stdout)) == set(CARDS)


def test_nothing_is_called_by_memory_or_a_maker_alone():
    assert not any(cards_called(text) for text in ("24GB", "NVIDIA", "GeForce RTX", "laptop", "ti"))
