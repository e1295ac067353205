"""Which block of torch's allocator an address is in, and whether anybody holds it."""

from __future__ import annotations

from nsa_oracle.harness.graphs.allocator import Allocator, Reference
from tests.support.stand_in_driver import DROPPED, FOREIGN, FREE, HELD, OWN, SEGMENTS, segment


class TestAllocator:
    def test_block_of_an_address(self) -> None:
        allocator = Allocator(SEGMENTS, 0)
        held = allocator.block_at(HELD + 0xFFF)
        assert held is not None
        assert (held.address, held.held, held.free) == (HELD, True, False)
        for address, held_free in ((DROPPED, (False, False)), (FREE, (False, True))):
            block = allocator.block_at(address)
            assert block is not None
            assert (block.held, block.free) == held_free
        assert allocator.block_at(HELD - 1) is None
        assert allocator.block_at(FOREIGN) is None

    def test_other_devices_are_left_out(self) -> None:
        assert not Allocator([segment(HELD, "inactive", device=1)], 0).blocks

    def test_blocks_without_an_address_follow_one_another(self) -> None:
        blocks = [{"size": 0x100, "state": "inactive"}, {"size": 0x300, "state": "active_allocated"}]
        allocator = Allocator([{**segment(HELD, ""), "blocks": blocks}], 0)
        assert [(block.address, block.size) for block in allocator.blocks] == [(HELD, 0x100), (HELD + 0x100, 0x300)]

    def test_dangling(self) -> None:
        allocator = Allocator(SEGMENTS, 0)
        references = [Reference(name, address) for name, address in (("a", HELD), ("b", OWN), ("c", FOREIGN))]
        assert allocator.dangling(references) is None
        hit = allocator.dangling([*references, Reference("d", FREE + 8), Reference("e", DROPPED)])
        assert hit is not None
        assert hit[0].part == "d"

    def test_end_of_a_buffer_is_no_use_of_what_lies_behind_it(self) -> None:
        allocator = Allocator(SEGMENTS, 0)
        begin, end = Reference("begin", HELD + 8, node=3), Reference("end", DROPPED, node=3)
        assert allocator.dangling([begin, end]) is None
        for others in ([end], [Reference("begin", HELD, node=2), end], [begin, Reference("end", DROPPED + 8, node=3)]):
            assert allocator.dangling(others) is not None
        in_part = [{**segment(HELD, ""), "blocks": [{**SEGMENTS[0]["blocks"][0], "requested_size": 0xFFF}]}]
        assert Allocator([*in_part, *SEGMENTS[1:]], 0).dangling([begin, end]) is not None
        # What lies behind memory that nobody holds is no end of anything.
        assert allocator.dangling([Reference("begin", FREE - 8, node=3), Reference("end", FREE, node=3)]) is not None
