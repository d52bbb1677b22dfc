"""What a fit needs of memory."""

READ_COPIES = 3  # of a run while it is read: as it comes, a step of the user's graph, and the blocks
READ_AHEAD = 2  # runs that are being read while the kernels work on others
SAMPLE_POINTS = 2**19  # held of them, or one in
