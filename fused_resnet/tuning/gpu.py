"""What rules of thumb know of a GPU, and the arithmetic that they share."""

#: Multiprocessors of an architecture's largest GPU: A100; H100 and H200. Later architectures count as the latest here.
MULTIPROCESSORS = {8: 108, 9: 132}


def architecture(capability: tuple[int, int]) -> int:
    """A key of `MULTIPROCESSORS` for a GPU of that compute capability, 8.0 or later."""
    return min(capability[0], max(MULTIPROCESSORS))


def power_of_two(value: int, most: int) -> int:
    """The smallest power of two that is at least `value`, kept between 16, the least extent of a tile, and `most`."""
    return min(max(1 << max(value - 1, 0).bit_length(), 16), most)
