//! Softmax attention of query rows over the paged KV cache, on tensor cores (sm_80 and later; `flash_plain` before).
//!
//! `out[t][h] = Σ p[i] · v[i]`, `p = softmax(s)`, `s[i] = f(scale · q[t][h]·k[i])` over the positions i that token t sees: from
//! `pos + 1 - window` (0 without a window) up to and including `pos` if causal, else to the sequence's end. With a
//! soft cap, `f(x) = cap · tanh(x / cap)`; a head's slope adds `-slope · |pos - i|` (ALiBi); a head's sink is one more logit
//! without a value. A token that sees nothing, and one whose sequence is [`NO_SEQUENCE`] (padding), gets zeros.
//!
//! * Shapes: `q` [n_tokens, n_head · head_dim_k], `out` [n_tokens, n_head · head_dim_v] f32; `k`, `v`: the layer's part of the
//!   cache, `[page][kv head][64 positions][head_dim]` in the cache's format; `positions`, `token_sequences` `[n_tokens]` u32;
//!   `sequences` of (first page, positions) u32 pairs; `pages` u32; `sinks`, `slopes` `[n_head]` f32 or absent. Head
//!   dimensions are multiples of 8, at most (576, 512). Arrays are 16-byte aligned. Nothing overlaps. Everything
//!   that changes from step to step is in device memory, so a captured launch can be replayed.
//! * Entries: `flash_{decode,prefill}_{dim}_{class}`. `dim` 64, 128, 256, 576 holds the head (the rest is zeros). Class
//!   `f16`: F16 cache, copied asynchronously. `wide`: F16 and block formats in any other pair, copied asynchronously as they
//!   are, too, and unpacked to f16 in shared memory (head 576, whose tile leaves no room for that on every GPU: unpacked on
//!   the way there). `split`: any pair with F32 or BF16 in it; all operands (q, k, v, p) are kept as a sum of two bf16, 16
//!   bits of mantissa over f32's range, and multiplied as three products.
//! * Geometry: rows of a tile are (token, head of a KV head's group), 16 to a fragment. Prefill: 8 warps with 16 rows
//!   each (head 256: two warps share 16 rows, 4 warps where shared memory is short), grid [tiles, kv heads], long rows
//!   first. Decode, and prefill of head 576, whose groups fill tiles: 4 warps (class `split` with head 256: 2) share 16
//!   rows of one token, grid [tokens, kv heads · ⌈group/16⌉, shares]. Warps that share rows split a block's scores by
//!   position and the output by dimension.
//! * Prompts on Hopper have a kernel of their own, with bits of its own: `hopper.rs`.
//! * Decode splits a token's spans over CTAs where there are few tokens (`split`): each takes an equal share of the spans
//!   that the token sees, whose number it reads on the device, and writes every span's state into `scratch`; a second
//!   launch merges them. `scratch`: `[row][span][head_dim_v]` weighted values, then `[row][span]` of (maximum, sum).
//! * Results may leave quantised: `out` then holds codes, and `scales` beside it scales, of one of the kinds of `quantise_act`
//!   whose groups have 32 values; head_dim_v is a multiple of 32. The bits are those of `quantise_act` on the f32 output.
//!   Not [`Geometry::Prompt`], whose readers take no such activations. See `results.rs`.
//! * Results may be rotated by [`hadamard`](super::hadamard) before that, by 64 neighbours each; head_dim_v is a multiple.
//!   Not [`Geometry::Prompt`], whose values are f16, which are cached as they are.
//! * A decode of one token a sequence can do what `kv_store` does with a rotation, and does it to the same bits: see
//!   `append.rs`.
//! * Order of sums, the same in every other kernel and geometry: positions are cut into spans of 256. Within a span, online
//!   softmax over blocks of 64 positions (head 256 and 576, and class `split`: 32; `split` with head 256: 16) in order; spans
//!   are merged in order. A block or span that a row does not see changes no bit of it. So a row depends on shapes, formats
//!   and its own positions alone: decode and prefill agree bit for bit.
//! * Bytes: decode reads the cache once per KV head. FLOPs: 4 · head_dim per row and position.
//! * Tolerance: NMSE 2e-6: q and p are rounded to f16 (2^-12 relative each), so a score of 20 is off by 0.005. So are values of
//!   block formats, once, from what they stand for, which is the definition's. Class `split` is good to 1e-9, which its own
//!   cases demand.
//!
//! Done for speed: (1) the row sum l is a product with a column of ones, so it needs neither unpacking nor shuffles,
//! (2) rescaling is skipped where no row's maximum moved, (3) masks are applied only in blocks that some row does not see
//! whole, (4) tiles are swizzled: no bank conflicts for ldmatrix or copies, (5) one barrier per block of a prefill, so
//! that one warp's softmax runs beside another's products, (6) a decode's copies go on across spans, two blocks ahead:
//! 128 KiB of the cache are under way per SM, (7) a decode's rows all see the same, so what they see stays in registers,
//! read from the step's inputs before the wait for earlier launches, (8) blocks of 32 become f16 two at a time, Q8_0 by 2.8
//! instructions a value (SASS of sm_90a). A lane takes a block out of nine words; with heads of 64 and 128 neither these loads
//! nor the stores of a warp meet in a bank.

/// Calls a macro with each table of entries: the kernel's name, its own, the entries' first part, threads and CTAs per
/// SM, then per row head dimension, class, how operands are kept, blocks in shared memory (1: copied when they are
/// needed), [steps of 16 along a key, columns of 8 scores and of 8 outputs per warp], [warps that share rows, groups
/// of rows].
///
/// Tiles of one group of rows are of one token. Those of head 576 serve prefill too.
macro_rules! for_each_table {
    ($callback:ident) => {
        $callback! { "flash" DECODE "flash_decode_" (128, 3)
            64 "f16" F16 Half 3 [4 2 2] [4 1];
            128 "f16" F16 Half 3 [8 2 4] [4 1];
            64 "wide" Wide Unpacked 1 [4 2 2] [4 1];
            128 "wide" Wide Unpacked 1 [8 2 4] [4 1];
        }
        $callback! { "flash" LARGE_DECODE "flash_decode_" (128, 2)
            256 "f16" F16 Half 3 [16 1 8] [4 1];
            576 "f16" F16 Half 2 [36 1 16] [4 1];
            256 "wide" Wide Unpacked 1 [16 1 8] [4 1];
            576 "wide" Wide Half 1 [36 1 16] [4 1];
        }
        $callback! { "flash" PREFILL "flash_prefill_" (256, 1)
            64 "f16" F16 Half 2 [4 8 8] [1 8];
            128 "f16" F16 Half 2 [8 8 16] [1 8];
            256 "f16" F16 Half 2 [16 2 16] [2 4];
            64 "wide" Wide Unpacked 1 [4 8 8] [1 8];
            128 "wide" Wide Unpacked 1 [8 8 16] [1 8];
            256 "wide" Wide Unpacked 1 [16 2 16] [2 4];
        }
        $callback! { "flash" NARROW_PREFILL "flash_prefill_narrow_" (128, 2)
            256 "f16" F16 Half 2 [16 2 16] [2 2];
            256 "wide" Wide Unpacked 1 [16 2 16] [2 2];
        }
        $callback! { "flash_split" SPLIT_DECODE "flash_decode_" (128, 2)
            64 "split" Split Split 1 [4 1 2] [4 1];
            128 "split" Split Split 1 [8 1 4] [4 1];
            256 "split" Split Split 1 [16 1 16] [2 1];
            576 "split" Split Split 1 [36 1 16] [4 1];
        }
        $callback! { "flash_split" SPLIT_PREFILL "flash_prefill_" (256, 1)
            64 "split" Split Split 1 [4 4 8] [1 8];
            128 "split" Split Split 1 [8 4 16] [1 8];
            256 "split" Split Split 1 [16 1 16] [2 4];
        }
        $callback! { "flash_split" SPLIT_NARROW_PREFILL "flash_prefill_narrow_" (128, 2)
            256 "split" Split Split 1 [16 1 16] [2 2];
        }
    };
}

/// Calls a macro with the tiles of `hopper.rs`: the head dimension that a tile holds, class, [pieces of 64 elements of a key
/// row, registers of scores and of outputs, steps of 16 positions], blocks in either ring, [positions that are copied
/// together as the cache has them, how many of those have room].
macro_rules! for_each_hopper {
    ($callback:ident) => {
        $callback! {
            64 "f16" F16 [1 64 32 8] 3 [0 0];
            128 "f16" F16 [2 64 64 8] 3 [0 0];
            256 "f16" F16 [4 32 128 4] 2 [0 0];
            64 "wide" Wide [1 64 32 8] 3 [64 4];
            128 "wide" Wide [2 64 64 8] 2 [64 4];
            256 "wide" Wide [4 32 128 4] 2 [32 3];
        }
    };
}

mod append;
#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
mod block;
#[cfg(not(target_arch = "nvptx64"))]
mod cases;
#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
mod decode;
#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
mod entries;
#[cfg(any(all(target_arch = "nvptx64", sm_90a), feature = "emu"))]
mod hopper;
#[cfg(not(target_arch = "nvptx64"))]
mod host;
#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
mod merge;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod plain;
#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
mod prefill;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod results;
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod state;
#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
mod store;
#[cfg(not(target_arch = "nvptx64"))]
mod tables;

#[cfg(not(target_arch = "nvptx64"))]
pub use append::*;
#[cfg(not(target_arch = "nvptx64"))]
pub use cases::*;
#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

/// Positions of a page of the cache: the engine's `PAGE`.
pub const PAGE: usize = 64;
/// Positions of a span.
pub const SPAN: usize = 256;
/// Entry of `token_sequences` for a token that is not there.
pub const NO_SEQUENCE: u32 = u32::MAX;
/// Rows of a fragment.
pub const ROWS: usize = 16;

/// Columns of the table of a tile's rows.
const TABLE_COLUMNS: usize = 5;
/// Warps of a CTA without tensor cores.
const PLAIN_WARPS: u32 = 4;
/// Most elements of a value row.
const MAX_DIM_V: u32 = 512;
/// Threads of a merging CTA, and spans that it merges at a time.
const MERGE_THREADS: u32 = 128;
/// Dimensions of one.
const MERGE_COLUMNS: u32 = 32;
/// Dimensions of one where they are rotated together.
const ROTATED_COLUMNS: u32 = ROTATED_WIDTH;

/// Bits of the argument `flags`: a token sees up to its own position.
const CAUSAL: u32 = 1;
/// Scores take a soft cap or slopes.
const TRANSFORM: u32 = 2;
/// What is appended is rotated in pairs half a head apart.
const NEOX: u32 = 4;
/// Results that are quantised are as Q8_1, which keeps an offset's value with the scale.
const OFFSET_VALUES: u32 = 8;
/// Results are rotated.
const ROTATED: u32 = 16;
/// By this width.
pub const ROTATED_WIDTH: u32 = 64;

/// What of a tile is fixed per entry.
#[derive(Clone, Copy, Debug)]
struct Tile {
    /// Elements of a key row and of a value row in shared memory.
    dims: [usize; 2],
    /// Positions of a block.
    block: usize,
    /// 2 where operands are a sum of two.
    planes: usize,
    /// Warps that share rows.
    sharers: usize,
    /// Groups of [`ROWS`] rows.
    row_groups: usize,
    /// Blocks in shared memory: while one is computed the others are copied.
    stages: usize,
    /// Whether these are unpacked from blocks as the cache has them, which lie behind the rest.
    unpacks: bool,
}

/// How operands are kept in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// f16.
    Half,
    /// f16, unpacked from blocks that are copied ahead as the cache has them.
    Unpacked,
    /// bf16, and bf16 of the rest.
    Split,
}

impl Kept {
    const fn planes(self) -> usize {
        match self {
            Kept::Half | Kept::Unpacked => 1,
            Kept::Split => 2,
        }
    }
}

/// Offsets of a CTA's shared memory in 16-byte units, and the whole.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(any(target_arch = "nvptx64", feature = "emu")),
    expect(dead_code, reason = "a host that only launches needs the end alone")
)]
struct Layout {
    k: usize,
    v: usize,
    q: usize,
    p: usize,
    maxima: usize,
    rows: usize,
    views: usize,
    end: usize,
}

impl Tile {
    const fn new(
        kept: Kept,
        stages: usize,
        [key_steps, score_columns, out_columns]: [usize; 3],
        [sharers, row_groups]: [usize; 2],
    ) -> Tile {
        Tile {
            dims: [16 * key_steps, 8 * out_columns * sharers],
            block: 8 * score_columns * sharers,
            planes: kept.planes(),
            sharers,
            row_groups,
            stages,
            unpacks: matches!(kept, Kept::Unpacked),
        }
    }

    const fn rows(&self) -> usize {
        ROWS * self.row_groups
    }

    /// Whether all rows are of one token.
    const fn per_token(&self) -> bool {
        self.row_groups == 1
    }

    /// Whether a warp keeps its queries in registers: where they and twice the outputs leave room for the rest.
    const fn q_in_registers(&self) -> bool {
        self.planes == 1 && self.dims[0] / 4 + self.dims[1] / self.sharers <= 150
    }

    /// Blocks that have room as the cache has them, whose rows have so many bytes. All are under way until the oldest is
    /// unpacked. Of heads of 128 in Q8_0 a third would cost a CTA per SM, so two of those bound what narrower rows take.
    const fn raw_blocks(&self, [k, v]: [u32; 2]) -> u32 {
        const ROOM: u32 = 2 * 64 * (136 + 136);
        let bytes = self.block as u32 * (k + v);
        if !self.unpacks {
            0
        } else if !self.per_token() || 3 * bytes > ROOM {
            // A prefill has no use for more.
            2
        } else if 4 * bytes > ROOM {
            3
        } else {
            4
        }
    }

    /// Of a CTA over such a cache.
    #[cfg(not(target_arch = "nvptx64"))]
    const fn smem_bytes(&self, row_bytes: [u32; 2]) -> u32 {
        let raw = self.raw_blocks(row_bytes) * self.block as u32 * (row_bytes[0] + row_bytes[1]);
        16 * self.layout().end as u32 + raw
    }

    const fn layout(&self) -> Layout {
        let (k, stages) = (0, self.stages);
        let v = k + stages * self.planes * self.block * self.dims[0] / 8;
        let tiles = v + stages * self.planes * self.block * self.dims[1] / 8;
        // Queries on their way to registers lie where keys and values will.
        let queries = self.planes * self.rows() * self.dims[0] / 8;
        assert!(!self.q_in_registers() || queries <= tiles);
        let q = if self.q_in_registers() { 0 } else { tiles };
        let p = if self.q_in_registers() { tiles } else { tiles + queries };
        let shared = self.sharers > 1;
        let maxima = p + if shared { self.planes * self.rows() * self.block / 8 } else { 0 };
        let rows = maxima + if shared { self.sharers * self.rows() / 4 } else { 0 };
        // Rows of one token all see the same, which needs no table.
        let tables = if self.per_token() { 0 } else { 1 };
        let views = rows + tables * TABLE_COLUMNS * self.rows() / 4;
        let end = views + tables * 2 * self.sharers * self.row_groups;
        Layout { k, v, q, p, maxima, rows, views, end }
    }
}

/// Rows of a tile of `hopper.rs`, and threads of its CTAs.
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
const HOPPER_ROWS: u32 = 128;
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
const HOPPER_THREADS: u32 = 384;

/// What of a tile of `hopper.rs` is fixed per entry; offsets of its shared memory are in 16-byte units.
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(any(target_arch = "nvptx64", feature = "emu")),
    expect(dead_code, reason = "a host that only launches needs dimensions and the end alone")
)]
struct HopperTile {
    /// Elements of a key row and of a value row in shared memory.
    dims: [usize; 2],
    /// Positions of a block.
    block: usize,
    /// The rings of K and of V; queries lie before them.
    parts: [usize; 2],
    /// What each row sees; barriers follow.
    rows: usize,
    /// Positions that are copied together as the cache has them, and how many of those have room, behind the rest.
    raw: [usize; 2],
    /// All but that, in bytes.
    bytes: u32,
}

#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
impl HopperTile {
    const fn new([pieces, scores, outputs, steps]: [usize; 4], stages: usize, raw: [usize; 2]) -> HopperTile {
        let (dims, block) = ([64 * pieces, 2 * outputs], 2 * scores);
        assert!(block == 16 * steps && block.is_multiple_of(PAGE));
        let k = HOPPER_ROWS as usize * dims[0] / 8;
        let v = k + stages * block * dims[0] / 8;
        let rows = v + stages * block * dims[1] / 8;
        let barriers = rows + HOPPER_ROWS as usize;
        HopperTile { dims, block, parts: [k, v], rows, raw, bytes: (16 * barriers + 8 * 4 * stages) as u32 }
    }

    /// Bytes of a piece of either part of a cache whose rows have so many.
    const fn piece_bytes(&self, [k, v]: [u32; 2]) -> u32 {
        self.raw[0] as u32 * if k > v { k } else { v }
    }

    /// Of a CTA over such a cache.
    #[cfg(not(target_arch = "nvptx64"))]
    const fn smem_bytes(&self, row_bytes: [u32; 2]) -> u32 {
        self.bytes + self.raw[1] as u32 * self.piece_bytes(row_bytes)
    }
}

/// First position that a token sees, and the one after the last; equal where it sees none.
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
#[inline(always)]
fn visible(pos: u32, len: u32, causal: bool, window: u32) -> (u32, u32) {
    let high = if causal && pos < len { pos + 1 } else { len };
    let low = if window > 0 && pos + 1 > window { pos + 1 - window } else { 0 };
    if low < high { (low, high) } else { (0, 0) }
}

/// A head's sink in units of log2.
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
#[inline(always)]
fn sink(sinks: crate::device::Glb<f32>, head: u32) -> f32 {
    if sinks.is_null() { f32::NEG_INFINITY } else { sinks.ld_nc(head) * crate::device::math::LOG2_E }
}
