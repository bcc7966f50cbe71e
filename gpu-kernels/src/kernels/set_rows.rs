//! Rows of f32 into rows of another tensor, chosen by number, in the target's format: `dst[ids[r]] = src[r]`. Without ids
//! it converts a whole tensor.
//!
//! * Shapes: `src` [n_rows, n] f32, dense; `ids` `[n_rows]` i32 or i64, or absent (row r goes to row r); a negative id writes
//!   nothing. `dst` [.., n] in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or IQ4_NL, dense. n a multiple of 32 for blocks,
//!   of 4 for floats; 16-byte aligned. Ids are distinct, nothing overlaps.
//! * Geometry: 128 threads per CTA. Blocks: eight lanes per block, a float4 each. Floats: a warp per 256 values.
//! * Bytes: 4 per element and the target's own. FLOPs: 4 per element; IQ4_NL's search some 600.
//! * Tolerance: exact: bit-equal to `quant::row::encode`. IQ4_NL sums its errors in order, a try per lane.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

const THREADS: u32 = 128;
/// Lanes of a block.
const LANES: u32 = 8;

#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
pub(crate) mod gpu {
    use half::{bf16, f16};
    use quant::bits::{f32_to_f16, round_half_away};
    use quant::codebook::IQ4;
    use quant::search::ZERO_MAX;

    use super::LANES;
    use crate::device::math::mul;
    use crate::device::{F32x4, Glb, U32x2, math, thread, warp};
    use crate::kernels::output::SPAN4;
    use crate::kernels::output::gpu::{Output, read};

    /// Eight lanes' values of a block: this lane has elements 4l to 4l + 3.
    #[derive(Clone, Copy)]
    struct Values {
        v: [f32; 4],
        lane: u32,
    }

    /// Combines the eight lanes' values; all have the result.
    #[inline(always)]
    #[track_caller]
    fn of_lanes<T: Copy>(mut value: T, step: impl Fn(T, u32) -> T) -> T {
        unroll!(S in 0..4 {
            if S < 3 {
                value = step(value, (LANES / 2) >> S);
            }
        });
        value
    }

    #[inline(always)]
    #[track_caller]
    fn shfl(v: f32, lanes: u32) -> f32 {
        f32::from_bits(warp::shfl_xor(v.to_bits(), lanes))
    }

    impl Values {
        /// Largest magnitude; NaN is passed over.
        #[inline(always)]
        #[track_caller]
        fn abs_max(self) -> f32 {
            let a = self.v.map(math::fabs);
            // Zero first: where all are NaN, it stays.
            let amax = math::fmax(math::fmax(math::fmax(0.0, a[0]), a[1]), math::fmax(a[2], a[3]));
            of_lanes(amax, |v, lanes| math::fmax(v, shfl(v, lanes)))
        }

        /// The first of the values that `f` accepts, as its index and sign bit; `u32::MAX` if there is none.
        #[inline(always)]
        #[track_caller]
        fn first(self, f: impl Fn(f32) -> bool) -> u32 {
            let mut first = u32::MAX;
            unroll!(J in 0..4 {
                let here = (4 * self.lane + J as u32) << 1 | self.v[J].to_bits() >> 31;
                if f(self.v[J]) && here < first {
                    first = here;
                }
            });
            of_lanes(first, |v, lanes| v.min(warp::shfl_xor(v, lanes)))
        }

        /// The first value of largest magnitude, with its sign; 0 for a block of zeros.
        #[inline(always)]
        #[track_caller]
        fn extreme(self) -> f32 {
            let amax = self.abs_max();
            let first = self.first(|v| math::fabs(v) == amax);
            if amax == 0.0 || first == u32::MAX {
                0.0
            } else if first & 1 == 1 {
                -amax
            } else {
                amax
            }
        }

        /// Smallest and largest value; of zeros the first counts.
        #[inline(always)]
        #[track_caller]
        fn range(self) -> (f32, f32) {
            let fold = |start: f32, f: fn(f32, f32) -> f32| {
                let v = self.v.iter().fold(start, |m, &v| f(m, v));
                of_lanes(v, |v, lanes| f(v, shfl(v, lanes)))
            };
            let (min, max) = (fold(f32::MAX, math::fmin), fold(-f32::MAX, math::fmax));
            let zero = self.first(|v| v == 0.0);
            let signed = |limit: f32| match limit {
                0.0 if zero == u32::MAX => limit,
                0.0 => f32::from_bits(zero << 31),
                _ => limit,
            };
            (signed(min), signed(max))
        }
    }

    /// Where a block's bytes go: 16 bits at a time, since blocks lie at multiples of 2.
    #[derive(Clone, Copy)]
    struct Place {
        block: Glb<u16>,
        inside: bool,
    }

    impl Place {
        #[inline(always)]
        #[track_caller]
        fn half(self, i: u32, value: u16, when: bool) {
            if self.inside && when {
                self.block.st(i, value);
            }
        }

        /// A word at half `i`.
        #[inline(always)]
        #[track_caller]
        fn word(self, i: u32, value: u32, when: bool) {
            self.half(i, value as u16, when);
            self.half(i + 1, (value >> 16) as u16, when);
        }
    }

    /// Stores nibbles (and fifth bits) of codes, the nibbles from half `start + FIFTH · 2` on, low ones first: byte i
    /// has the codes i and i + 16.
    #[inline(always)]
    #[track_caller]
    fn store_codes(codes: [u32; 4], lane: u32, place: Place, start: u32, fifth: bool) {
        let mut nibbles = 0;
        let mut high = 0;
        unroll!(J in 0..4 {
            nibbles |= (codes[J] & 0xf) << (8 * J);
            high |= (codes[J] >> 4 & 1) << (4 * lane + J as u32);
        });
        let of_half = warp::shfl_xor(nibbles, LANES / 2);
        let mut qs = start;
        if fifth {
            let bits = of_lanes(high, |v, lanes| v | warp::shfl_xor(v, lanes));
            place.word(start, bits, lane == 0);
            qs += 2;
        }
        place.word(qs + 2 * lane, nibbles | of_half << 4, lane < LANES / 2);
    }

    /// A block format's encoder.
    pub(crate) trait Encoder {
        /// Bytes of a block.
        const BYTES: usize;
        /// Encodes the block at `x`, of which `v` is this lane's part; eight lanes call together.
        fn encode(v: [f32; 4], x: Glb<f32>, lane: u32, block: Glb<u16>, inside: bool);
    }

    pub(crate) struct Q8_0;
    impl Encoder for Q8_0 {
        const BYTES: usize = 34;
        #[inline(always)]
        #[track_caller]
        fn encode(v: [f32; 4], _: Glb<f32>, lane: u32, block: Glb<u16>, inside: bool) {
            let (values, place) = (Values { v, lane }, Place { block, inside });
            let d = values.abs_max() / 127.0;
            let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
            let codes = v.map(|v| round_half_away(mul(v, inverse)) as u32 & 0xff);
            place.half(0, f32_to_f16(d), lane == 0);
            place.word(1 + 2 * lane, codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24, true);
        }
    }

    /// Q4_0, Q5_0: the value of largest magnitude takes code 0, `HALF` is zero.
    pub(crate) struct Symmetric<const HALF: u32>;
    impl<const HALF: u32> Encoder for Symmetric<HALF> {
        const BYTES: usize = if HALF == 16 { 22 } else { 18 };
        #[inline(always)]
        #[track_caller]
        fn encode(v: [f32; 4], _: Glb<f32>, lane: u32, block: Glb<u16>, inside: bool) {
            let (values, place) = (Values { v, lane }, Place { block, inside });
            let d = values.extreme() / -(HALF as f32);
            let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
            let code = |v: f32| (mul(v, inverse) + (HALF as f32 + 0.5)) as i32;
            let codes = v.map(|v| code(v).clamp(0, 2 * HALF as i32 - 1) as u32);
            place.half(0, f32_to_f16(d), lane == 0);
            store_codes(codes, lane, place, 1, HALF == 16);
        }
    }

    /// Q4_1, Q5_1: codes up to `MAX` span the block's range.
    pub(crate) struct Range<const MAX: u32>;
    impl<const MAX: u32> Encoder for Range<MAX> {
        const BYTES: usize = if MAX == 31 { 24 } else { 20 };
        #[inline(always)]
        #[track_caller]
        fn encode(v: [f32; 4], _: Glb<f32>, lane: u32, block: Glb<u16>, inside: bool) {
            let (values, place) = (Values { v, lane }, Place { block, inside });
            let (min, max) = values.range();
            let d = (max - min) / MAX as f32;
            let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
            let code = |v: f32| (mul(v - min, inverse) + 0.5) as i32;
            let codes = v.map(|v| code(v).clamp(0, MAX as i32) as u32);
            place.half(0, f32_to_f16(d), lane == 0);
            place.half(1, f32_to_f16(min), lane == 0);
            store_codes(codes, lane, place, 2, MAX == 31);
        }
    }

    /// Between each value of the codebook and the next, and the step to it; nothing after the last.
    const STEPS: [(f32, f32); 16] = {
        let (mut steps, mut i) = ([(f32::INFINITY, 0.0); 16], 0);
        while i < 15 {
            let (low, high) = (IQ4[i] as f32, IQ4[i + 1] as f32);
            steps[i] = ((low + high) * 0.5, high - low);
            i += 1;
        }
        steps
    };

    /// The codebook's value nearest to `x`, the upper one of two equally near.
    #[inline(always)]
    fn nearest_value(x: f32) -> f32 {
        let mut value = IQ4[0] as f32;
        unroll!(I in 0..16 {
            let (middle, step) = STEPS[I];
            value += if x < middle { 0.0 } else { step };
        });
        value
    }

    /// Its index.
    #[inline(always)]
    fn nearest(x: f32) -> u32 {
        let mut index = 0;
        unroll!(I in 0..16 {
            index += if x < STEPS[I].0 { 0 } else { (I < 15) as u32 };
        });
        index
    }

    /// Σ w·q·x and Σ w·q² over a block at an inverse scale, in order; w is x².
    #[inline(always)]
    #[track_caller]
    fn error_sums(x: Glb<f32>, inverse: f32) -> [f32; 2] {
        let (mut sum_qx, mut sum_q2) = (0.0f32, 0.0f32);
        let elems = math::opaque(32);
        let mut i = 0;
        while i < elems {
            let x = x.ld_nc(i);
            let q = nearest_value(mul(inverse, x));
            let weighted = mul(mul(x, x), q);
            sum_qx += mul(weighted, x);
            sum_q2 += mul(weighted, q);
            i += 1;
        }
        [sum_qx, sum_q2]
    }

    pub(super) struct Iq4Nl;
    impl Encoder for Iq4Nl {
        const BYTES: usize = 18;
        #[inline(always)]
        #[track_caller]
        fn encode(v: [f32; 4], x: Glb<f32>, lane: u32, block: Glb<u16>, inside: bool) {
            let (values, place) = (Values { v, lane }, Place { block, inside });
            let (amax, extreme) = (values.abs_max(), values.extreme());
            // Sixteen scales, two per lane: the one that puts the extreme on the first value, and seven to either side.
            let first = IQ4[0] as f32;
            let inverse = |t: u32| match t {
                0 => 1.0 / (-extreme / first),
                t => ((t as i32 - 8) as f32 + first) / extreme,
            };
            let mine = [error_sums(x, inverse(lane)), error_sums(x, inverse(lane + LANES))];
            let group = thread::lane_id() - lane;
            let sums = |t: u32| {
                let of = if t < LANES { mine[0] } else { mine[1] };
                of.map(|v| f32::from_bits(warp::shfl(v.to_bits(), group + t % LANES)))
            };
            let [sum_qx, sum_q2] = sums(0);
            let mut scale = if sum_q2 > 0.0 { sum_qx / sum_q2 } else { 0.0 };
            let mut best = mul(scale, sum_qx);
            let mut t = 1;
            while t < 2 * LANES {
                let [sum_qx, sum_q2] = sums(t);
                if sum_q2 > 0.0 && mul(sum_qx, sum_qx) > mul(best, sum_q2) {
                    scale = sum_qx / sum_q2;
                    best = mul(scale, sum_qx);
                }
                t += 1;
            }
            let scale = if amax < ZERO_MAX { 0.0 } else { scale };
            let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
            place.half(0, f32_to_f16(scale), lane == 0);
            store_codes(v.map(|v| nearest(mul(inverse, v))), lane, place, 1, false);
        }
    }

    /// The row that row `r` goes to.
    #[inline(always)]
    #[track_caller]
    fn target(ids: Glb<i32>, wide: u32, r: u32) -> i32 {
        // The low half of a 64-bit id will do: rows are fewer than 2^31, and −1 is negative in both halves.
        if ids.is_null() { r as i32 } else { ids.ld_nc(r << wide) }
    }

    #[inline(always)]
    pub(super) fn blocks<E: Encoder>(
        src: Glb<F32x4>,
        ids: Glb<i32>,
        dst: Glb<u16>,
        n_rows: u32,
        n: u32,
        wide: u32,
    ) {
        let (index, lane) = (thread::index_1d() / LANES, thread::index_1d() % LANES);
        let (per_row, last) = (n / 32, n_rows * (n / 32) - 1);
        // Lanes past the end encode the last block, for the shuffles, and store nothing.
        let block = if index <= last { index } else { last };
        let to = target(ids, wide, block / per_row);
        let v = src.ld_nc(block * LANES + lane).0;
        let row = if to < 0 { 0 } else { to as usize };
        let at = row * per_row as usize + (block % per_row) as usize;
        let x = src.cast::<f32>().offset(block as usize * 32);
        E::encode(v, x, lane, dst.offset(at * (E::BYTES / 2)), index <= last && to >= 0);
    }

    #[inline(always)]
    pub(super) fn floats<T: Output>(
        src: Glb<F32x4>,
        ids: Glb<i32>,
        dst: Glb<u16>,
        n_rows: u32,
        n: u32,
        wide: u32,
    ) {
        let n4 = n / 4;
        let spans = n4.div_ceil(SPAN4);
        let index = thread::index_1d() / 32;
        let (r, span) = (index / spans, index % spans);
        // A whole warp leaves.
        if r >= n_rows {
            return;
        }
        let to = target(ids, wide, r);
        if to < 0 {
            return;
        }
        let v = read(src.offset(r as usize * n4 as usize), span, n4, 0.0);
        let row = dst.offset(to as usize * n as usize * (T::BYTES / 2));
        T::store(v, 1.0, row.cast(), Glb::<U32x2>::NULL, span * SPAN4, n4);
    }

    kernels! {
        in "set_rows";
        pub(super) ENTRIES: threads(128);
        fn (src: Glb<F32x4>, ids: Glb<i32>, dst: Glb<u16>, n_rows: u32, n: u32, wide: u32);
        "set_rows_F32" => floats::<f32>;
        "set_rows_F16" => floats::<f16>;
        "set_rows_BF16" => floats::<bf16>;
        "set_rows_Q8_0" => blocks::<Q8_0>;
        "set_rows_Q4_0" => blocks::<Symmetric<8>>;
        "set_rows_Q4_1" => blocks::<Range<15>>;
        "set_rows_Q5_0" => blocks::<Symmetric<16>>;
        "set_rows_Q5_1" => blocks::<Range<31>>;
        "set_rows_IQ4_NL" => blocks::<Iq4Nl>;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod host {
    use alloc::{boxed::Box, vec, vec::Vec};

    use quant::FormatId;

    use super::{LANES, THREADS};
    use crate::case::{Buffer, Expected, Kernel, Problem, Random, bytes_of};
    use crate::kernels::output::SPAN4;
    use crate::kernels::peer;
    use crate::launch::{Check, DevicePtr, Launch, LaunchError, Params};

    /// Width of the row numbers.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Ids {
        /// None: row r goes to row r.
        None,
        /// i32.
        I32(DevicePtr),
        /// i64.
        I64(DevicePtr),
    }

    /// Arguments; see the contract.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Args {
        pub to: FormatId,
        pub src: DevicePtr,
        pub ids: Ids,
        pub dst: DevicePtr,
        pub n_rows: usize,
        pub n: usize,
    }

    /// One launch for all rows.
    pub fn launch(args: &Args) -> Result<Launch, LaunchError> {
        let kernel = SetRows::NAME;
        let check = Check(kernel);
        let (entry, is_float) = match args.to {
            FormatId::F32 => ("set_rows_F32", true),
            FormatId::F16 => ("set_rows_F16", true),
            FormatId::BF16 => ("set_rows_BF16", true),
            FormatId::Q8_0 => ("set_rows_Q8_0", false),
            FormatId::Q4_0 => ("set_rows_Q4_0", false),
            FormatId::Q4_1 => ("set_rows_Q4_1", false),
            FormatId::Q5_0 => ("set_rows_Q5_0", false),
            FormatId::Q5_1 => ("set_rows_Q5_1", false),
            FormatId::IQ4_NL => ("set_rows_IQ4_NL", false),
            format => return Err(LaunchError::Format { kernel, format }),
        };
        let (n_rows, n) = (check.size("n_rows", args.n_rows)?, check.size("n", args.n)?);
        check.size("n_rows * n", args.n_rows.saturating_mul(args.n))?;
        if is_float {
            check.multiple("n", args.n, 4, "a multiple of 4")?;
        } else {
            check.multiple("n", args.n, 32, "a multiple of 32")?;
        }
        let (ids, wide) = match args.ids {
            Ids::None => (DevicePtr::NULL, 0u32),
            Ids::I32(at) => (at, 0),
            Ids::I64(at) => (at, 1),
        };
        for (what, at, align) in [("src", args.src, 16), ("ids", ids, 4 << wide), ("dst", args.dst, 16)] {
            check.aligned(what, at, align)?;
        }
        let lanes = if is_float {
            check.size("spans", 32 * args.n_rows * n.div_ceil(4 * SPAN4) as usize)?
        } else {
            n_rows * (n / 32) * LANES
        };
        let params = Params::new().with(args.src).with(ids).with(args.dst);
        Ok(Launch {
            entry,
            grid: [lanes.div_ceil(THREADS), 1, 1],
            cta: THREADS,
            cluster: 1,
            smem_bytes: 0,
            params: params.with(n_rows).with(n).with(wide),
        })
    }

    /// The definition of a row: `quant`'s own encoder.
    pub fn reference(to: FormatId, src: &[f32]) -> Vec<u8> {
        let bytes = quant::row::row_bytes(to, src.len()).expect("cases have whole blocks");
        let mut row = vec![0; bytes];
        quant::row::encode(to, src, None, &mut row).expect("cases name formats that can be encoded");
        row
    }

    /// The row in the registry.
    #[derive(Debug)]
    pub struct SetRows;

    /// How a case numbers its rows.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Order {
        /// No ids.
        Same,
        /// i32, backwards, with a row left out.
        Backwards,
        /// i64, backwards, with a row left out.
        BackwardsWide,
    }

    /// One case.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)] // the contract's names
    pub struct Case {
        pub to: FormatId,
        pub n_rows: usize,
        pub n: usize,
        pub order: Order,
    }

    const fn case(to: FormatId, n_rows: usize, n: usize, order: Order) -> Case {
        Case { to, n_rows, n, order }
    }

    impl Kernel for SetRows {
        const NAME: &'static str = "set_rows";
        type Case = Case;
        const CASES: &'static [Case] = &[
            case(FormatId::F32, 3, 260, Order::Backwards),
            case(FormatId::F16, 5, 576, Order::BackwardsWide),
            case(FormatId::BF16, 2, 4, Order::Same),
            case(FormatId::Q8_0, 5, 96, Order::Backwards),
            case(FormatId::Q8_0, 1, 1024, Order::Same),
            case(FormatId::Q4_0, 3, 128, Order::Same),
            case(FormatId::Q4_0, 7, 64, Order::BackwardsWide),
            case(FormatId::Q4_1, 3, 544, Order::Backwards),
            case(FormatId::Q5_0, 3, 512, Order::Same),
            case(FormatId::Q5_1, 3, 512, Order::Backwards),
            case(FormatId::IQ4_NL, 4, 160, Order::Same),
        ];
        const NMSE_MAX: f64 = 0.0;
        const BENCH: &'static [Case] = &[
            case(FormatId::F16, 4096, 1024, Order::Backwards),
            case(FormatId::Q8_0, 4096, 1024, Order::Backwards),
            case(FormatId::Q4_0, 4096, 1024, Order::Backwards),
            case(FormatId::Q4_0, 1024, 8192, Order::Backwards),
        ];
        #[cfg(feature = "emu")]
        const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::gpu::ENTRIES];

        fn problem(case: &Case, random: &mut Random) -> Problem {
            let Case { to, n_rows, n, order } = *case;
            let mut x = random.values(n_rows * n);
            if n >= 64 {
                // A block of zeros of both signs, one too small for any scale, two of equal magnitude.
                x[..32].fill(0.0);
                x[5] = -0.0;
                x[32..64].iter_mut().for_each(|v| *v *= 1e-30);
                let last = n_rows * n - 32;
                (x[last + 3], x[last + 9]) = (-9.0, 9.0);
                x[last - 32..last].iter_mut().for_each(|v| *v = v.abs());
                (x[last - 20], x[last - 10]) = (-0.0, 0.0);
            }
            // One row more than there are sources: the one that no id names keeps its bytes.
            let left_out = if order == Order::Same { n_rows } else { 1 };
            let target = |r: usize| match order {
                Order::Same => r as i64,
                _ if r == n_rows - 1 - left_out.min(n_rows - 1) && n_rows > 2 => -1,
                _ => (n_rows - 1 - r) as i64,
            };
            let targets: Vec<i64> = (0..n_rows).map(target).collect();
            let row_bytes = quant::row::row_bytes(to, n).expect("cases have whole blocks");
            let before = vec![0xa5; n_rows * row_bytes];
            let mut after = before.clone();
            for (row, &to_row) in x.chunks(n).zip(&targets) {
                if let Ok(to_row) = usize::try_from(to_row) {
                    after[to_row * row_bytes..][..row_bytes].copy_from_slice(&reference(to, row));
                }
            }
            let ids = match order {
                Order::BackwardsWide => bytes_of(&targets),
                _ => bytes_of(&targets.iter().map(|&t| t as i32).collect::<Vec<_>>()),
            };
            Problem {
                buffers: vec![
                    Buffer::Input(bytes_of(&x)),
                    Buffer::Input(ids),
                    Buffer::Changed(before, Expected::Exact(after)),
                ],
                launches: Box::new(move |at| {
                    let ids = match order {
                        Order::Same => Ids::None,
                        Order::Backwards => Ids::I32(at[1]),
                        Order::BackwardsWide => Ids::I64(at[1]),
                    };
                    Ok(vec![launch(&Args { to, src: at[0], ids, dst: at[2], n_rows, n })?])
                }),
            }
        }

        fn peer(case: &Case) -> Option<alloc::string::String> {
            // ggml's has no ids.
            let same = (case.n_rows, case.n) == (1024, 8192);
            same.then(|| peer::copy(FormatId::F32, case.to, [8192, 512, 2, 1], [0; 4]))
        }

        fn bytes(case: &Case) -> u64 {
            let to = quant::info(case.to);
            (case.n_rows * case.n * 4 + case.n_rows * case.n / to.elems * to.bytes) as u64
        }

        fn flops(case: &Case) -> u64 {
            let each = if case.to == FormatId::IQ4_NL { 600 } else { 4 };
            each * (case.n_rows * case.n) as u64
        }
    }
}
