"""Constants of the C++ side; tests hold both equal."""

SPLIT_TILE = 64  # tokens; kSplitTile in csrc/schedule/plan.h
SEQUENCE_OVERHEAD = 2  # tiles; kSequenceOverhead in csrc/schedule/plan.h
CUT_COST = 8  # tiles; kCutCost in csrc/schedule/plan.h
MAX_BATCH = 16384  # sequences that one schedule can hold; kMaxBatch in csrc/schedule/plan.h
MAX_PARTS = 256  # of one schedule; kMaxParts in csrc/schedule/plan.h
INT32_MAX = 2**31 - 1
TILE_ROWS = 64  # query rows of a tile that a schedule is made for by default
SMALL_TILE_ROWS = 16  # in a small problem; kLeastRows in csrc/sm90/dense_decode/config.h
FP8_TILE_ROWS = 32  # over fp8 rows, in a larger one; kFewRows in csrc/sm90/dense_decode/config.h
MAX_INDEX_HEADS = 64  # kMaxIndexHeads in csrc/params/index_scores.h
MAX_WEIGHTS = 3  # of one product; kMaxWeights in csrc/params/project.h
MAX_PROJECT_ROWS = 128  # kMaxRows in csrc/sm90/project/config.h
EXACT_ROWS = 32  # of project's float32 weight; kRows in csrc/sm90/project/exact/kernel.cuh
MAX_PROJECT_GROUPS = 65535  # a grid's second or third extent
ROPE_LAYOUTS = {"interleaved": 0, "deinterleaved": 1, "half": 2, "none": 3}  # csrc/params/rope.h
DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}  # DType in csrc/params/dtype.h
MAX_TOPK = 4096  # of index_topk; kMaxTopk in csrc/params/index_topk.h
MAX_PEERS = 8  # devices of a group; kMaxPeers in csrc/params/peers.h
MAX_SUM_BYTES = 2 * 1024 * 1024  # kMaxMessageBytes in csrc/sm90/all_reduce_sum/config.h
MAX_EXCHANGED = 2  # arrays of one exchange; kMaxExchanged in csrc/params/exchange.h
MAX_EXCHANGE_BYTES = 4 * 1024 * 1024  # kMaxExchangeBytes in csrc/sm90/exchange/config.h
FORMATS = {  # Format in csrc/formats.h
    "dense": 0,
    "v32": 1,
    "v32_nope": 2,
    "v4": 3,
    "v41": 4,
    "v41_fp4": 5,
    "fp8_row": 6,
    "fp8_index": 7,
}
