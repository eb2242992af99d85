"""The known names that an unknown one may have meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.catalogue import UnknownNameError, find_gpu
from hetis.formats.errors import all_nearest, did_you_mean

GPUS = ("H100-SXM-80GB", "H100-PCIe-80GB", "A100-SXM-80GB", "L4", "T4")
WORKLOADS = ("azure_conv_2023", "azure_code_2023", "sharegpt")


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("H10O", GPUS, "H100-SXM-80GB"),
        ("h100-sxm-80", GPUS, "H100-SXM-80GB"),
        ("L4O", ("RTX-3090", "T4", "L40S"), "L40S"),
        ("azure", WORKLOADS, "azure_conv_2023"),
        ("azure_conv_2032", WORKLOADS, "azure_conv_2023"),
        ("shargpt", WORKLOADS, "sharegpt"),
        ("x", WORKLOADS, None),
        ("mistral", GPUS, None),
    ],
)
def test_a_name_that_is_alike_or_begins_alike(name: str, known: tuple[str, ...], found: str | None) -> None:

    assert next(iter(all_nearest(name, known)), None) == found


def test_the_words_of_a_vendor_do_not_hide_the_nearest_gpu() -> None:
    with pytest.raises(UnknownNameError, match=r"^unknown GPU 'Tesla L4OS', did you mean L40S\?$"):
        find_gpu("Tesla L4OS")


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA GeForce RTX 3050", "Tesla P44", "GB11", "Tesla K80", "NVIDIA RTX A6500", "NVIDIA H20 NVLink"),
        *("NVIDIA A800-SXM4-40GB", "NVIDIA H100L-94C", "NVIDIA A100-SXM4-80GB-MIG-1g.10gb"),
        *("NVIDIA RTX Pro 6000 Blackwell DC-96Q", "Quadro RTX 5000 with Max-Q Design", "H150", "V150"),
    ],
)
def test_another_card_is_no_slip_of_one_with_a_like_number(name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        find_gpu(name)
    assert str(caught.value) == f"unknown GPU {name!r}"


@pytest.mark.parametrize(("name", "nearest"), [("L40X", "L40"), ("A100-SXM-80GX", "A100-SXM-80GB")])
def test_a_wrong_letter_beside_a_cards_number_is_a_slip(name: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        find_gpu(name)
    assert str(caught.value) == f"unknown GPU {name!r}, did you mean {nearest}?"


def test_names_that_are_equally_near_are_all_named_up_to_three() -> None:
    assert did_you_mean("H10O", GPUS) == ", did you mean H100-SXM-80GB or H100-PCIe-80GB?"
    several = [f"azure_conversations_{year}" for year in range(2021, 2025)]
    assert did_you_mean("azur", several) == f", did you mean {several[0]}, {several[1]} or {several[2]}?"
    assert did_you_mean("h100-sxm-80", GPUS) == ", did you mean H100-SXM-80GB?"
    assert did_you_mean("mistral", GPUS) == ""


@given(st.sampled_from(GPUS + WORKLOADS), st.integers(min_value=3, max_value=20))
def test_the_beginning_of_a_name_finds_one_that_begins_so(name: str, letters: int) -> None:
    assert all_nearest(name[:letters], GPUS + WORKLOADS)[0].startswith(name[:letters])


def test_a_name_that_is_cut_within_a_vendors_word_may_be_any_of_its_boards() -> None:
    """As `nvidia-smi` prints it in its table."""
    with pytest.raises(UnknownNameError) as caught:
        find_gpu("NVIDIA RTX PRO 6000 Blac...")
    assert set(caught.value.candidates) == {f"RTX-PRO-6000-{of}-96GB" for of in ("Server", "Workstation", "MaxQ")}
