"""`mllmrec bench`: one file a benchmark, over what they share (work, measure, rows, flops, compare)."""
