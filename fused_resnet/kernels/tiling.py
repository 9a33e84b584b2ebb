"""The part of a [rows, channels] matrix that a program takes. Pure functions; they ask no device.

The figures in the code are first guesses from the arithmetic in each comment. Tuning by measurement: not done.
"""

from dataclasses import dataclass

from ..problem import ceil_div


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


@dataclass(frozen=True)
class Tiling:
    """Program (i, j) takes rows [i·rows_per_program, …) in steps of `block_rows`, and `block_channels` channels from j·block_channels.

    The programs of one range of rows follow each other in launch order, so that neighbours read neighbouring memory.
    """

    rows: int
    channels: int
    block_rows: int
    block_channels: int
    steps: int  #: of a program along its rows
    warps: int

    @property
    def rows_per_program(self) -> int:
        """Rows of a program; the last one may have fewer."""
        return self.block_rows * self.steps

    @property
    def row_programs(self) -> int:
        """Programs along the rows, and so the partial results of a reduction. Each has at least one row."""
        return ceil_div(self.rows, self.rows_per_program)

    @property
    def channel_programs(self) -> int:
        """Programs along the channels."""
        return ceil_div(self.channels, self.block_channels)

    @property
    def programs(self) -> int:
        """All programs."""
        return self.row_programs * self.channel_programs


def _block(rows: int, channels: int, warps: int, loads: int, itemsize: int, most_channels: int) -> tuple[int, int]:
    """(rows, channels) of a tile that is `loads` 16-byte loads of an operand a thread.

    Not fewer than 8 channels, since a packed mask has whole bytes.
    """
    elements = 32 * warps * loads * 16 // itemsize
    block_channels = min(most_channels, max(8, power_of_two(channels)))
    return min(elements // block_channels, power_of_two(rows)), block_channels


def elementwise(rows: int, channels: int, itemsize: int, loads: int = 2) -> Tiling:
    """One tile a program of 128 threads.

    With two loads, eight programs on a multiprocessor, which the registers allow, have 32 KiB of each operand in flight.
    """
    block_rows, block_channels = _block(rows, channels, 4, loads, itemsize, 256)
    return Tiling(rows, channels, block_rows, block_channels, steps=1, warps=4)


def reduction(rows: int, channels: int, itemsize: int, multiprocessors: int, loads: int) -> Tiling:
    """Four programs of 256 threads a multiprocessor, which go along the rows: all run at once, and partial results are few.

    Two loads are 32 KiB in flight on a multiprocessor: right for one operand. With two or more operands one load of each does as
    much, and they need the registers.
    64 channels a program are at least 128 bytes a row: whole cache lines, and as many rows as can be in a tile, since rows are what
    the threads sum without talking to each other.
    """
    block_rows, block_channels = _block(rows, channels, 8, loads, itemsize, 64)
    row_programs = max(1, 4 * multiprocessors // ceil_div(channels, block_channels))
    steps = ceil_div(ceil_div(rows, row_programs), block_rows)
    return Tiling(rows, channels, block_rows, block_channels, steps, warps=8)


def per_image(pixels: int, channels: int, itemsize: int) -> Tiling:
    """One image and 64 channels a program, all pixels of it: 8,192 programs for the 2,048 channels of 256 images."""
    block_rows, block_channels = _block(pixels, channels, 4, 2, itemsize, 64)
    return Tiling(pixels, channels, block_rows, block_channels, steps=ceil_div(pixels, block_rows), warps=4)


#: Steps of a program that merges partial results: each waits for memory, and there is little else to do meanwhile.
MOST_STEPS = 8


def finalisation(partials: int, channels: int) -> Tiling:
    """Tiles for merging `partials` rows of partial results: 8 channels a program, 32 bytes a row, as many programs as possible.

    Where it has more than one row of programs, their results are to be merged in turn.
    """
    block_rows = min(256, power_of_two(partials))
    steps = min(ceil_div(partials, block_rows), MOST_STEPS)
    return Tiling(partials, channels, block_rows, block_channels=8, steps=steps, warps=4)


def finalisation_of_splits(splits: int, elements: int) -> Tiling:
    """Tiles for summing `splits` rows of partial results in one kernel. Rows lie side by side, so few loads wait for each other."""
    block_rows = min(max(power_of_two(ceil_div(splits, MOST_STEPS)), min(64, power_of_two(splits))), 1024)
    return Tiling(splits, elements, block_rows, max(8, min(1024, 4096 // block_rows)), ceil_div(splits, block_rows), warps=4)
