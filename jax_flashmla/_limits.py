"""Constants of the C++ side; tests hold both equal."""

SPLIT_TILE = 64  # tokens; kSplitTile in csrc/schedule/plan.h
SEQUENCE_OVERHEAD = 2  # tiles; kSequenceOverhead in csrc/schedule/plan.h
CUT_COST = 8  # tiles; kCutCost in csrc/schedule/plan.h
MERGE_COST = 4  # kMergeCost in csrc/schedule/plan.h
MAX_BATCH = 16384  # sequences that one schedule can hold; kMaxBatch in csrc/schedule/plan.h
MAX_PARTS = 256  # of one schedule; kMaxParts in csrc/schedule/plan.h
INT32_MAX = 2**31 - 1
