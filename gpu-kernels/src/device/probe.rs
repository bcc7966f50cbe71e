//! One kernel that calls every instruction of the device layer that no kernel uses yet, so that each tier's PTX proves
//! that it compiles and assembles; the products of warpgroups in one of their own. Never launched.

use super::sync;
#[cfg(sm_ge_80)]
use super::sync::Mbarrier;
#[cfg(sm_90a)]
use super::wgmma::{self, Operand, Registers, Sums};
use super::{Glb, Smem, U32x4, async_copy, atomic, math, mma, thread, warp};

kernels! {
    in "device_checks";
    PROBE: threads(64);
    fn (memory: Glb<u32>, x: u32);
    "probe_device_layer" => probe;
}

#[inline(always)]
fn probe(memory: Glb<u32>, x: u32) {
    let words = Smem::<u32>::dynamic(0, 64);
    let vectors = Smem::<U32x4>::dynamic(256, 64);
    let lane = thread::lane_id();
    let mut value = x + thread::block_idx_z() + thread::grid_dim_y();

    value += warp::shfl_up(value, 1) + warp::shfl_down(value, 2) + warp::ballot(value > 3);
    value = value.wrapping_add(warp::sum_i32(value as i32) as u32);
    value ^= math::prmt(value, x, 0x5140) ^ math::dp4a(value, x, 1) as u32;
    value ^= math::fmin(f32::from_bits(value), math::rcp(f32::from_bits(x))).to_bits();
    #[cfg(sm_ge_75)]
    {
        value ^= warp::match_any(value);
    }

    value ^= atomic::add_global(memory, 0, value) ^ atomic::max_global(memory, 1, value);
    value ^= atomic::compare_swap_global(memory, 2, x, value);
    atomic::add_global_f32(memory.cast(), 3, f32::from_bits(value));
    words.st(lane, value);
    warp::sync_warp();
    value ^= atomic::add_shared(words, lane ^ 1, 1);

    async_copy::copy16(vectors, lane, memory.cast(), lane);
    async_copy::copy16_or_zero(vectors, lane + 32, memory.cast(), lane, x > 3);
    async_copy::commit();
    async_copy::wait::<0>();
    sync::sync_threads();
    if thread::warp_id() == 0 {
        sync::barrier_arrive::<1>(64);
    } else {
        sync::barrier::<1>(64);
    }

    let [a, b, ..] = mma::load_x4(vectors, lane);
    let [.., c, d] = mma::load_x4_transposed(vectors, lane);
    value ^= a ^ b ^ c ^ d;
    let (a, b) = (mma::FragmentA([value, x, value, x]), mma::FragmentB([x, value]));
    let mut floats = mma::FragmentF32::default();
    mma::mma_f16(&mut floats, a, b);
    mma::mma_bf16(&mut floats, a, b);
    value ^= floats.0[0].to_bits() ^ floats.0[3].to_bits();
    #[cfg(sm_ge_80)]
    {
        let mut ints = mma::FragmentI32::default();
        mma::mma_s8(&mut ints, a, b);
        value ^= (ints.0[1] ^ ints.0[2]) as u32;

        let barrier = Mbarrier::at(words.cast(), 0);
        barrier.init(64);
        sync::sync_threads();
        barrier.arrive();
        barrier.wait(0);
    }
    memory.st(thread::index_1d(), value);
}

#[cfg(sm_90a)]
kernels! {
    in "device_checks";
    PROBE_WGMMA: threads(128, 1);
    fn (memory: Glb<u32>, x: u32);
    "probe_wgmma" => probe_wgmma;
}

#[cfg(sm_90a)]
#[inline(always)]
fn probe_wgmma(memory: Glb<u32>, x: u32) {
    let (vectors, barrier) = (Smem::<U32x4>::dynamic(1024, 1024), Mbarrier::at(Smem::dynamic(0, 1), 0));
    sync::wait_for_previous_kernel();
    warp::give_registers::<128>();
    warp::take_registers::<168>();
    barrier.init(1);
    barrier.arrive_expect(16);
    super::bulk_copy::copy(vectors, 0, memory.cast(), 0, 1, barrier);
    barrier.wait(0);
    sync::fence_async_proxy();
    let (a, b) = (Operand::at(vectors, 0), Operand::at(vectors, 512));
    let fragment = mma::FragmentA([x; 4]);
    let mut value = x;
    macro_rules! products {
        ($registers:literal: $($name:ident)*) => {
            $({
                let mut sums = Sums::<$registers>::zero();
                wgmma::fence();
                // Adding: a product that sets its sums makes ptxas spill here, between shapes, as in no kernel.
                wgmma::$name::shared::<true>(&mut sums, a, b);
                wgmma::$name::registers::<true>(&mut sums, fragment, b.skip(2));
                wgmma::commit();
                sums.wait::<0>();
                let mut i = 0;
                while i < $registers {
                    value ^= sums.get(i);
                    i += 1;
                }
            })*
        };
    }
    products! { 32: S8N64 F16N64 Bf16N64 }
    products! { 64: S8N128 F16N128 Bf16N128 }
    sync::launch_next_kernel();
    memory.st(thread::index_1d(), value);
}
