"""No number of the contract is ever assigned twice; needs neither buf nor git."""

from __future__ import annotations

from tests.proto.ledger import given_away, in_use, reserved


def test_numbers_keep_their_name_and_type() -> None:
    used = in_use()
    changed = {n: (what, used[n]) for n, what in given_away().items() if n in used and used[n] != what}
    assert changed == {}, "a number was used again: take a new one and reserve the old"


def test_what_is_gone_is_reserved() -> None:
    used, held = in_use(), reserved()
    for number, what in given_away().items():
        if number not in used:
            scope, name = number.rpartition(".")[0], what.partition(" ")[0]
            assert number in held, f"reserve number {number} ({what})"
            assert f"{scope} {name}" in held, f'reserve the name "{name}" in {scope}'


def test_every_number_is_in_the_ledger() -> None:
    assert in_use().keys() - given_away().keys() == set(), "run `python -m tests.proto.ledger`"
