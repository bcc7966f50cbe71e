//! A step's keys and values into the KV cache, in the cache's format; with [`Rope`] the keys are rotated on the way, and
//! the queries in the same launch. Keys (with their queries) and values may go through [`hadamard`](super::hadamard) before
//! they are stored.
//!
//! * Shapes: `k` [n_tokens, n_head_kv · head_dim_k], `v` [n_tokens, n_head_kv · head_dim_v] f32; `cells` `[n_tokens]`
//!   u32, page · 64 + position in page, each once; [`NO_CELL`] for a token that is not stored. The cache's parts are
//!   `[page][kv head][64 positions][head_dim]` in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1. Head dimensions are
//!   multiples of 8, and of the format's block. With rope: `table` as `rope` writes it, `q` and `q_out` [n_tokens,
//!   n_head, head_dim_k], n_rot a multiple of 8; `q_out` may be `q` unless keys go through `hadamard`. Widths of the
//!   latter divide the head, a multiple of 32. 16-byte aligned; nothing else overlaps.
//! * Geometry: 256 threads; tokens along the grid's second dimension; along the third keys, values and, with rope, queries.
//!   Eight lanes take 32 elements of a head, a float4 each; queries as in `rope`, or if they go through `hadamard` a float4
//!   per lane as well.
//! * Bytes: 4 per element and what the cache's formats take; queries 8. FLOPs: 6 per rotated pair.
//! * Tolerance: exact: rotations are bit-equal to `rope`'s and `hadamard`'s, the bytes to `quant::row::encode`'s.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

/// Entry of `cells` for a token that is not stored.
pub const NO_CELL: u32 = u32::MAX;

const THREADS: u32 = 256;
/// Lanes of a group of 32 elements.
const LANES: u32 = 8;
/// Positions of a page.
const PAGE: usize = super::flash::PAGE;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
mod gpu {
    use half::{bf16, f16};
    use quant::FormatId;

    use super::{LANES, NO_CELL, PAGE};
    use crate::device::{F32x2, F32x4, Float, Glb, U32x2, thread};
    use crate::kernels::hadamard;
    use crate::kernels::rope::gpu::{rope4, turn};
    use crate::kernels::set_rows::gpu::{Encoder, Q8_0, Range, Symmetric};

    /// How keys are rotated.
    #[derive(Clone, Copy)]
    struct Rotation {
        table: Glb<F32x2>,
        n_rot: u32,
        neox: bool,
    }

    impl Rotation {
        /// The float4 `j` of a head, rotated.
        #[inline(always)]
        #[track_caller]
        fn read(self, head: Glb<F32x4>, j: u32, token: usize) -> [f32; 4] {
            let mut v = head.ld_nc(j).0;
            if 4 * j >= self.n_rot {
                return v;
            }
            let table = self.table.offset(token * (self.n_rot / 2) as usize).cast::<F32x4>();
            if self.neox {
                // The partners lie half the rotated part away; of a turned pair this lane has one side.
                let half = self.n_rot / 8;
                let first = j < half;
                let pairs = if first { j } else { j - half };
                let other = head.ld_nc(if first { j + half } else { j - half }).0;
                let (F32x4([c0, s0, c1, s1]), F32x4([c2, s2, c3, s3])) =
                    (table.ld_nc(2 * pairs), table.ld_nc(2 * pairs + 1));
                let (c, s) = ([c0, c1, c2, c3], [s0, s1, s2, s3]);
                unroll!(J in 0..4 {
                    let (a, b) = if first { (v[J], other[J]) } else { (other[J], v[J]) };
                    let [a, b] = turn(a, b, c[J], s[J]);
                    v[J] = if first { a } else { b };
                });
            } else {
                let F32x4([c0, s0, c1, s1]) = table.ld_nc(j);
                [v[0], v[1]] = turn(v[0], v[1], c0, s0);
                [v[2], v[3]] = turn(v[2], v[3], c1, s1);
            }
            v
        }
    }

    /// A part of the cache.
    #[derive(Clone, Copy)]
    struct Part {
        bytes: Glb<u8>,
        format: u32,
        row_bytes: u32,
        head_dim: u32,
        /// Of `hadamard`; 0: none.
        width: u32,
    }

    #[inline(always)]
    #[track_caller]
    fn half_words<T: Float>(v: [f32; 4], bits: impl Fn(T) -> u16) -> U32x2 {
        let bits = v.map(|v| u32::from(bits(T::from_f32(v))));
        U32x2([bits[0] | bits[1] << 16, bits[2] | bits[3] << 16])
    }

    #[inline(always)]
    #[track_caller]
    fn store(part: Part, x: Glb<f32>, cells: Glb<u32>, n_head_kv: u32, rotation: Option<Rotation>) {
        const F32: u32 = FormatId::F32 as u32;
        const F16: u32 = FormatId::F16 as u32;
        const BF16: u32 = FormatId::BF16 as u32;
        const Q8: u32 = FormatId::Q8_0 as u32;
        const Q4_0: u32 = FormatId::Q4_0 as u32;
        const Q4_1: u32 = FormatId::Q4_1 as u32;
        const Q5_0: u32 = FormatId::Q5_0 as u32;

        let (token, lane) = (thread::block_idx_y(), thread::thread_idx_x() % LANES);
        let groups = part.head_dim.div_ceil(32);
        let index = thread::index_1d() / LANES;
        let cell = cells.ld_nc(token);
        // Whole warps leave, unless the CTA rotates together; lanes past the end work on the last group and store nothing.
        let past_end = index - index % (32 / LANES) >= n_head_kv * groups;
        if cell == NO_CELL || past_end && part.width <= hadamard::WARP_WIDTH {
            return;
        }
        let last = n_head_kv * groups - 1;
        let at = if index < last { index } else { last };
        let (head, group) = (at / groups, at % groups);
        let j = LANES * group + lane;
        let inside = index <= last && 4 * j < part.head_dim;
        let j = if 4 * j < part.head_dim { j } else { 0 };

        let x = x.offset((token as usize * n_head_kv as usize + head as usize) * part.head_dim as usize);
        let v = match rotation {
            Some(rotation) => rotation.read(x.cast(), j, token as usize),
            None => x.cast::<F32x4>().ld_nc(j).0,
        };
        let v = if part.width > 0 { hadamard::gpu::rotate(v, part.width) } else { v };
        let (page, pos) = (cell as usize / PAGE, cell as usize % PAGE);
        let row = (page * n_head_kv as usize + head as usize) * PAGE + pos;
        let row = part.bytes.offset(row * part.row_bytes as usize);
        let (row, group) = (row.cast::<u16>(), group as usize);
        // The format is the launch's, so all lanes take one arm.
        match part.format {
            F32 if inside => row.cast::<F32x4>().st(j, F32x4(v)),
            F16 if inside => row.cast::<U32x2>().st(j, half_words(v, f16::to_bits)),
            BF16 if inside => row.cast::<U32x2>().st(j, half_words(v, bf16::to_bits)),
            F32 | F16 | BF16 => {}
            Q8 => Q8_0::encode(v, x, lane, row.offset(group * (Q8_0::BYTES / 2)), inside),
            Q4_0 => {
                Symmetric::<8>::encode(v, x, lane, row.offset(group * (Symmetric::<8>::BYTES / 2)), inside)
            }
            Q4_1 => Range::<15>::encode(v, x, lane, row.offset(group * (Range::<15>::BYTES / 2)), inside),
            Q5_0 => {
                Symmetric::<16>::encode(v, x, lane, row.offset(group * (Symmetric::<16>::BYTES / 2)), inside)
            }
            _ => Range::<31>::encode(v, x, lane, row.offset(group * (Range::<31>::BYTES / 2)), inside),
        }
    }

    /// Queries as keys are: rotated, then by `hadamard`.
    #[inline(always)]
    #[track_caller]
    fn queries(q: Glb<f32>, q_out: Glb<f32>, n_head: u32, head_dim: u32, rotation: Rotation, width: u32) {
        let (token, units) = (thread::block_idx_y() as usize, head_dim / 4);
        let i = thread::index_1d();
        let there = i < n_head * units;
        let head = |x: Glb<f32>| {
            let head = token * n_head as usize + (i / units) as usize;
            x.offset(head * head_dim as usize).cast::<F32x4>()
        };
        let mut v = [0.0; 4];
        if there {
            v = rotation.read(head(q), i % units, token);
        }
        let v = hadamard::gpu::rotate(v, width);
        if there {
            head(q_out).st(i % units, F32x4(v));
        }
    }

    #[inline(always)]
    fn kv_store(
        k: Glb<f32>,
        v: Glb<f32>,
        cells: Glb<u32>,
        cache_k: Glb<u8>,
        cache_v: Glb<u8>,
        n_head_kv: u32,
        head_dim_k: u32,
        head_dim_v: u32,
        format_k: u32,
        format_v: u32,
        row_bytes_k: u32,
        row_bytes_v: u32,
        table: Glb<F32x2>,
        q: Glb<f32>,
        q_out: Glb<f32>,
        n_head: u32,
        n_rot: u32,
        neox: u32,
        width_k: u32,
        width_v: u32,
    ) {
        let neox = neox != 0;
        let rotation = Rotation { table, n_rot, neox };
        let part = thread::block_idx_z();
        if part == 2 && width_k > 0 {
            queries(q, q_out, n_head, head_dim_k, rotation, width_k);
        } else if part == 2 {
            rope4(q, table, q_out, n_head, head_dim_k, n_rot, neox);
        } else if part == 1 {
            let (bytes, format, row_bytes, head_dim) = (cache_v, format_v, row_bytes_v, head_dim_v);
            let part = Part { bytes, format, row_bytes, head_dim, width: width_v };
            store(part, v, cells, n_head_kv, None);
        } else {
            let (bytes, format, row_bytes, head_dim) = (cache_k, format_k, row_bytes_k, head_dim_k);
            let part = Part { bytes, format, row_bytes, head_dim, width: width_k };
            store(part, k, cells, n_head_kv, if table.is_null() { None } else { Some(rotation) });
        }
    }

    kernels! {
        in "kv_store";
        pub(super) ENTRIES: threads(256);
        fn (
            k: Glb<f32>, v: Glb<f32>, cells: Glb<u32>, cache_k: Glb<u8>, cache_v: Glb<u8>,
            n_head_kv: u32, head_dim_k: u32, head_dim_v: u32, format_k: u32, format_v: u32,
            row_bytes_k: u32, row_bytes_v: u32,
            table: Glb<F32x2>, q: Glb<f32>, q_out: Glb<f32>, n_head: u32, n_rot: u32, neox: u32,
            width_k: u32, width_v: u32,
        );
        "kv_store" => kv_store;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::FormatId;

    use super::{LANES, NO_CELL, PAGE, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::flash::{Cache, KV_FORMATS};
    use crate::kernels::hadamard;
    use crate::kernels::rope::Mode;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Rotation of keys and queries; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Rope {
        pub table: DevicePtr,
        pub q: DevicePtr,
        pub q_out: DevicePtr,
        pub n_head: usize,
        pub n_rot: usize,
        pub mode: Mode,
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub k: DevicePtr,
        pub v: DevicePtr,
        pub cells: DevicePtr,
        pub cache: Cache,
        pub n_tokens: usize,
        pub rope: Option<Rope>,
        /// Of `hadamard`, for keys and for values.
        pub widths: [Option<usize>; 2],
    }

    /// One launch for keys, values and queries.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let kernel = KvStore::NAME;
        let check = Check(kernel);
        let shape =
            |what, expected, got: usize| LaunchError::Shape { kernel, what, expected, got: got as u64 };
        let Args { cache, rope, .. } = *args;
        let n_head_kv = check.size("n_head_kv", cache.n_head_kv)?;
        let (mut row_bytes, mut widths) = ([0; 2], [0; 2]);
        let (mut threads, mut smem_bytes) = (0, 0);
        let parts =
            [("head_dim_k", cache.type_k, cache.head_dim_k), ("head_dim_v", cache.type_v, cache.head_dim_v)];
        for (i, (what, format, head_dim)) in parts.into_iter().enumerate() {
            if !KV_FORMATS.contains(&format) {
                return Err(LaunchError::Format { kernel, format });
            }
            check.multiple(what, head_dim, 8, "a multiple of 8")?;
            let row = quant::row::row_bytes(format, head_dim);
            row_bytes[i] = check
                .size(what, row.map_err(|_| shape(what, "a multiple of the format's block", head_dim))?)?;
            threads = threads.max(cache.n_head_kv * head_dim.div_ceil(32) * LANES as usize);
            if let Some(width) = args.widths[i] {
                widths[i] = hadamard::check_width(check, head_dim, width)?;
                check.multiple(what, head_dim, 32, "a multiple of 32 for hadamard")?;
                smem_bytes = smem_bytes.max(hadamard::smem_bytes(width));
            }
        }
        for (what, at) in [("k", args.k), ("v", args.v), ("cache.k", cache.k), ("cache.v", cache.v)] {
            check.aligned(what, at, 16)?;
        }
        check.aligned("cells", args.cells, 4)?;
        let mut params = Params::new()
            .with(args.k)
            .with(args.v)
            .with(args.cells)
            .with(cache.k)
            .with(cache.v)
            .with(n_head_kv)
            .with(cache.head_dim_k as u32)
            .with(cache.head_dim_v as u32)
            .with(cache.type_k as u32)
            .with(cache.type_v as u32)
            .with(row_bytes[0])
            .with(row_bytes[1]);
        params = match rope {
            None => params
                .with(DevicePtr::NULL)
                .with(DevicePtr::NULL)
                .with(DevicePtr::NULL)
                .with(0u32)
                .with(0u32)
                .with(0u32),
            Some(rope) => {
                check.multiple("n_rot", rope.n_rot, 8, "a multiple of 8")?;
                let n_rot = check.size("n_rot", rope.n_rot)?;
                if rope.n_rot > cache.head_dim_k {
                    return Err(shape("n_rot", "at most head_dim_k", rope.n_rot));
                }
                let n_head = check.size("n_head", rope.n_head)?;
                if rope.table == DevicePtr::NULL {
                    return Err(shape("table", "an array", 0));
                }
                for (what, at) in [("table", rope.table), ("q", rope.q), ("q_out", rope.q_out)] {
                    check.aligned(what, at, 16)?;
                }
                let per_thread = if widths[0] > 0 { 4 } else { 8 };
                threads = threads.max(rope.n_head * cache.head_dim_k / per_thread);
                if widths[0] > 0 && rope.q == rope.q_out {
                    return Err(shape("q_out", "another array than q", 0));
                }
                let neox = u32::from(rope.mode == Mode::Neox);
                params.with(rope.table).with(rope.q).with(rope.q_out).with(n_head).with(n_rot).with(neox)
            }
        };
        Ok(Launch {
            entry: "kv_store",
            grid: [
                check.size("elements of a token", threads)?.div_ceil(THREADS),
                check.grid("n_tokens", args.n_tokens)?,
                if rope.is_some() { 3 } else { 2 },
            ],
            cta: THREADS,
            cluster: 1,
            smem_bytes,
            params: params.with(widths[0]).with(widths[1]),
        })
    }

    /// The definition of the rotation, in the order of roundings that makes it exact.
    pub fn reference(head: &mut [f32], table: &[f32], mode: Mode) {
        let n_pairs = table.len() / 2;
        for j in 0..n_pairs {
            let (first, second) = match mode {
                Mode::Norm => (2 * j, 2 * j + 1),
                Mode::Neox => (j, j + n_pairs),
            };
            let (a, b, cosine, sine) = (head[first], head[second], table[2 * j], table[2 * j + 1]);
            head[first] = libm::fmaf(a, cosine, -(b * sine));
            head[second] = libm::fmaf(a, sine, b * cosine);
        }
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct KvStore;

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub types: [FormatId; 2],
        pub dims: [usize; 2],
        pub n_head_kv: usize,
        pub n_tokens: usize,
        /// Query heads, rotated elements, pairing.
        pub rope: Option<(usize, usize, Mode)>,
        pub widths: [Option<usize>; 2],
    }

    const PLAIN: [Option<usize>; 2] = [None; 2];
    const PAGES: usize = 2;
    const BENCH_BASE: Case = Case {
        types: [FormatId::F16; 2],
        dims: [128, 128],
        n_head_kv: 8,
        n_tokens: 2048,
        rope: Some((32, 128, Mode::Norm)),
        widths: PLAIN,
    };

    impl Kernel for KvStore {
        const NAME: &'static str = "kv_store";
        type Case = Case;
        const CASES: &'static [Case] = &[
            Case {
                types: [FormatId::F32, FormatId::F16],
                dims: [64, 64],
                n_head_kv: 2,
                n_tokens: 3,
                rope: None,
                widths: PLAIN,
            },
            Case {
                types: [FormatId::BF16, FormatId::Q8_0],
                dims: [80, 96],
                n_head_kv: 3,
                n_tokens: 2,
                rope: None,
                widths: PLAIN,
            },
            Case {
                types: [FormatId::Q4_0, FormatId::Q4_1],
                dims: [128, 64],
                n_head_kv: 5,
                n_tokens: 2,
                rope: None,
                widths: PLAIN,
            },
            Case {
                types: [FormatId::Q5_0, FormatId::Q5_1],
                dims: [32, 256],
                n_head_kv: 1,
                n_tokens: 4,
                rope: None,
                widths: PLAIN,
            },
            Case {
                types: [FormatId::F16, FormatId::F32],
                dims: [576, 512],
                n_head_kv: 1,
                n_tokens: 1,
                rope: None,
                widths: PLAIN,
            },
            Case {
                types: [FormatId::F16; 2],
                dims: [64, 64],
                n_head_kv: 3,
                n_tokens: 3,
                rope: Some((9, 64, Mode::Norm)),
                widths: PLAIN,
            },
            Case {
                types: [FormatId::Q8_0; 2],
                dims: [128, 128],
                n_head_kv: 2,
                n_tokens: 2,
                rope: Some((8, 128, Mode::Neox)),
                widths: PLAIN,
            },
            Case {
                types: [FormatId::F32, FormatId::Q4_0],
                dims: [80, 64],
                n_head_kv: 1,
                n_tokens: 2,
                rope: Some((3, 32, Mode::Neox)),
                widths: PLAIN,
            },
            // Keys of a warp and of more, values in several pieces, queries that fill no CTA.
            Case {
                types: [FormatId::Q4_0; 2],
                dims: [128, 128],
                n_head_kv: 3,
                n_tokens: 3,
                rope: Some((6, 128, Mode::Norm)),
                widths: [Some(128), Some(64)],
            },
            Case {
                types: [FormatId::Q5_1, FormatId::F16],
                dims: [256, 64],
                n_head_kv: 3,
                n_tokens: 2,
                rope: Some((6, 64, Mode::Neox)),
                widths: [Some(256), None],
            },
            Case {
                types: [FormatId::Q5_0, FormatId::Q4_1],
                dims: [512, 128],
                n_head_kv: 1,
                n_tokens: 2,
                rope: None,
                widths: [Some(512), Some(64)],
            },
        ];
        /// A token and a prompt of a large model.
        const BENCH: &'static [Case] = &[
            Case { n_tokens: 1, ..BENCH_BASE },
            BENCH_BASE,
            Case { types: [FormatId::Q8_0; 2], ..BENCH_BASE },
            Case { types: [FormatId::Q4_0; 2], widths: [Some(128); 2], ..BENCH_BASE },
        ];
        const NMSE_MAX: f64 = 0.0;
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { types, dims, n_head_kv, n_tokens, rope, widths } = *case;
            let (n_head, n_rot, mode) = rope.unwrap_or((1, 8, Mode::Norm));
            let mut table = Vec::new();
            for _ in 0..n_tokens * n_rot / 2 {
                let angle = f64::from(random.value());
                table.extend([libm::cos(angle) as f32, libm::sin(angle) as f32]);
            }
            // Cells in no order; of several tokens the last is padding.
            let cell = |t: usize| {
                if t > 0 && t + 1 == n_tokens { NO_CELL } else { (37 * t + 101) as u32 % (64 * PAGES as u32) }
            };
            let cells: Vec<u32> = (0..n_tokens).map(cell).collect();
            let rotate = |x: &[f32], heads: usize, head_dim: usize| {
                let mut x = x.to_vec();
                for (i, head) in x.chunks_mut(head_dim).enumerate() {
                    if rope.is_some() {
                        reference(head, &table[i / heads * n_rot..][..n_rot], mode);
                    }
                }
                x
            };
            let x = dims.map(|dim| random.values(n_tokens * n_head_kv * dim));
            let q = random.values(n_tokens * n_head * dims[0]);
            let hadamard = |mut x: Vec<f32>, width: Option<usize>| {
                if let Some(width) = width {
                    x.chunks_exact_mut(width).for_each(hadamard::rotated);
                }
                x
            };
            let stored =
                [hadamard(rotate(&x[0], n_head_kv, dims[0]), widths[0]), hadamard(x[1].clone(), widths[1])];
            // Outputs start as ones in all bits; cells that no token has stay so.
            let caches = [0, 1].map(|p| {
                let row = quant::row::row_bytes(types[p], dims[p]).expect("cases fit their formats");
                let mut cache = vec![0xff; PAGES * n_head_kv * PAGE * row];
                for (i, head) in stored[p].chunks(dims[p]).enumerate() {
                    let (cell, head_kv) = (cells[i / n_head_kv], i % n_head_kv);
                    if cell != NO_CELL {
                        let cell = cell as usize;
                        let at = ((cell / PAGE * n_head_kv + head_kv) * PAGE + cell % PAGE) * row;
                        quant::row::encode(types[p], head, None, &mut cache[at..at + row])
                            .expect("cache formats can be encoded");
                    }
                }
                cache
            });
            let q_out = if rope.is_some() {
                bytes_of(&hadamard(rotate(&q, n_head, dims[0]), widths[0]))
            } else {
                vec![0xff; 4 * q.len()]
            };
            let [k_cache, v_cache] = caches;
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&x[0])),
                    Buffer::Input(bytes_of(&x[1])),
                    Buffer::Input(bytes_of(&cells)),
                    Buffer::Output(Expected::Exact(k_cache)),
                    Buffer::Output(Expected::Exact(v_cache)),
                    Buffer::Input(bytes_of(&table)),
                    Buffer::Input(bytes_of(&q)),
                    Buffer::Output(Expected::Exact(q_out)),
                ],
                launches: Box::new(move |at| {
                    Ok(vec![launch(&Args {
                        k: at[0],
                        v: at[1],
                        cells: at[2],
                        cache: Cache {
                            k: at[3],
                            v: at[4],
                            type_k: types[0],
                            type_v: types[1],
                            n_head_kv,
                            head_dim_k: dims[0],
                            head_dim_v: dims[1],
                        },
                        n_tokens,
                        rope: rope.map(|_| Rope {
                            table: at[5],
                            q: at[6],
                            q_out: at[7],
                            n_head,
                            n_rot,
                            mode,
                        }),
                        widths,
                    })?])
                }),
            }
        }

        fn bytes(case: &Case) -> u64 {
            let stored =
                |p: usize| 4 * case.dims[p] + quant::row::row_bytes(case.types[p], case.dims[p]).unwrap_or(0);
            let q = case.rope.map_or(0, |(n_head, ..)| 8 * n_head * case.dims[0]);
            (case.n_tokens * (case.n_head_kv * (stored(0) + stored(1)) + q)) as u64
        }

        fn flops(case: &Case) -> u64 {
            case.rope.map_or(0, |(n_head, n_rot, _)| 3 * case.n_tokens * (n_head + case.n_head_kv) * n_rot)
                as u64
        }
    }
}
