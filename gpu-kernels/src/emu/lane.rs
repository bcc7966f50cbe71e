//! The running CUDA thread: what the device layer's host twins do.
//!
//! A worker of the host runs one CTA at a time; the CTA and the number of the thread whose turn it is are in
//! thread-locals, so kernels need no context argument. Every function takes the place in the kernel from its caller.

use std::cell::{Cell, RefCell};
use std::format;
use std::panic::Location;
use std::rc::Rc;
use std::string::String;

use bytemuck::Pod;

use super::cta::{BARRIERS, BulkCopy, Cta, CtaPlace, WINDOW_BYTES, Wait};
use super::memory::{Kind, Toucher};
use super::smem::AsyncCopy;
use super::wgmma;

/// A place in a kernel's source.
pub(super) type Source = &'static Location<'static>;

/// An operation of a whole warp, or of a warpgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of `device::warp`, `device::mma` and `device::wgmma`
pub enum Collective {
    SyncWarp,
    Shuffle,
    Ballot,
    MatchAny,
    LoadMatrix,
    LoadMatrixTransposed,
    MmaF16,
    MmaBf16,
    MmaS8,
    SetMaxRegisters,
    Wgmma(wgmma::Kind),
}

impl Collective {
    /// How many warps run it together.
    pub(super) fn warps(self) -> usize {
        if matches!(self, Collective::Wgmma(_)) { 4 } else { 1 }
    }
}

std::thread_local! {
    /// The CTA that this worker runs.
    static CTA: RefCell<Option<Rc<Cta>>> = const { RefCell::new(None) };
    /// The thread whose turn it is.
    static THREAD: Cell<usize> = const { Cell::new(0) };
}

/// Makes a CTA the running one, until [`leave`].
pub(super) fn enter(cta: &Rc<Cta>) {
    CTA.set(Some(cta.clone()));
}

/// No CTA runs any more.
pub(super) fn leave() {
    CTA.set(None);
}

/// Gives a thread its turn.
pub(super) fn turn(thread: usize) {
    THREAD.set(thread);
}

fn me() -> usize {
    THREAD.get()
}

/// The running CTA. Outside of a launch there is none: a bug of the caller.
fn cta() -> Rc<Cta> {
    CTA.with_borrow(|cta| cta.clone()).expect("device code runs in a launch only")
}

/// Stops the launch: this thread has done something wrong.
fn fail(what: &str, at: Source) -> ! {
    let (cta, me) = (cta(), me());
    let [x, y, z] = cta.idx;
    cta.find(format!("{what}, at {}:{} (CTA {x},{y},{z}, thread {me})", at.file(), at.line()));
    cta.suspend(me, Wait::Failed);
    unreachable!("a failed thread is never resumed")
}

fn checked<T>(result: Result<T, String>, at: Source) -> T {
    result.unwrap_or_else(|what| fail(&what, at))
}

/// Thread in its CTA.
pub fn thread_idx() -> u32 {
    (me() % cta().cta_threads) as u32
}

/// Threads of the CTA.
pub fn cta_threads() -> u32 {
    cta().cta_threads as u32
}

/// The CTA in the grid. The CTAs of a cluster are neighbours in the first dimension.
pub fn cta_idx() -> [u32; 3] {
    let cta = cta();
    let [x, y, z] = cta.idx;
    [x + cta.rank(me()), y, z]
}

/// Where the CTA's shared memory starts.
pub fn smem_base() -> u32 {
    cta().window(me())
}

/// The shared address in CTA `rank` of the cluster that is this one here.
pub fn smem_address_at(address: u32, rank: u32) -> u32 {
    address % WINDOW_BYTES + rank * WINDOW_BYTES
}

/// Waits for all threads of the cluster.
#[track_caller]
pub fn cluster_barrier() {
    let cta = cta();
    let (ctas, all) = ((cta.threads / cta.cta_threads) as u32, cta.threads as u32);
    let wait = Wait::Barrier { id: BARRIERS * ctas, count: Some(all), at: Location::caller() };
    cta.suspend(me(), wait);
}

/// CTAs of the grid.
pub fn grid() -> [u32; 3] {
    cta().grid
}

/// An index of a shared array against its length.
#[track_caller]
pub fn check_index(i: u32, elems: u32) {
    if i >= elems {
        fail(&format!("shared memory: element {i} of an array of {elems}"), Location::caller());
    }
}

/// The length of a shared array of `elems` without its first `skipped`.
#[track_caller]
pub fn remaining(elems: u32, skipped: u32) -> u32 {
    elems.checked_sub(skipped).unwrap_or_else(|| {
        fail(&format!("shared memory: {skipped} elements into an array of {elems}"), Location::caller())
    })
}

/// Earlier launches have ended, as they always have here; from now on the thread may touch what they touched.
pub fn wait_for_earlier() {
    cta().thread(me(), |thread| thread.waited = true);
}

/// Waits at barrier `id` for `count` threads, or for all.
#[track_caller]
pub fn barrier(id: u32, count: Option<u32>) {
    let (cta, me) = (cta(), me());
    let (id, count) = (id + BARRIERS * cta.rank(me), Some(count.unwrap_or(cta.cta_threads as u32)));
    cta.suspend(me, Wait::Barrier { id, count, at: Location::caller() });
}

/// Arrives at barrier `id` without waiting.
#[track_caller]
pub fn barrier_arrive(id: u32, count: u32) {
    let (cta, me) = (cta(), me());
    cta.arrive(me, id + BARRIERS * cta.rank(me), count);
}

/// Runs a warp's operation on the inputs of all lanes.
#[track_caller]
pub fn collective(op: Collective, inputs: &[u32]) -> [u32; 4] {
    let (cta, me) = (cta(), me());
    cta.set_inputs(me, inputs);
    cta.suspend(me, Wait::Collective { op, at: Location::caller() });
    cta.outputs(me)
}

/// A matrix product of the warp.
#[track_caller]
pub fn mma(op: Collective, a: [u32; 4], b: [u32; 2], c: [u32; 4]) -> [u32; 4] {
    let mut inputs = [0; 10];
    inputs[..4].copy_from_slice(&a);
    inputs[4..6].copy_from_slice(&b);
    inputs[6..].copy_from_slice(&c);
    collective(op, &inputs)
}

/// `ldmatrix.x4`: this lane's row goes in, its part of all rows comes out.
#[track_caller]
pub fn load_matrix(row: u32, transposed: bool) -> [u32; 4] {
    let words: [u32; 4] = load_shared(row);
    collective(if transposed { Collective::LoadMatrixTransposed } else { Collective::LoadMatrix }, &words)
}

/// A load from shared memory.
#[track_caller]
pub fn load_shared<T: Pod>(address: u32) -> T {
    let at = Location::caller();
    let (cta, me) = (cta(), me());
    let size = size_of::<T>() as u32;
    let result = cta.smem(|smem| {
        smem.bounds(address, size)?;
        smem.access(address, size, Kind::Read, me, &cta.clock(me))?;
        let mut value = T::zeroed();
        smem.load(address, bytemuck::bytes_of_mut(&mut value));
        Ok(value)
    });
    checked(result, at)
}

/// A store to shared memory.
#[track_caller]
pub fn store_shared<T: Pod>(address: u32, value: T) {
    let at = Location::caller();
    let (cta, me) = (cta(), me());
    let size = size_of::<T>() as u32;
    let result = cta.smem(|smem| {
        smem.bounds(address, size)?;
        smem.access(address, size, Kind::Write, me, &cta.clock(me))?;
        smem.store(address, bytemuck::bytes_of(&value));
        Ok(())
    });
    checked(result, at);
}

/// An atomic operation on a shared word; returns the value before.
#[track_caller]
pub fn atomic_shared(address: u32, f: impl Fn(u32) -> u32) -> u32 {
    let at = Location::caller();
    let (cta, me) = (cta(), me());
    let result = cta.smem(|smem| {
        smem.bounds(address, 4)?;
        smem.access(address, 4, Kind::Atomic, me, &cta.clock(me))?;
        let mut before = [0; 4];
        smem.load(address, &mut before);
        let before = u32::from_le_bytes(before);
        smem.store(address, &f(before).to_le_bytes());
        Ok(before)
    });
    checked(result, at)
}

/// A checked access to global memory: where it goes.
fn touch(address: u64, size: u64, align: u64, kind: Kind) -> Result<CtaPlace, String> {
    if !cta().thread(me(), |thread| thread.waited) {
        return Err(format!("global memory: {kind:?} at {address:#x} before waiting for earlier launches"));
    }
    touch_early(address, size, align, kind)
}

/// [`touch`] of what no launch of a step writes.
fn touch_early(address: u64, size: u64, align: u64, kind: Kind) -> Result<CtaPlace, String> {
    let (cta, me) = (cta(), me());
    let place = cta
        .place(address, size)
        .ok_or_else(|| format!("global memory: {size} bytes at {address:#x} are not within an allocation"))?;
    if !address.is_multiple_of(align) {
        return Err(format!("global memory: {size} bytes at {address:#x} are misaligned"));
    }
    if kind != Kind::Write
        && let Some(byte) = place.allocation.uninitialised(place.offset, size as usize)
    {
        let at = byte - place.offset;
        return Err(format!("global memory: byte {at} of {size} at {address:#x} was never written"));
    }
    if let Some(marks) = &cta.marks {
        let clock = cta.clock(me);
        marks.touch(&Toucher { cta: cta.number, thread: me, clock: &clock }, address, size, kind)?;
    }
    Ok(place)
}

/// A load from global memory.
#[track_caller]
pub fn load_global<T: Pod>(address: u64) -> T {
    let size = size_of::<T>() as u64;
    let place = checked(touch(address, size, size, Kind::Read), Location::caller());
    let mut value = T::zeroed();
    place.allocation.load(place.offset, bytemuck::bytes_of_mut(&mut value));
    value
}

/// A load from global memory of what no launch of a step writes.
#[track_caller]
pub fn load_global_early<T: Pod>(address: u64) -> T {
    let size = size_of::<T>() as u64;
    let place = checked(touch_early(address, size, size, Kind::Read), Location::caller());
    let mut value = T::zeroed();
    place.allocation.load(place.offset, bytemuck::bytes_of_mut(&mut value));
    value
}

/// A prefetch: the range must be memory; nothing is read.
#[track_caller]
pub fn prefetch_global(address: u64, size: u64) {
    let there = cta().place(address, size).map(drop);
    let refused =
        || format!("global memory: a prefetch of {size} bytes at {address:#x} is not within an allocation");
    checked(there.ok_or_else(refused), Location::caller());
}

/// A store to global memory.
#[track_caller]
pub fn store_global<T: Pod>(address: u64, value: T) {
    let size = size_of::<T>() as u64;
    let place = checked(touch(address, size, size, Kind::Write), Location::caller());
    place.allocation.store(place.offset, bytemuck::bytes_of(&value));
}

/// A look at a block in global memory.
#[track_caller]
pub fn view_global<'a, T: Pod>(address: u64) -> &'a T {
    let at = Location::caller();
    let size = size_of::<T>() as u64;
    let align = 1 << (size | 16).trailing_zeros();
    let place = checked(touch(address, size, align, Kind::Read), at);
    // A copy that lives as long as the CTA: other CTAs may write the bytes, if the kernel is wrong.
    let mut value = T::zeroed();
    place.allocation.load(place.offset, bytemuck::bytes_of_mut(&mut value));
    cta().lend(value)
}

/// An atomic operation on a word of global memory; returns the value before.
#[track_caller]
pub fn atomic_global(address: u64, f: impl Fn(u32) -> u32) -> u32 {
    let place = checked(touch(address, 4, 4, Kind::Atomic), Location::caller());
    place.allocation.update(place.offset, f)
}

/// Starts an asynchronous copy of `size` bytes, at most 16, of which `there` are read; the others become zero.
#[track_caller]
pub fn async_copy(to: u32, from: u64, there: u32, size: u32) {
    let at = Location::caller();
    let (cta, me) = (cta(), me());
    let mut bytes = [0; 16];
    if there > 0 {
        let place = checked(touch(from, there.into(), size.into(), Kind::Read), at);
        place.allocation.load(place.offset, &mut bytes[..there as usize]);
    }
    let result = cta.smem(|smem| {
        smem.bounds(to, size)?;
        smem.access(to, size, Kind::Write, me, &cta.clock(me))?;
        smem.begin_copy(to, size);
        Ok(())
    });
    checked(result, at);
    cta.thread(me, |thread| thread.open.push(AsyncCopy { to, bytes, size }));
}

/// Ends a group of asynchronous copies.
pub fn async_commit() {
    cta().thread(me(), |thread| {
        let group = std::mem::take(&mut thread.open);
        thread.groups.push_back(group);
    });
}

/// Completes groups until `pending` are left.
pub fn async_wait(pending: usize) {
    let (cta, me) = (cta(), me());
    let clock = cta.clock(me);
    while let Some(group) =
        cta.thread(me, |thread| if thread.groups.len() > pending { thread.groups.pop_front() } else { None })
    {
        cta.smem(|smem| {
            group
                .iter()
                .for_each(|copy| smem.end_copy(copy.to, &copy.bytes[..copy.size as usize], me, clock.own))
        });
    }
}

/// Makes a shared word pair a barrier object.
#[track_caller]
pub fn mbarrier_init(address: u32, count: u32) {
    store_shared(address, u64::from(count));
    cta().mbarrier_init(address, count);
}

/// One arrival.
#[track_caller]
pub fn mbarrier_arrive(address: u32) {
    let at = Location::caller();
    let _: u64 = load_shared(address);
    checked(cta().mbarrier_arrive(me(), address), at);
}

/// One arrival, which tells of bytes that copies will bring in the same phase.
#[track_caller]
pub fn mbarrier_arrive_expect(address: u32, bytes: u32) {
    let at = Location::caller();
    let _: u64 = load_shared(address);
    checked(cta().mbarrier_expect(address, bytes), at);
    checked(cta().mbarrier_arrive(me(), address), at);
}

/// Starts a copy of many bytes by the copy engine, which reports them to a barrier object.
#[track_caller]
pub fn bulk_copy(to: u32, from: u64, bytes: u32, mbarrier: u32) {
    let at = Location::caller();
    let _: u64 = load_shared(mbarrier);
    let (cta, me) = (cta(), me());
    if bytes == 0 || !bytes.is_multiple_of(16) {
        fail(&format!("a bulk copy of {bytes} bytes, expected a multiple of 16"), at);
    }
    let place = checked(touch(from, u64::from(bytes), 16, Kind::Read), at);
    let mut data = std::vec![0; bytes as usize];
    place.allocation.load(place.offset, &mut data);
    let result = cta.smem(|smem| {
        smem.bounds_aligned(to, bytes, 16)?;
        smem.is_fenced(to, bytes)?;
        smem.access(to, bytes, Kind::Write, me, &cta.clock(me))?;
        smem.begin_copy(to, bytes);
        Ok(())
    });
    checked(result, at);
    cta.start_copy(BulkCopy { to, bytes: data, mbarrier });
}

/// Orders what this thread wrote before what the tensor cores and the copy engine do after.
pub fn fence_async_proxy() {
    cta().fence_async_proxy(me());
}

/// Registers may be handed to the tensor cores from now on.
pub fn wgmma_fence() {
    cta().thread(me(), |thread| thread.products.fence());
}

/// Starts a product of the warpgroup; returns the ticket of its result.
#[track_caller]
pub fn wgmma(kind: wgmma::Kind, operands: wgmma::Operands) -> u64 {
    let at = Location::caller();
    let (cta, me) = (cta(), me());
    checked(cta.thread(me, |thread| thread.products.ask(operands)), at);
    cta.suspend(me, Wait::Collective { op: Collective::Wgmma(kind), at });
    cta.thread(me, |thread| thread.products.latest())
}

/// Ends a group of products.
pub fn wgmma_commit() {
    cta().thread(me(), |thread| thread.products.commit());
}

/// Waits until `pending` groups are under way.
#[track_caller]
pub fn wgmma_wait(pending: usize) {
    let at = Location::caller();
    let (cta, me) = (cta(), me());
    for (address, bytes) in cta.thread(me, |thread| thread.products.wait(pending)) {
        // Up to now the operands were being read.
        let address = address + cta.window(me);
        let clock = cta.clock(me);
        checked(cta.smem(|smem| smem.access(address, bytes, Kind::Read, me, &clock)), at);
    }
}

/// The result of a product that was waited for.
#[track_caller]
pub fn wgmma_result(ticket: u64) -> std::vec::Vec<u32> {
    let result = cta().thread(me(), |thread| thread.products.take(ticket));
    checked(result, Location::caller())
}

/// Waits for the end of a phase.
#[track_caller]
pub fn mbarrier_wait(address: u32, parity: u32) {
    let at = Location::caller();
    let _: u64 = load_shared(address);
    let (cta, me) = (cta(), me());
    while !checked(cta.mbarrier_done(me, address, parity), at) {
        cta.suspend(me, Wait::Mbarrier { address, parity, at });
    }
}
