//! Page tables: every address is its own physical address; what differs is what may be done there.
//!
//! No page can be both written and executed. The entry code's tables allow everything and cover 4 GiB; they are left as
//! soon as there is a heap to build these from. Regions are mapped with the largest pages that fit, and a later call may
//! change part of an earlier one: its page is split. Tables are never freed: maps only grow, by a few calls at boot.

use alloc::boxed::Box;
use core::arch::asm;

use crate::cpu;
use crate::memory::Range;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const WRITE_THROUGH: u64 = 1 << 3;
const UNCACHED: u64 = 1 << 4;
/// In an entry of a middle level: it is a page, not a table.
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bytes that one entry covers, from the lowest level up.
const SIZES: [u64; 4] = [1 << 12, 1 << 21, 1 << 30, 1 << 39];

/// What may be done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: touching it is a fault.
    None,
    /// Reading.
    Read,
    /// Reading and executing.
    Execute,
    /// Reading and writing.
    Write,
    /// Reading and writing past the caches: device registers.
    Device,
}

impl Access {
    fn bits(self) -> u64 {
        match self {
            Access::None => 0,
            Access::Read => PRESENT | NO_EXECUTE,
            Access::Execute => PRESENT,
            Access::Write => PRESENT | WRITABLE | NO_EXECUTE,
            Access::Device => PRESENT | WRITABLE | NO_EXECUTE | UNCACHED | WRITE_THROUGH,
        }
    }
}

#[repr(C, align(4096))]
struct Table([u64; 512]);

/// The tables of all cores.
pub struct PageTables {
    root: Box<Table>,
    huge_pages: bool,
}

impl PageTables {
    /// Tables that map nothing.
    pub fn new() -> PageTables {
        PageTables { root: Box::new(Table([0; 512])), huge_pages: cpu::has_huge_pages() }
    }

    /// Maps a range; its ends are rounded outwards to pages.
    ///
    /// # Panics
    /// If the range passes the 256 TiB that four levels address below the hole.
    pub fn map(&mut self, range: Range, access: Access) {
        let (from, to) = (range.pages().start, range.pages().end());
        assert!(to <= 1 << 47, "{range:x?} is beyond what page tables map");
        let largest = if self.huge_pages { 2 } else { 1 };
        map(&mut self.root, 3, largest, from, to, access.bits());
    }

    /// Physical address of the root.
    pub fn root(&self) -> u64 {
        (&raw const *self.root).expose_provenance() as u64
    }

    /// Makes a core use these tables, and forget what it knew of others.
    ///
    /// # Safety
    /// * They map all that Rust uses, at its physical address, and outlive their use.
    pub unsafe fn activate(&self) {
        // SAFETY: the caller's promise; without `nomem`, so no access moves across.
        unsafe { asm!("mov cr3, {}", in(reg) self.root(), options(nostack, preserves_flags)) }
    }

    /// Page and bits that an address has; for tests and fault reports.
    #[cfg(test)]
    fn lookup(&self, address: u64) -> Option<(u64, u64)> {
        let (mut table, mut level) = (&*self.root, 3);
        loop {
            let entry = table.0[index(address, level)];
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 0 || entry & LARGE != 0 {
                return Some((entry & ADDRESS & !LARGE, entry & !ADDRESS & !LARGE));
            }
            // SAFETY: a present entry that is no page points to a table of ours.
            table = unsafe { &*core::ptr::with_exposed_provenance((entry & ADDRESS) as usize) };
            level -= 1;
        }
    }
}

impl Default for PageTables {
    fn default() -> PageTables {
        PageTables::new()
    }
}

fn index(address: u64, level: usize) -> usize {
    (address / SIZES[level]) as usize % 512
}

/// Maps `from..to` in a table of this level; the range lies within what the table covers.
fn map(table: &mut Table, level: usize, largest: usize, mut from: u64, to: u64, bits: u64) {
    let size = SIZES[level];
    while from < to {
        let end = (from / size * size + size).min(to);
        let entry = &mut table.0[index(from, level)];
        let whole = from.is_multiple_of(size) && end - from == size;
        if level == 0 || (whole && level <= largest) {
            let large = if level > 0 { LARGE } else { 0 };
            *entry = if bits == 0 { 0 } else { from | bits | large };
        } else {
            map(below(entry, level, from / size * size), level - 1, largest, from, end, bits);
        }
        from = end;
    }
}

/// The table under an entry, made now if there is none: empty, or with the same meaning as the page it replaces.
fn below(entry: &mut u64, level: usize, start: u64) -> &mut Table {
    if *entry & PRESENT == 0 || *entry & LARGE != 0 {
        let mut table = Box::new(Table([0; 512]));
        if *entry & PRESENT != 0 {
            let large = if level > 1 { LARGE } else { 0 };
            let bits = *entry & !ADDRESS & !LARGE;
            for (i, entry) in table.0.iter_mut().enumerate() {
                *entry = (start + i as u64 * SIZES[level - 1]) | bits | large;
            }
        }
        // Rights are cut at the last level only.
        *entry = (&raw mut *Box::leak(table)).expose_provenance() as u64 | PRESENT | WRITABLE;
    }
    // SAFETY: a present entry that is no page points to a table that `below` leaked; its only path is this entry, which
    // is borrowed.
    unsafe { &mut *core::ptr::with_exposed_provenance_mut((*entry & ADDRESS) as usize) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PAGE;

    fn range(start: u64, len: u64) -> Range {
        Range { start, len }
    }

    #[test]
    fn every_address_is_itself() {
        let mut tables = PageTables::new();
        tables.map(range(0, 6 << 30), Access::Write);
        tables.map(range(5 << 30, PAGE), Access::Read);
        for address in
            [0, PAGE, (2 << 20) + 5 * PAGE, 3 << 30, (5 << 30) - PAGE, (5 << 30) + PAGE, (6 << 30) - PAGE]
        {
            let (page, bits) = tables.lookup(address).unwrap();
            assert!(page <= address && address - page < 1 << 30, "{address:#x}");
            assert_eq!(bits, Access::Write.bits(), "{address:#x}");
        }
        assert_eq!(tables.lookup(5 << 30), Some((5 << 30, Access::Read.bits())));
        assert_eq!(tables.lookup(6 << 30), None);
    }

    #[test]
    fn parts_of_large_pages_change() {
        let mut tables = PageTables::new();
        tables.map(range(0, 4 << 30), Access::Write);
        tables.map(range(0x20_0000, 0x1_2345), Access::Execute);
        tables.map(range(0, PAGE), Access::None);
        assert_eq!(tables.lookup(0), None);
        assert_eq!(tables.lookup(PAGE), Some((PAGE, Access::Write.bits())));
        assert_eq!(tables.lookup(0x1f_f000), Some((0x1f_f000, Access::Write.bits())));
        assert_eq!(tables.lookup(0x20_0000), Some((0x20_0000, Access::Execute.bits())));
        assert_eq!(tables.lookup(0x21_2000), Some((0x21_2000, Access::Execute.bits())));
        assert_eq!(tables.lookup(0x21_3000), Some((0x21_3000, Access::Write.bits())));
        // Mapping the whole again joins nothing, but means the same everywhere.
        tables.map(range(0, 4 << 30), Access::Read);
        assert_eq!(tables.lookup(0x20_0000).unwrap().1, Access::Read.bits());
    }

    #[test]
    fn no_access_both_writes_and_executes() {
        for access in [Access::None, Access::Read, Access::Execute, Access::Write, Access::Device] {
            let bits = access.bits();
            assert!(bits & WRITABLE == 0 || bits & NO_EXECUTE != 0, "{access:?}");
        }
    }
}
