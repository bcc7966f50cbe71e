//! Products of warpgroups (`wgmma`) on the emulator.
//!
//! A product is computed when all four warps have issued it; its result is kept from the threads until they wait for its
//! group, and its operands count as being read until then. Issuing one without a fence after registers were used, and
//! taking a result too early, are findings.
//!
//! Layouts are PTX's ("Matrix fragments for wgmma.mma_async", "Matrix descriptor"): warp w of the group has rows 16 w …
//! of A and D, in the fragments of `mma`; of D every eight columns follow in four more registers. An operand in shared
//! memory lies in rows of 128 bytes, eight of them 1024 bytes apart from the next eight, 16-byte chunks permuted by
//! their row; or in core matrices of eight rows of 16 bytes. A transposed B lies in rows of 64 columns, one for each of its
//! sixteen k; the next 64 columns are a stride away.

use std::collections::VecDeque;
use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

use half::{bf16, f16};

/// Elements of A and B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // PTX's names
pub enum Elements {
    S8,
    F16,
    Bf16,
}

/// A product: m64 by `n` columns by 32 bytes of k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// What is multiplied.
    pub elements: Elements,
    /// Columns.
    pub n: usize,
    /// B's descriptor: the same in all threads.
    pub b: u64,
    /// Whether B's columns, not its k, follow each other in memory.
    pub transposed: bool,
}

/// A of a product.
#[derive(Clone, Copy, Debug)]
pub enum A {
    /// A descriptor.
    Shared(u64),
    /// A thread's fragment.
    Registers([u32; 4]),
}

/// What a thread gives to a product.
#[derive(Clone, Debug)]
pub struct Operands {
    /// Its part of A.
    pub a: A,
    /// Its part of the sums that the product is added to.
    pub c: Addend,
}

/// What a product is added to.
#[derive(Clone, Debug)]
pub enum Addend {
    /// Nothing.
    Zero,
    /// Registers.
    Registers(Vec<u32>),
    /// The result of an earlier product, which need not have been waited for.
    Ticket(u64),
}

/// A product under way.
struct Pending {
    ticket: u64,
    values: Vec<u32>,
    /// Shared memory that this thread's warp reads: address and bytes.
    reads: Vec<(u32, u32)>,
}

/// A thread's products.
#[derive(Default)]
pub(super) struct Products {
    request: Option<Operands>,
    fenced: bool,
    tickets: u64,
    open: Vec<Pending>,
    groups: VecDeque<Vec<Pending>>,
    done: Vec<(u64, Vec<u32>)>,
}

impl Products {
    pub(super) fn fence(&mut self) {
        self.fenced = true;
    }

    pub(super) fn ask(&mut self, operands: Operands) -> Result<(), String> {
        if !self.fenced {
            return Err("a wgmma without a wgmma.fence after registers were used".into());
        }
        self.request = Some(operands);
        Ok(())
    }

    /// The ticket of the product issued last.
    pub(super) fn latest(&self) -> u64 {
        self.tickets
    }

    pub(super) fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// Completes groups until `pending` are left; returns what they have read.
    pub(super) fn wait(&mut self, pending: usize) -> Vec<(u32, u32)> {
        self.fenced = false;
        let mut reads = vec![];
        while self.groups.len() > pending {
            for product in self.groups.pop_front().unwrap_or_default() {
                reads.extend(product.reads);
                self.done.push((product.ticket, product.values));
            }
        }
        reads
    }

    pub(super) fn take(&mut self, ticket: u64) -> Result<Vec<u32>, String> {
        match self.done.iter().position(|(done, _)| *done == ticket) {
            Some(i) => Ok(self.done.swap_remove(i).1),
            None => Err("the result of a wgmma is used before its group was waited for".into()),
        }
    }

    /// The sums that a new product is added to; those of a product under way are its own from now on.
    fn addend(&mut self, c: Addend, registers: usize) -> Result<Vec<u32>, String> {
        match c {
            Addend::Zero => Ok(vec![0; registers]),
            Addend::Registers(values) => Ok(values),
            Addend::Ticket(ticket) => {
                let mut under_way = self.groups.iter_mut().flatten().chain(&mut self.open);
                match under_way.find(|product| product.ticket == ticket) {
                    Some(product) => Ok(product.values.clone()),
                    None => self.take(ticket),
                }
            }
        }
    }
}

/// Where 16 bytes of an operand's row lie, if the descriptor is of a layout that `device::wgmma` makes: core matrices
/// without a swizzle, or rows of 128 bytes.
fn chunk_address(descriptor: u64, row: usize, chunk: usize) -> Option<u32> {
    let field = |bit: u32| (descriptor >> bit & 0x3fff) as u32 * 16;
    let (start, in_k, stride) = (field(0), field(16), field(32));
    let (first, row, chunk) = (start + (row / 8) as u32 * stride, (row % 8) as u32, chunk as u32);
    match descriptor >> 62 {
        0 => Some(first + chunk * in_k + row * 16),
        1 => {
            let linear = first + row * 128 + chunk * 16;
            Some(linear ^ (linear >> 7 & 7) << 4)
        }
        _ => None,
    }
}

/// Where columns `8 · chunk` and following of row `k` of a transposed B lie, if the descriptor is of such a layout.
fn transposed_address(descriptor: u64, k: usize, chunk: usize) -> Option<u32> {
    let field = |bit: u32| (descriptor >> bit & 0x3fff) as u32 * 16;
    let (start, in_columns, in_k) = (field(0), field(16), field(32));
    let place = (k / 8) as u32 * in_k + (k % 8) as u32 * 128 + (chunk / 8) as u32 * in_columns;
    let linear = start + place + chunk as u32 % 8 * 16;
    (descriptor >> 62 == 1).then_some(linear ^ (linear >> 7 & 7) << 4)
}

/// Reads shared memory in the name of a thread of the warpgroup.
pub(super) type Read<'a> = dyn FnMut(usize, u32, &mut [u8]) -> Result<(), String> + 'a;

/// Computes a product for the four warps that have asked for it.
pub(super) fn execute(kind: Kind, threads: &mut [&mut Products], read: &mut Read<'_>) -> Result<(), String> {
    let Kind { elements, n, b, transposed } = kind;
    if threads.len() != 128 {
        return Err(format!("a wgmma by {} threads, expected a warpgroup of 128", threads.len()));
    }
    let requests: Vec<Operands> = threads.iter_mut().filter_map(|thread| thread.request.take()).collect();
    if requests.len() != threads.len() {
        return Err("a wgmma that not all threads of the warpgroup have asked for".into());
    }
    for warp in 0..4 {
        let first = 32 * warp;
        let mut reads = vec![];
        let mut rows_of = |descriptor: u64, rows: core::ops::Range<usize>| {
            let mut bytes = vec![];
            for row in rows {
                let mut line = [0; 32];
                for (chunk, to) in line.chunks_mut(16).enumerate() {
                    let address = chunk_address(descriptor, row, chunk)
                        .ok_or("a wgmma descriptor of a layout that is not emulated")?;
                    read(first, address, to)?;
                    reads.push((address, 16));
                }
                bytes.push(line);
            }
            Ok::<Vec<[u8; 32]>, String>(bytes)
        };
        let b = if transposed { vec![] } else { rows_of(b, 0..n)? };
        let a = match requests[first].a {
            A::Shared(descriptor) => rows_of(descriptor, 16 * warp..16 * warp + 16)?,
            A::Registers(_) => {
                let mut rows = vec![[0; 32]; 16];
                for lane in 0..32 {
                    let A::Registers(words) = requests[first + lane].a else { continue };
                    for (r, word) in words.iter().enumerate() {
                        let at = 4 * (lane % 4) + 16 * (r / 2);
                        rows[lane / 4 + 8 * (r % 2)][at..at + 4].copy_from_slice(&word.to_le_bytes());
                    }
                }
                rows
            }
        };
        let b = if transposed { transpose(kind, first, read, &mut reads)? } else { b };
        for lane in 0..32 {
            let thread = &mut threads[first + lane];
            let mut values = thread.addend(requests[first + lane].c.clone(), n / 2)?;
            if values.len() != n / 2 {
                return Err(format!("a wgmma of {n} columns on {} registers", values.len()));
            }
            for (i, value) in values.iter_mut().enumerate() {
                let row = lane / 4 + 8 * (i / 2 % 2);
                let column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
                *value = dot(elements, &a[row], &b[column], *value);
            }
            thread.tickets += 1;
            // One thread of the warp stands for its reads.
            let reads = if lane == 0 { reads.clone() } else { vec![] };
            thread.open.push(Pending { ticket: thread.tickets, values, reads });
        }
    }
    Ok(())
}

/// The columns of a transposed B of two-byte elements, each with its k in order; what is read goes to `reads`.
fn transpose(
    kind: Kind,
    thread: usize,
    read: &mut Read<'_>,
    reads: &mut Vec<(u32, u32)>,
) -> Result<Vec<[u8; 32]>, String> {
    if kind.elements == Elements::S8 {
        return Err("a wgmma on transposed bytes".into());
    }
    let mut columns = vec![[0; 32]; kind.n];
    for k in 0..16 {
        for (chunk, columns) in columns.chunks_mut(8).enumerate() {
            let address = transposed_address(kind.b, k, chunk)
                .ok_or("a wgmma descriptor of a layout that is not emulated")?;
            let mut bytes = [0; 16];
            read(thread, address, &mut bytes)?;
            reads.push((address, 16));
            for (column, element) in columns.iter_mut().zip(bytes.as_chunks::<2>().0) {
                column[2 * k..][..2].copy_from_slice(element);
            }
        }
    }
    Ok(columns)
}

/// 32 bytes of k: integers exactly, floats summed in f64 and rounded once, at least as exact as the hardware.
fn dot(elements: Elements, a: &[u8; 32], b: &[u8; 32], c: u32) -> u32 {
    let floats = |value: fn(u16) -> f64| {
        let pairs = a.as_chunks::<2>().0.iter().zip(b.as_chunks::<2>().0);
        let products = pairs.map(|(a, b)| value(u16::from_le_bytes(*a)) * value(u16::from_le_bytes(*b)));
        ((f64::from(f32::from_bits(c)) + products.sum::<f64>()) as f32).to_bits()
    };
    match elements {
        Elements::S8 => {
            let products = a.iter().zip(b).map(|(&a, &b)| i32::from(a as i8) * i32::from(b as i8));
            (c as i32).wrapping_add(products.sum()) as u32
        }
        Elements::F16 => floats(|bits| f16::from_bits(bits).to_f64()),
        Elements::Bf16 => floats(|bits| bf16::from_bits(bits).to_f64()),
    }
}
