//! Matrix products of a warpgroup, 128 threads that start at a multiple of 128, which run beside its threads (sm_90a).
//!
//! `sums = a · b` or `sums += a · b`: A has 64 rows, B `N` columns, both 32 bytes of k (32 bytes, 16 f16 or bf16) in rows
//! of k; or B, of two-byte elements, in rows of columns, where the shape's name ends in `T`. A thread's sums are `N / 2`
//! registers: of every eight columns in turn the four that `mma`'s accumulators give a lane, for the 16 rows of its warp
//! (`mma.rs`).
//!
//! A round is: [`fence`], products, [`commit`]; later `wait` with the sums that it ends. Between, neither sums nor
//! operands may be touched. Operands lie in shared memory ([`Operand`]) or, A, in registers ([`FragmentA`]).
//! Shared memory that threads have written needs [`fence_async_proxy`](super::sync::fence_async_proxy) by the writer, then
//! a barrier.
//!
//! Float sums: on Hopper both `mma`'s m16n8k16 and these add 16 products and the sum so far at once, aligned to the largest
//! exponent and cut (MMA-Sim, arXiv 2511.10909, models both by one function and has compared it with the hardware), so bits
//! are equal. `mmf_hopper`'s cases ask the GPU.

use super::mma::FragmentA;
use super::{Smem, U32x4};
#[cfg(not(target_arch = "nvptx64"))]
use crate::emu::{lane, wgmma as emu};
#[cfg(target_arch = "nvptx64")]
use {super::intrinsics, core::arch::asm};

/// 32 bytes of k of some rows in shared memory, in one of two layouts:
///
/// * [`Operand::at`]: rows of 128 bytes, eight of them a piece of 1024 bytes that starts at a multiple of 1024; in row r of
///   a piece 16-byte chunk c lies at place [`Operand::place`].
/// * [`Operand::cores`], [`Operand::planes`]: core matrices, 16-byte chunks of eight rows one after the other.
/// * [`Operand::transposed`]: sixteen rows of k in the first layout, for the shapes that take columns in a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Operand(u64);

impl Operand {
    /// No operand, for a place that a kernel's form does not use.
    pub const NONE: Operand = Operand(0);

    /// Where chunk `chunk` (0..8) of row `row` of an operand lies, in chunks.
    #[inline(always)]
    pub const fn place(row: u32, chunk: u32) -> u32 {
        8 * row + (chunk ^ (row % 8))
    }

    /// The operand whose first row's first chunk, of even number, would lie at element `i` if chunks were not permuted.
    #[inline(always)]
    #[track_caller]
    pub fn at(chunks: Smem<U32x4>, i: u32) -> Operand {
        // PTX, "Matrix descriptor": address; 1024 bytes from eight rows to the next; swizzle of 128 bytes.
        const LAYOUT: u64 = 1 << 62 | (1024 / 16) << 32 | 1 << 16;
        Operand(LAYOUT | u64::from((chunks.address(i) & 0x3_ffff) / 16))
    }

    /// A transposed B: row k's first eight columns would lie at element `i + 8 k` if chunks were not permuted, `i` at a
    /// multiple of 1024 bytes; columns 64 and following `stride` chunks on, and so forth.
    #[inline(always)]
    #[track_caller]
    pub fn transposed(chunks: Smem<U32x4>, i: u32, stride: u32) -> Operand {
        // PTX, "Matrix descriptor": address; 1024 bytes from eight k to the next; swizzle of 128 bytes.
        const LAYOUT: u64 = 1 << 62 | (1024 / 16) << 32;
        Operand(LAYOUT | u64::from(stride) << 16 | u64::from((chunks.address(i) & 0x3_ffff) / 16))
    }

    /// The operand whose first core matrix starts at element `i`: of every eight rows two, one after the other in k; those of
    /// the next eight rows `stride` chunks on.
    #[inline(always)]
    #[track_caller]
    pub fn cores(chunks: Smem<U32x4>, i: u32, stride: u32) -> Operand {
        // PTX, "Matrix descriptor": address; 128 bytes to the next core matrix in k; no swizzle.
        const LAYOUT: u64 = (128 / 16) << 16;
        Operand(LAYOUT | u64::from(stride) << 32 | u64::from((chunks.address(i) & 0x3_ffff) / 16))
    }

    /// The operand whose first core matrix starts at element `i`, those of the following rows right behind it; the second 16
    /// bytes of k, of all rows, start `in_k` chunks after the first.
    #[inline(always)]
    #[track_caller]
    pub fn planes(chunks: Smem<U32x4>, i: u32, in_k: u32) -> Operand {
        // PTX, "Matrix descriptor": address; 128 bytes to the next eight rows; no swizzle.
        const LAYOUT: u64 = (128 / 16) << 32;
        Operand(LAYOUT | u64::from(in_k) << 16 | u64::from((chunks.address(i) & 0x3_ffff) / 16))
    }

    /// The operand so many 16-byte chunks on. The address field does not overflow within shared memory.
    #[inline(always)]
    pub const fn skip(self, chunks: u32) -> Operand {
        Operand(self.0 + chunks as u64)
    }

    /// [`Operand::skip`] for where registers are short: the upper word stays the constant that it is.
    #[inline(always)]
    pub const fn step(self, chunks: u32) -> Operand {
        Operand(self.0 >> 32 << 32 | (self.0 as u32 + chunks) as u64)
    }
}

/// Registers that products write: `R` of them, bits of i32 or f32.
#[derive(Clone, Copy, Debug)]
pub struct Sums<const R: usize> {
    registers: [u32; R],
    /// The product that will write them.
    #[cfg(not(target_arch = "nvptx64"))]
    ticket: Option<u64>,
}

impl<const R: usize> Sums<R> {
    /// All zeros.
    #[inline(always)]
    pub fn zero() -> Sums<R> {
        Sums {
            registers: [0; R],
            #[cfg(not(target_arch = "nvptx64"))]
            ticket: None,
        }
    }

    /// Register `i`; the products that write it have been waited for.
    #[inline(always)]
    #[track_caller]
    pub fn get(&self, i: usize) -> u32 {
        #[cfg(not(target_arch = "nvptx64"))]
        if let Some(ticket) = self.ticket {
            // Not taken by a wait: a finding.
            return lane::wgmma_result(ticket)[i];
        }
        self.registers[i]
    }

    /// Sets register `i`; the products that write it have been waited for.
    #[inline(always)]
    #[track_caller]
    pub fn set(&mut self, i: usize, value: u32) {
        #[cfg(not(target_arch = "nvptx64"))]
        if let Some(ticket) = self.ticket {
            // Not taken by a wait: a finding.
            lane::wgmma_result(ticket);
        }
        self.registers[i] = value;
    }

    #[cfg(not(target_arch = "nvptx64"))]
    fn addend(&self) -> emu::Addend {
        match self.ticket {
            Some(ticket) => emu::Addend::Ticket(ticket),
            None => emu::Addend::Registers(self.registers.to_vec()),
        }
    }
}

twin! {
    /// Before the first product, and after sums or fragments were used (`wgmma.fence`).
    pub fn fence() {
        ptx {
            // SAFETY: orders registers; convergence is the kernel's contract.
            unsafe { intrinsics::wgmma_fence() }
        }
        host { lane::wgmma_fence() }
    }
}

twin! {
    /// Ends a group of products (`wgmma.commit_group`).
    pub fn commit() {
        ptx {
            // SAFETY: bookkeeping; convergence is the kernel's contract.
            unsafe { intrinsics::wgmma_commit() }
        }
        host { lane::wgmma_commit() }
    }
}

twin! {
    /// Waits until at most `PENDING` groups are under way: the operands of those that have ended may be written again. Sums
    /// have a wait of their own ([`Registers`]).
    pub fn wait_for_operands<const PENDING: u32>() {
        ptx {
            intrinsics::anchor();
            // SAFETY: waits for the warp's products.
            unsafe { asm!("wgmma.wait_group.sync.aligned {};", const PENDING, options(nostack)) }
        }
        host { lane::wgmma_wait(PENDING as usize) }
    }
}

/// Sums of these many registers.
pub trait Registers {
    /// Waits until at most `PENDING` groups are under way (`wgmma.wait_group`); these sums are of one that has ended.
    fn wait<const PENDING: u32>(&mut self);
}

/// [`Registers`] and the shapes for sums of `$r` registers: `$i` are the numbers of all, `$list` names them in assembly.
macro_rules! registers {
    ($r:literal, [$($i:literal)*], [$($list:literal)*]; $($rows:tt)*) => {
        impl Registers for Sums<$r> {
            #[inline(always)]
            #[track_caller]
            fn wait<const PENDING: u32>(&mut self) {
                #[cfg(target_arch = "nvptx64")]
                {
                    let d = &mut self.registers;
                    intrinsics::anchor();
                    // SAFETY: waits for the warp's products. The registers pass through, so that none is read before.
                    unsafe {
                        asm!(
                            "wgmma.wait_group.sync.aligned {pending};",
                            concat!("// ", $($list),*),
                            $(inout(reg32) d[$i],)* pending = const PENDING, options(nostack)
                        )
                    }
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    lane::wgmma_wait(PENDING as usize);
                    if let Some(ticket) = self.ticket.take() {
                        self.registers.copy_from_slice(&lane::wgmma_result(ticket));
                    }
                }
            }
        }
        registers! { @shapes $r, [$($i)*], [$($list)*]; $($rows)* }
    };
    (@shapes $r:literal, $i:tt, $list:tt; $($(#[$meta:meta])* $name:ident: $elements:ident, $shape:literal, $flags:literal, $a:literal, $b:literal;)*) => {
        $(registers! { @shape $r, $i, $list, $(#[$meta])* $name, $elements, $shape, $flags, $a, $b })*
    };
    (@shape $r:literal, [$($i:literal)*], [$($list:literal)*], $(#[$meta:meta])* $name:ident, $elements:ident, $shape:literal, $flags:literal, $a:literal, $b:literal) => {
        $(#[$meta])*
        #[derive(Debug)]
        pub struct $name;

        impl $name {
            /// Starts a product with A in shared memory: adds to the sums, or sets them.
            #[inline(always)]
            #[track_caller]
            pub fn shared<const ADD: bool>(sums: &mut Sums<$r>, a: Operand, b: Operand) {
                #[cfg(target_arch = "nvptx64")]
                {
                    let d = &mut sums.registers;
                    intrinsics::anchor();
                    // SAFETY: operands lie in the CTA's layout; the round of fence and wait orders registers.
                    unsafe {
                        // Sums that are set have no value before: one would have to be there at the fence.
                        if const { ADD } {
                            asm!(
                                "{{ .reg .pred p; setp.ne.b32 p, 1, 0;",
                                concat!("wgmma.mma_async.sync.aligned.", $shape, " {{", $($list,)* "}}, {a}, {b}, p", $flags, $a, $b, "; }}"),
                                $(inout(reg32) d[$i],)* a = in(reg64) a.0, b = in(reg64) b.0, options(nostack)
                            )
                        } else {
                            asm!(
                                "{{ .reg .pred p; setp.ne.b32 p, 0, 0;",
                                concat!("wgmma.mma_async.sync.aligned.", $shape, " {{", $($list,)* "}}, {a}, {b}, p", $flags, $a, $b, "; }}"),
                                $(out(reg32) d[$i],)* a = in(reg64) a.0, b = in(reg64) b.0, options(nostack)
                            )
                        }
                    }
                }
                #[cfg(not(target_arch = "nvptx64"))]
                emulate::<ADD, $r>(emu::Elements::$elements, $b == ", 1", sums, emu::A::Shared(a.0), b);
            }

            /// The same with A in registers: each warp's 16 rows as a fragment.
            #[inline(always)]
            #[track_caller]
            pub fn registers<const ADD: bool>(sums: &mut Sums<$r>, a: FragmentA, b: Operand) {
                #[cfg(target_arch = "nvptx64")]
                {
                    let (d, [a0, a1, a2, a3]) = (&mut sums.registers, a.0);
                    intrinsics::anchor();
                    // SAFETY: B lies in the CTA's layout; the round of fence and wait orders registers.
                    unsafe {
                        // As above.
                        if const { ADD } {
                            asm!(
                                "{{ .reg .pred p; setp.ne.b32 p, 1, 0;",
                                concat!("wgmma.mma_async.sync.aligned.", $shape, " {{", $($list,)* "}}, {{{a0},{a1},{a2},{a3}}}, {b}, p", $flags, $b, "; }}"),
                                $(inout(reg32) d[$i],)* a0 = in(reg32) a0, a1 = in(reg32) a1, a2 = in(reg32) a2, a3 = in(reg32) a3,
                                b = in(reg64) b.0, options(nostack)
                            )
                        } else {
                            asm!(
                                "{{ .reg .pred p; setp.ne.b32 p, 0, 0;",
                                concat!("wgmma.mma_async.sync.aligned.", $shape, " {{", $($list,)* "}}, {{{a0},{a1},{a2},{a3}}}, {b}, p", $flags, $b, "; }}"),
                                $(out(reg32) d[$i],)* a0 = in(reg32) a0, a1 = in(reg32) a1, a2 = in(reg32) a2, a3 = in(reg32) a3,
                                b = in(reg64) b.0, options(nostack)
                            )
                        }
                    }
                }
                #[cfg(not(target_arch = "nvptx64"))]
                emulate::<ADD, $r>(emu::Elements::$elements, $b == ", 1", sums, emu::A::Registers(a.0), b);
            }
        }
    };
}

registers! {
    16,
    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15],
    ["{0},{1},{2},{3},{4},{5},{6},{7},{8},{9},{10},{11},{12},{13},{14},{15}"];
    /// m64n32k32 on signed bytes, sums in i32.
    S8N32: S8, "m64n32k32.s32.s8.s8", "", "", "";
    /// m64n32k16 on f16, sums in f32.
    F16N32: F16, "m64n32k16.f32.f16.f16", ", 1, 1", ", 0", ", 0";
}

registers! {
    32,
    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31],
    ["{0},{1},{2},{3},{4},{5},{6},{7},{8},{9},{10},{11},{12},{13},{14},{15},"
     "{16},{17},{18},{19},{20},{21},{22},{23},{24},{25},{26},{27},{28},{29},{30},{31}"];
    /// m64n64k32 on signed bytes, sums in i32.
    S8N64: S8, "m64n64k32.s32.s8.s8", "", "", "";
    /// m64n64k16 on f16, sums in f32.
    F16N64: F16, "m64n64k16.f32.f16.f16", ", 1, 1", ", 0", ", 0";
    /// m64n64k16 on bf16, sums in f32.
    Bf16N64: Bf16, "m64n64k16.f32.bf16.bf16", ", 1, 1", ", 0", ", 0";
    /// m64n64k16 on f16, sums in f32, B transposed.
    F16N64T: F16, "m64n64k16.f32.f16.f16", ", 1, 1", ", 0", ", 1";
}

registers! {
    64,
    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34
     35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63],
    ["{0},{1},{2},{3},{4},{5},{6},{7},{8},{9},{10},{11},{12},{13},{14},{15},"
     "{16},{17},{18},{19},{20},{21},{22},{23},{24},{25},{26},{27},{28},{29},{30},{31},"
     "{32},{33},{34},{35},{36},{37},{38},{39},{40},{41},{42},{43},{44},{45},{46},{47},"
     "{48},{49},{50},{51},{52},{53},{54},{55},{56},{57},{58},{59},{60},{61},{62},{63}"];
    /// m64n128k32 on signed bytes, sums in i32.
    S8N128: S8, "m64n128k32.s32.s8.s8", "", "", "";
    /// m64n128k16 on f16, sums in f32.
    F16N128: F16, "m64n128k16.f32.f16.f16", ", 1, 1", ", 0", ", 0";
    /// m64n128k16 on bf16, sums in f32.
    Bf16N128: Bf16, "m64n128k16.f32.bf16.bf16", ", 1, 1", ", 0", ", 0";
    /// m64n128k16 on f16, sums in f32, B transposed.
    F16N128T: F16, "m64n128k16.f32.f16.f16", ", 1, 1", ", 0", ", 1";
}

registers! {
    128,
    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36
     37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69
     70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95 96 97 98 99 100 101
     102 103 104 105 106 107 108 109 110 111 112 113 114 115 116 117 118 119 120 121 122 123 124 125 126
     127],
    ["{0},{1},{2},{3},{4},{5},{6},{7},{8},{9},{10},{11},{12},{13},{14},{15},"
     "{16},{17},{18},{19},{20},{21},{22},{23},{24},{25},{26},{27},{28},{29},{30},{31},"
     "{32},{33},{34},{35},{36},{37},{38},{39},{40},{41},{42},{43},{44},{45},{46},{47},"
     "{48},{49},{50},{51},{52},{53},{54},{55},{56},{57},{58},{59},{60},{61},{62},{63},"
     "{64},{65},{66},{67},{68},{69},{70},{71},{72},{73},{74},{75},{76},{77},{78},{79},"
     "{80},{81},{82},{83},{84},{85},{86},{87},{88},{89},{90},{91},{92},{93},{94},{95},"
     "{96},{97},{98},{99},{100},{101},{102},{103},{104},{105},{106},{107},{108},{109},{110},{111},"
     "{112},{113},{114},{115},{116},{117},{118},{119},{120},{121},{122},{123},{124},{125},{126},{127}"];
    /// m64n256k16 on f16, sums in f32, B transposed.
    F16N256T: F16, "m64n256k16.f32.f16.f16", ", 1, 1", ", 0", ", 1";
}

/// The products on the emulator.
#[cfg(not(target_arch = "nvptx64"))]
#[track_caller]
fn emulate<const ADD: bool, const R: usize>(
    elements: emu::Elements,
    transposed: bool,
    sums: &mut Sums<R>,
    a: emu::A,
    b: Operand,
) {
    let c = if ADD { sums.addend() } else { emu::Addend::Zero };
    let kind = emu::Kind { elements, n: 2 * R, b: b.0, transposed };
    sums.ticket = Some(lane::wgmma(kind, emu::Operands { a, c }));
}
