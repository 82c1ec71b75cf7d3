"""Which cards take part in a clip that several were asked for, and what is said where one card alone is short."""

from tests.plan.machines import gpu, machine
from tests.plan.test_shared_clip import planned, told


def test_cards_that_take_no_part_get_no_part_of_the_hosts_memory():
    """12 heads divide by 4, not by 5: a fifth of 16 GB is less than the text encoder needs to pass through."""
    here = machine(*[gpu(12, index=index, name="NVIDIA GeForce RTX 4070") for index in range(5)], ram_gib=16)
    four, five = (planned(here, cards, "wan2.1-1.3b", resolution="480p") for cards in (4, 5))
    assert (five.levers, five.phases, five.seconds) == (four.levers, four.phases, four.seconds)
    assert told(five, "fewer_cards") == {"asked": 5, "cards": 4}


def test_where_one_card_must_decode_in_tiles_side_by_side_is_not_called_better():
    here = machine(*[gpu(6, index=index, name="NVIDIA GeForce RTX 4070") for index in range(2)])
    alone, plan = (planned(here, cards, "wan2.1-1.3b") for cards in (1, 2))
    assert alone.seconds > 2 * plan.seconds and alone.levers.vae == "tiled", "the case itself"
    assert told(plan, "shared_clip") and told(plan, "side_by_side") is None
