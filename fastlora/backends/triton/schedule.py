"""The one-launch schedule: a queue of tiles, flags between them, and a workspace that each launch leaves zeroed.

Each program works on one tile, whose number (its "ticket") it claims from a counter when it starts. A tile waits only
for tiles with a lower ticket, whose owners are already running: no residency, stream mix or order in which the
hardware starts programs can deadlock, and no cooperative launch is needed.

Programs do not loop over tiles: Triton overlaps nothing across such a loop, while LLVM moves the address arithmetic of
all kinds of tiles in front of it, where it takes the registers of every one of them (over 255 with dropout). README.md
has a figure."""

import triton
import triton.language as tl

# The workspace is an int32 buffer: [next ticket, finished programs, flags...].
N_COUNTERS = tl.constexpr(2)


@triton.jit
def claim(workspace_ptr):
    """The next ticket."""
    return tl.atomic_add(workspace_ptr, 1, sem="relaxed")


@triton.jit
def publish(flag_ptr):
    """Adds one to a flag once all stores of this program are visible to every program that acquires the flag."""
    # One thread executes the atomic; the barrier puts every other thread's stores before it.
    tl.debug_barrier()
    tl.atomic_add(flag_ptr, 1, sem="release")


@triton.jit
def wait_for(flag_ptr, count):
    """Until a flag is at least ``count``; then the stores before its release are visible."""
    while tl.atomic_add(flag_ptr, 0, sem="acquire") < count:
        pass


@triton.jit
def reset_if_last(workspace_ptr, n_words, BLOCK: tl.constexpr):
    """The last program to finish zeroes the workspace: the next launch starts as this one did, without a memset."""
    # No barrier: one thread executes all atomics, and no other has touched the workspace.
    if tl.atomic_add(workspace_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for start in range(0, n_words, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            tl.store(workspace_ptr + offs, tl.zeros((BLOCK,), tl.int32), mask=offs < n_words)


@triton.jit
def locate(
    ticket, n_rows, n_columns, n_gradients, gradients_last, wave, GROUP_M: tl.constexpr, N_AHEAD: tl.constexpr = 1
):
    """The tile of a ticket.

    The output's n_rows x n_columns tiles are walked in groups of GROUP_M row blocks, all columns of a group before the
    next group, so that a group's rows of act stay in L2. Column 0 makes S for its row block, which the others wait
    for; so a group's column 0 is queued one wave (as many tiles as run at once) before the end of the group in front
    of it. Where several projections have an S each, so are the first N_AHEAD columns, one after the other. Each group
    is followed by n_gradients gradient tiles that read the rows it has just used.

        column 0 of group 0 | group 0 …, column 0 of group 1, … one wave | gradients of group 0 | group 1 … and so on

    Where a tile of the output takes long, short gradient tiles between these make the last wave ragged; then all of
    them come last, group by group (gradients_last, 0 or 1; it takes columns).

    Returns:
        (row block, column, group, gradient tile or -1)
    """
    n_groups = tl.cdiv(n_rows, GROUP_M)
    last = n_groups - 1
    rows_in_last = n_rows - last * GROUP_M
    first_rows = tl.minimum(n_rows, GROUP_M)
    first = first_rows * N_AHEAD
    if n_columns == 0:
        first = 0
    # A group's section of the queue holds its columns 1…, column 0 of the next group, and its gradient tiles.
    section = GROUP_M * n_columns + n_gradients * (1 - gradients_last)
    last_start = tl.maximum(last * section - tl.where(n_columns > 0, (GROUP_M - rows_in_last) * N_AHEAD, 0), 0)
    t = ticket - first
    group = tl.where(t >= last_start, last, t // section)
    t -= tl.where(group == last, last_start, group * section)
    rows = tl.where(group == last, rows_in_last, GROUP_M)
    rows_ahead = tl.where(group + 1 < last, GROUP_M, tl.where(group + 1 == last, rows_in_last, 0))
    if n_columns == 0:
        rows_ahead = 0
    tiles_ahead = rows_ahead * N_AHEAD
    others = rows * tl.maximum(n_columns - N_AHEAD, 0)
    ahead_start = tl.maximum(others - wave, 0)
    gradient = t - others - tiles_ahead
    is_ahead = (t >= ahead_start) & (t < ahead_start + tiles_ahead)
    t -= tl.where(t >= ahead_start + tiles_ahead, tiles_ahead, 0)
    of_ahead, row_ahead = 0, t - ahead_start
    if N_AHEAD > 1:
        rows_ahead = tl.maximum(rows_ahead, 1)
        of_ahead, row_ahead = row_ahead // rows_ahead, row_ahead % rows_ahead
    row = tl.where(is_ahead, (group + 1) * GROUP_M + row_ahead, group * GROUP_M + t % rows)
    column = tl.where(is_ahead, of_ahead, N_AHEAD + t // rows)
    if ticket < first:
        row, column, gradient = ticket, 0, -1
        if N_AHEAD > 1:
            row, column = ticket % first_rows, ticket // first_rows
    behind = ticket - n_rows * n_columns
    if gradients_last * (behind + 1) > 0:
        group, gradient = behind // n_gradients, behind % n_gradients
    return row, column, group, tl.maximum(gradient, -1)
