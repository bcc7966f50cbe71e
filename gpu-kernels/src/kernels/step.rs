//! A step of one token as one launch: a persistent kernel that plays the launches of a plan, one after the other, from a
//! list in device memory.
//!
//! * The list has an [`Instruction`] per launch: which body, its grid, its arguments, and what of the weights of later
//!   launches to bring to L2 meanwhile. CTA c of G plays CTAs c, c + G, … of a launch; then the next launch. The bodies are
//!   the kernels' own functions: what `device/play.rs` says of grid, CTA and earlier launches is all that is other. So bits
//!   are those of the launches.
//! * A launch waits for all launches before it: each CTA that had a share in one adds 1 to a counter when it has played
//!   it. What a body loads before it waits (weights, a norm's, pages of the cache) is on its way while others still work.
//! * Geometry: [`THREADS`] threads, two CTAs to a multiprocessor, all at once (a cooperative launch). Bodies of fewer
//!   threads let the others idle; those of more work with fewer warps, where their results do not depend on it.
//! * A module per weight format, with the products of that format and of the one that files put beside it, RMS norm, cache
//!   and rotation, attention of head 64 and 128 over an F16 cache. [`entry`] says which module has most of a plan,
//!   [`covers`] what a module has; the rest of a plan is launched as ever.
//! * `counters`: two u32, zero before the launch and after it.
//! * Bytes and FLOPs: those of the launches.
//!
//! Done for speed: (1) no launch has to start: a boundary is a store, a fence, an atomic and a poll; (2) the memory never
//! waits for a boundary: up to [`AHEAD_BYTES`] of the weights that come next are asked of L2 where a CTA ends its share, so
//! that they arrive while attention or a norm is computed by few; (3) an instruction is in shared memory before it is
//! needed.

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;

/// Threads of a CTA.
pub const THREADS: u32 = 256;

/// Bytes of shared memory that bodies do not see: `device::play`'s.
const RESERVED_BYTES: u32 = 1024;

/// Words of an instruction: head, ranges of weights, arguments.
const HEAD_WORDS: u32 = 16;
const RANGES: u32 = 4;
const PARAM_WORDS: u32 = 48;
const WORDS: u32 = HEAD_WORDS + 4 * RANGES + PARAM_WORDS;

/// Where the words of a head are.
const KIND: u32 = 0;
const CTA_THREADS: u32 = 1;
/// Arrivals of all launches before.
const ARRIVALS: u32 = 2;
const N_CTAS: u32 = 3;
/// Three words.
const GRID: u32 = 4;

/// Bytes that a lane asks L2 for at a time.
const CHUNK_BYTES: u32 = 4096;

/// Calls a macro with the bodies that every module has: the kernel's entry, its arguments, its function. A body's place
/// in the list is its number, after the two products.
macro_rules! for_each_body {
    ($callback:ident) => {
        $callback! {
            "rms_norm_f32" 2 norm (f32);
            "rms_norm_Q8_0" 3 norm (Q8_0);
            "rms_norm_Q8_1" 4 norm (Q8_1);
            "rms_norm_Q8K" 5 norm (Q8K);
            "kv_store" 6 store ();
            "flash_decode_64_f16" 7 attention (3, 4, 2, 2);
            "flash_decode_128_f16" 8 attention (3, 8, 2, 4);
            "flash_merge" 9 merge ();
        }
    };
}

/// Calls a macro with each module: its entry, the format, and the one beside it.
macro_rules! for_each_module {
    ($callback:ident) => {
        $callback! {
            "step_Q4_0" Q4_0 q4_0 Q6_K q6_k;
            "step_Q4_1" Q4_1 q4_1 Q8_0 q8_0;
        }
    };
}

#[cfg(any(all(target_arch = "nvptx64", sm_ge_80), feature = "emu"))]
mod gpu {
    use quant::{BlockFormat, formats};

    use super::{ARRIVALS, CHUNK_BYTES, CTA_THREADS, GRID, HEAD_WORDS, KIND, N_CTAS, RANGES, WORDS};
    use crate::device::{F32x2, F32x4, Glb, Smem, U32x2, U32x4, async_copy, atomic, play, thread};
    use crate::kernels::flash::{Half, attend, merge};
    use crate::kernels::kv_store::gpu::kv_store;
    use crate::kernels::mmvq::Shape;
    use crate::kernels::mmvq_column::mmvq_column;
    use crate::kernels::output::gpu::{Q8_0, Q8_1, Q8K};
    use crate::kernels::product::{Gate, Part, PartAt};
    use crate::kernels::rms_norm::gpu::row_per_cta;
    use crate::tile::Tiled;

    const _: () = {
        assert!(play::RESERVED_BYTES == super::RESERVED_BYTES);
        assert!(play::ROLE_BYTES + 2 * 4 * WORDS <= play::RESERVED_BYTES);
    };

    /// An instruction in shared memory.
    #[derive(Clone, Copy)]
    struct Slot(Smem<u32>);

    /// A part of a product, read when it is needed: three would take half the registers.
    #[derive(Clone, Copy)]
    struct SlotPart(Smem<u32>);

    impl PartAt for SlotPart {
        #[inline(always)]
        fn part(self) -> Part {
            Part::of_words(|i| self.0.ld_still(i))
        }
    }

    /// An argument out of a slot.
    trait Take {
        fn take(slot: Slot, at: &mut u32) -> Self;
    }

    impl Take for SlotPart {
        #[inline(always)]
        fn take(slot: Slot, at: &mut u32) -> SlotPart {
            const WORDS: u32 = (size_of::<Part>() / 4) as u32;
            let first = at.next_multiple_of(2);
            *at = first + WORDS;
            SlotPart(slot.0.skip(HEAD_WORDS + 4 * RANGES + first))
        }
    }

    impl<T: bytemuck::Pod> Take for T {
        #[inline(always)]
        fn take(slot: Slot, at: &mut u32) -> T {
            let words = (align_of::<T>() / 4) as u32;
            let first = at.div_ceil(words) * words;
            *at = first + (size_of::<T>() / 4) as u32;
            // No loop: a value written word by word in one would lie in local memory.
            macro_rules! words {
                ($($i:literal)*) => { bytemuck::cast([$(slot.word(HEAD_WORDS + 4 * RANGES + first + $i)),*]) };
            }
            match const { size_of::<T>() / 4 } {
                1 => words!(0),
                2 => words!(0 1),
                3 => words!(0 1 2),
                4 => words!(0 1 2 3),
                _ => panic!("an argument of another size"),
            }
        }
    }

    impl Slot {
        /// The place of instruction `i`: two take turns.
        #[inline(always)]
        fn of(i: u32) -> Slot {
            Slot(play::reserved(play::ROLE_BYTES + i % 2 * 4 * WORDS, WORDS))
        }

        /// Starts the copy of instruction `i`. The CTA calls together.
        #[inline(always)]
        #[track_caller]
        fn copy(self, list: Glb<U32x4>, i: u32) {
            let tid = thread::thread_idx_x();
            if tid < WORDS / 4 {
                async_copy::copy16(self.0.cast(), tid, list, i * (WORDS / 4) + tid);
            }
        }

        #[inline(always)]
        #[track_caller]
        fn word(self, i: u32) -> u32 {
            self.0.ld_still(i)
        }

        /// [`Slot::word`], read here and kept nowhere.
        #[inline(always)]
        #[track_caller]
        fn now(self, i: u32) -> u32 {
            self.0.ld(i)
        }
    }

    /// Calls a function with the arguments of a slot.
    macro_rules! call {
        ($slot:expr, $f:expr, ($($arg:ident: $ty:ty),* $(,)?)) => {{
            let mut at = 0;
            $(let $arg = <$ty as Take>::take($slot, &mut at);)*
            let _ = at;
            $f($($arg),*)
        }};
    }

    /// The bodies' signatures, as their own tables have them.
    macro_rules! body {
        (product $slot:ident $format:ty) => {
            call!($slot, mmvq_column::<$format, SlotPart>, (
                p0: SlotPart, p1: SlotPart, p2: SlotPart, q: Glb<U32x4>, scales: Glb<U32x2>, ids: Glb<u32>, gate: Gate, shape: Shape,
                norm: Glb<F32x4>, eps: f32,
            ))
        };
        (norm $slot:ident ($output:ty)) => {
            call!($slot, row_per_cta::<$output>, (
                x: Glb<F32x4>, residual: Glb<F32x4>, h: Glb<F32x4>, weight: Glb<F32x4>, add: Glb<F32x4>, y: Glb<u32>,
                scales: Glb<U32x2>, n_rows: u32, n4: u32, eps: f32,
            ))
        };
        (store $slot:ident ()) => {
            call!($slot, store, (
                k: Glb<f32>, v: Glb<f32>, cells: Glb<u32>, cache_k: Glb<u8>, cache_v: Glb<u8>,
                n_head_kv: u32, head_dim_k: u32, head_dim_v: u32, format_k: u32, format_v: u32,
                row_bytes_k: u32, row_bytes_v: u32,
                table: Glb<F32x2>, q: Glb<f32>, q_out: Glb<f32>, n_head: u32, n_rot: u32, neox: u32,
            ))
        };
        (attention $slot:ident ($stages:literal, $ks:literal, $ns:literal, $no:literal)) => {
            call!($slot, attend::<Half, $stages, $ks, $ns, $no, 4, 1>, (
                q: Glb<F32x2>, k: Glb<u8>, v: Glb<u8>, out: Glb<F32x2>, scratch: Glb<F32x2>,
                positions: Glb<u32>, token_sequences: Glb<u32>, sequences: Glb<U32x2>, pages: Glb<u32>,
                sinks: Glb<f32>, slopes: Glb<f32>,
                n_tokens: u32, n_head: u32, n_head_kv: u32, head_dim_k: u32, head_dim_v: u32,
                row_bytes_k: u32, row_bytes_v: u32, format_k: u32, format_v: u32,
                flags: u32, window: u32, scale: f32, softcap: f32, n_spans: u32,
            ))
        };
        (merge $slot:ident ()) => {
            call!($slot, merge, (
                scratch: Glb<F32x2>, out: Glb<f32>, positions: Glb<u32>, token_sequences: Glb<u32>, sequences: Glb<U32x2>,
                sinks: Glb<f32>, n_head: u32, head_dim: u32, flags: u32, window: u32, n_spans: u32,
            ))
        };
    }

    /// The cache's kernel, which leaves the wait to its entry.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // the entry's
    fn store(
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
    ) {
        crate::device::grid::wait_for_earlier();
        kv_store(
            k,
            v,
            cells,
            cache_k,
            cache_v,
            n_head_kv,
            head_dim_k,
            head_dim_v,
            format_k,
            format_v,
            row_bytes_k,
            row_bytes_v,
            table,
            q,
            q_out,
            n_head,
            n_rot,
            neox,
        );
    }

    macro_rules! play {
        ($($entry:literal $number:literal $body:ident $args:tt;)*) => {
            /// Plays one CTA of the slot's launch.
            #[inline(always)]
            #[track_caller]
            fn body<A: BlockFormat + Tiled, B: BlockFormat + Tiled>(kind: u32, slot: Slot) {
                match kind {
                    0 => body!(product slot A),
                    1 => body!(product slot B),
                    $($number => body!($body slot $args),)*
                    _ => crate::device::grid::wait_for_earlier(),
                }
            }
        };
    }
    for_each_body!(play);

    /// Asks L2 for the CTA's share of the slot's ranges: chunks are dealt out in turn. A warp calls together.
    #[inline(always)]
    #[track_caller]
    fn prefetch(slot: Slot) {
        let mut range = 0;
        while range < RANGES {
            let at = HEAD_WORDS + 4 * range;
            let bytes = slot.word(at + 2);
            if bytes == 0 {
                return;
            }
            let mut words = at;
            let from: Glb<u8> = slot_address(slot, &mut words);
            let mut chunk = thread::launch_idx() + thread::launch_dim() * thread::lane_id();
            while chunk < bytes.div_ceil(CHUNK_BYTES) {
                let first = chunk * CHUNK_BYTES;
                let left = bytes - first;
                from.offset(first as usize).prefetch(if left < CHUNK_BYTES { left } else { CHUNK_BYTES });
                chunk += 32 * thread::launch_dim();
            }
            range += 1;
        }
    }

    /// The address in two words of a slot.
    #[inline(always)]
    #[track_caller]
    fn slot_address(slot: Slot, at: &mut u32) -> Glb<u8> {
        let address = u64::from(slot.word(*at)) | u64::from(slot.word(*at + 1)) << 32;
        Glb::NULL.offset(address as usize)
    }

    #[inline(always)]
    fn step<A: BlockFormat + Tiled, B: BlockFormat + Tiled>(list: Glb<U32x4>, counters: Glb<u32>, n: u32) {
        Slot::of(0).copy(list, 0);
        async_copy::commit();
        let mut i = 0;
        while i < n {
            async_copy::wait::<0>();
            // The instruction is there, and everyone is done with the one before.
            play::sync_all();
            if i + 1 < n {
                Slot::of(i + 1).copy(list, i + 1);
            }
            async_copy::commit();
            let slot = Slot::of(i);
            let mut cta = thread::launch_idx();
            if cta < slot.word(N_CTAS) {
                // Nothing of the instruction stays in registers while a body runs.
                while thread::thread_idx_x() < slot.now(CTA_THREADS) && cta < slot.now(N_CTAS) {
                    let grid = [slot.now(GRID), slot.now(GRID + 1), slot.now(GRID + 2)];
                    let [x, y, _] = grid;
                    let idx = [cta % x, cta / x % y, cta / x / y];
                    let arrivals = if cta < thread::launch_dim() { slot.now(ARRIVALS) } else { 0 };
                    let threads = slot.now(CTA_THREADS);
                    play::enter(play::Role { idx, grid, threads, arrivals, counter: counters });
                    body::<A, B>(slot.now(KIND), slot);
                    play::leave();
                    cta += thread::launch_dim();
                }
                play::arrive(counters);
            }
            if thread::warp_id() == 1 {
                prefetch(slot);
            }
            i += 1;
        }
        async_copy::wait::<0>();
        // Whoever comes last puts the counters back: everyone else has waited for the last time.
        if thread::thread_idx_x() == 0 && atomic::add_ordered(counters, 1, 1) + 1 == thread::launch_dim() {
            reset(counters, 0);
            reset(counters, 1);
        }
    }

    /// Sets a counter that nobody changes any more to 0.
    #[inline(always)]
    #[track_caller]
    fn reset(counters: Glb<u32>, i: u32) {
        let now = atomic::max_global(counters, i, 0);
        atomic::add_global(counters, i, now.wrapping_neg());
    }

    macro_rules! entries {
        ($($entry:literal $a:ident $a_module:ident $b:ident $b_module:ident;)*) => {
            kernels! {
                in "step";
                pub(super) ENTRIES: threads(256, 2), together;
                fn (list: Glb<U32x4>, counters: Glb<u32>, n: u32);
                $($entry => step::<formats::$a_module::Block, formats::$b_module::Block>;)*
            }
        };
    }
    for_each_module!(entries);
}

#[cfg(not(target_arch = "nvptx64"))]
mod host;
