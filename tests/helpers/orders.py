"""The order of samples, one position at a time."""

from mmtensorar.data.sample_order import Location, Order


def location(order: Order, position: int) -> Location:
    """The sample at a position."""
    block, index = order.block(position)
    return order.locations(block)[order.output_order(block)[index]]
