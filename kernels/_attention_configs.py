"""Configurations of attention's kernels: tiles that leave no architecture short of registers or shared memory."""

from .configs import TABLES, Config, everywhere

# What a configuration is chosen by: the padded width of rows, the bits of what is multiplied (TF32 has 19), and what
# scores are laden with, which takes registers.
PROBLEM = ("width", "bits", "laden")
# Nothing that follows; a mask of padding, or a window; both, any other mask, ALiBi, or dropout. Not lengths of keys or
# packed sequences: a row's result must not depend on what else is in the batch.
PLAIN, PADDED, LADEN = range(3)
# Up to which width float32 is multiplied in three products of TF32. Their operands take twice the registers: of wider
# rows they would spill, and the vector units multiply.
WIDEST_IN_THREE = {
    "attention_fwd": 64,
    "attention_split": 64,
    "attention_bwd_dq": 64,
    "attention_bwd_dkdv": 32,
    "attention_bias_bwd": 64,
}
# Up to which width float32 is multiplied as TF32, where PyTorch's setting allows it: of wider rows the gradients
# spilled registers with every tile that was tried (five on sm_80, one on sm_90), and the forward has to be as exact
# as they are.
WIDEST_IN_TF32 = 128


def _tile(rows: int, keys: int, warps: int, stages: int, *, width: int, bits: int = 16, laden: int = LADEN) -> Config:
    """A tile for what is no wider, has no more bits, and is laden with no more."""
    up_to = {"width": width, "bits": bits, "laden": laden}
    return Config({"BLOCK_M": rows, "BLOCK_N": keys}, warps, stages, up_to)


_FORWARD_EXACT = (
    _tile(32, 32, 8, 1, width=64, bits=32, laden=PADDED),
    _tile(64, 16, 8, 1, width=64, bits=32),
    _tile(32, 16, 8, 1, width=128, bits=19),
    _tile(16, 16, 4, 1, width=256, bits=32),
)
_FORWARD_WIDE = (
    _tile(64, 32, 8, 2, width=256, laden=PADDED),
    _tile(32, 32, 8, 2, width=256),
    *_FORWARD_EXACT,
)
_FORWARD_LARGE = (
    _tile(128, 64, 8, 3, width=64),
    _tile(128, 64, 8, 2, width=128, laden=PADDED),
    _tile(128, 32, 8, 3, width=128),
    *_FORWARD_WIDE,
)
_FORWARD_SMALL = (
    _tile(128, 64, 8, 2, width=64, laden=PADDED),
    _tile(64, 32, 8, 2, width=64),
    _tile(128, 32, 8, 2, width=128, laden=PADDED),
    _tile(64, 32, 8, 2, width=128),
    *_FORWARD_WIDE,
)
# Where the assembler spills a few bytes of the laden ones, to hold them to 128 registers, and of packed sequences.
_FORWARD_86 = (
    *_FORWARD_SMALL[:2],
    _tile(64, 64, 8, 2, width=128),
    _tile(64, 32, 8, 2, width=256, laden=PADDED),
    _tile(32, 32, 4, 1, width=256),
    *_FORWARD_EXACT[:2],
    _tile(32, 16, 4, 1, width=128, bits=19),
    _FORWARD_EXACT[3],
)
TABLES["attention_fwd"] = everywhere(
    _tile(128, 64, 8, 3, width=64, laden=PLAIN),
    _tile(128, 64, 8, 2, width=64),
    _tile(128, 32, 8, 3, width=128, laden=PADDED),
    _tile(64, 32, 8, 2, width=128),
    *_FORWARD_WIDE,
    sm_90=_FORWARD_LARGE,
    sm_100=_FORWARD_LARGE,
    sm_86=_FORWARD_86,
    sm_89=_FORWARD_86,
    sm_120=(
        *_FORWARD_SMALL[:2],
        _tile(64, 64, 8, 2, width=128, laden=PADDED),
        *_FORWARD_SMALL[3:5],
        _tile(32, 32, 8, 1, width=256),  # a second stage spills 8 bytes
        *_FORWARD_EXACT,
    ),
    gfx942=_FORWARD_SMALL,
)
_SPLIT = (
    _tile(16, 64, 4, 3, width=128),
    _tile(16, 32, 8, 2, width=256),
    _tile(16, 32, 4, 1, width=64, bits=32),
    _tile(16, 32, 4, 1, width=128, bits=19),
)
_SPLIT_EXACT = (_tile(16, 16, 4, 1, width=128, bits=32), _tile(16, 16, 8, 1, width=256, bits=32))
TABLES["attention_split"] = everywhere(
    *_SPLIT,
    *_SPLIT_EXACT[1:],
    sm_90=(*_SPLIT, *_SPLIT_EXACT),
    gfx942=(_tile(16, 64, 4, 2, width=128), *_SPLIT[1:], *_SPLIT_EXACT[1:]),  # 3 stages of a mask do not fit
    # Where the assembler holds 32 keys of 16 to 128 registers, and spills 8 bytes.
    sm_100=(*_SPLIT[:2], _tile(16, 16, 4, 1, width=16, bits=32), *_SPLIT[2:], *_SPLIT_EXACT),
)
TABLES["attention_lists"] = everywhere(Config(num_warps=16))
TABLES["attention_join"] = everywhere(Config(num_warps=4))
_ROWS_EXACT = (
    _tile(32, 16, 8, 1, width=64, bits=32),
    _tile(32, 16, 8, 1, width=128, bits=19),
    _tile(16, 16, 8, 1, width=256, bits=32),
)
_ROWS_WIDE = (
    _tile(64, 64, 8, 2, width=128, laden=PADDED),
    _tile(64, 32, 8, 2, width=128),
    _tile(32, 32, 8, 1, width=256),
    _tile(32, 32, 8, 1, width=32, bits=19),  # 16 keys are held to 128 registers, and spill 16 bytes
    *_ROWS_EXACT,
)
_ROWS = (_tile(64, 64, 8, 2, width=64, laden=PADDED), _tile(64, 32, 4, 2, width=64), *_ROWS_WIDE)
_ROWS_86 = (*_ROWS[:-2], _tile(16, 32, 8, 1, width=128, bits=19), _ROWS[-1])  # twice the rows spill 8 bytes
_ROWS_LARGE = (*_ROWS[:5], _tile(32, 32, 8, 1, width=64, bits=19), *_ROWS_EXACT)
TABLES["attention_bwd_dq"] = everywhere(
    *_ROWS,
    sm_86=_ROWS_86,
    sm_89=_ROWS_86,
    sm_90=_ROWS_LARGE,
    sm_100=_ROWS_LARGE,
    sm_120=(
        _tile(64, 64, 8, 2, width=64, laden=PLAIN),
        _tile(64, 32, 8, 2, width=64),
        *_ROWS_WIDE[:3],
        _tile(16, 32, 8, 1, width=64, bits=32),  # twice the rows, or half the keys of 16, spill 8 bytes and more
        *_ROWS_EXACT[1:],
    ),
    gfx942=(
        _tile(64, 64, 8, 1, width=64, laden=PADDED),
        _tile(64, 32, 4, 2, width=64),
        _tile(64, 32, 8, 2, width=128, laden=PLAIN),  # padded, it spills 48 bytes
        _tile(64, 32, 8, 1, width=128),
        _tile(32, 16, 8, 1, width=256),
        *_ROWS_EXACT,
    ),
)
# Of a laden tile of 32 queries by 32 keys the assembler spills 16 bytes, to hold it to 128 registers; in rows of 256,
# of one of 16 by 16, and 16 to 48 of one of 16 by 32 that is padded.
_KEYS_64 = _tile(16, 64, 8, 1, width=64)
_KEYS_256 = _tile(32, 16, 8, 1, width=256)
_KEYS_LARGE = (
    _tile(32, 64, 8, 2, width=64, laden=PADDED),
    _tile(32, 32, 8, 1, width=32),
    _KEYS_64,
    _tile(32, 32, 8, 1, width=128),
    _tile(32, 64, 8, 1, width=128, laden=PADDED),
    _KEYS_256,
)
_KEYS_EXACT = (
    _tile(32, 32, 8, 1, width=64, bits=19),
    _tile(16, 32, 8, 1, width=128, bits=19),
    _tile(16, 16, 8, 1, width=256, bits=32),
)
_KEYS_SMALL = (
    _tile(32, 32, 8, 1, width=32),
    _tile(32, 32, 8, 2, width=64, laden=PADDED),
    _KEYS_64,
    _tile(32, 32, 8, 1, width=128),
    _KEYS_256,
    *_KEYS_EXACT,
)
TABLES["attention_bwd_dkdv"] = everywhere(
    _tile(32, 64, 8, 1, width=128, laden=PLAIN),  # padded, it spills
    *_KEYS_SMALL[:5],
    _tile(16, 32, 8, 1, width=64, bits=19, laden=PADDED),  # twice the queries spill 8 bytes
    *_KEYS_EXACT,
    sm_80=(
        _tile(32, 64, 8, 1, width=64, laden=PADDED),
        _tile(16, 64, 8, 1, width=128, laden=PLAIN),  # twice the queries spill 8 bytes in packed sequences
        *_KEYS_SMALL[:3],
        _tile(16, 32, 8, 1, width=128),
        *_KEYS_SMALL[4:],
    ),
    sm_90=(*_KEYS_LARGE, *_KEYS_EXACT),
    sm_100=(*_KEYS_LARGE, *_KEYS_EXACT),
    sm_120=_KEYS_SMALL,
    gfx942=(_tile(32, 64, 8, 1, width=64, laden=PADDED), _tile(16, 32, 8, 1, width=256), *_KEYS_EXACT[1:]),
)
_BIAS = (
    _tile(64, 32, 8, 1, width=64),
    _tile(32, 16, 8, 1, width=256),
    _tile(32, 16, 8, 1, width=64, bits=32),
    _tile(32, 16, 8, 1, width=128, bits=19),
)
TABLES["attention_bias_bwd"] = everywhere(*_BIAS, _tile(16, 16, 8, 1, width=256, bits=32))
