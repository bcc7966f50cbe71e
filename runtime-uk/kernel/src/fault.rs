//! Descriptor tables, and what happens when the processor takes an exception: a report on the serial line and the end.
//!
//! Interrupts are enabled only inside [`wait`]'s one instruction sequence, so no Rust code is ever interrupted: the red
//! zone stays valid, no state needs a lock against handlers, and the handlers just acknowledge. Exceptions run on a stack
//! of their own, so that an overflowed stack still gives a report.

use alloc::boxed::Box;
use core::arch::{asm, naked_asm};

use crate::apic::{self, END_OF_INTERRUPT_AT};
use crate::exit::{Exit, begin_report, exit};
use crate::serial;

/// Selectors in every core's descriptor table; the entry code's table has the first two at the same places.
const CODE: u16 = 8;
const DATA: u16 = 16;
const TASK: u16 = 24;

/// Stack of exceptions: the report formats numbers and little else.
const STACK_BYTES: usize = 16 << 10;
const N_EXCEPTIONS: usize = 32;

#[repr(C, align(16))]
struct Stack([u8; STACK_BYTES]);

/// Task state segment: Intel SDM volume 3, 9.7. Only the exception stack is used.
#[repr(C, packed(4))]
struct Task {
    reserved: u32,
    stacks: [u64; 3],
    reserved_2: u64,
    interrupt_stacks: [u64; 7],
    reserved_3: u64,
    reserved_4: u16,
    io_map: u16,
}

/// A core's own tables.
#[repr(C, align(16))]
struct CoreTables {
    descriptors: [u64; 5],
    task: Task,
    stack: Stack,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    low: u64,
    high: u64,
}

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    at: u64,
}

impl Gate {
    const EMPTY: Gate = Gate { low: 0, high: 0 };

    /// An interrupt gate to a handler, on interrupt stack `stack` (0: the stack in use).
    fn new(handler: usize, stack: u64) -> Gate {
        const PRESENT_INTERRUPT: u64 = 0x8e;
        let at = handler as u64;
        let low = at & 0xffff
            | u64::from(CODE) << 16
            | stack << 32
            | PRESENT_INTERRUPT << 40
            | (at >> 16 & 0xffff) << 48;
        Gate { low, high: at >> 32 }
    }
}

/// The interrupt table, which all cores share.
pub struct InterruptTable(&'static [Gate; 256]);

impl InterruptTable {
    /// Handlers of exceptions, timer and wake-ups.
    pub fn new() -> InterruptTable {
        let mut gates = Box::new([Gate::EMPTY; 256]);
        for (gate, handler) in gates.iter_mut().zip(EXCEPTIONS) {
            *gate = Gate::new(handler as *const () as usize, 1);
        }
        for vector in [apic::TIMER_VECTOR, apic::WAKE_VECTOR] {
            gates[usize::from(vector)] = Gate::new(acknowledge as *const () as usize, 0);
        }
        gates[usize::from(apic::SPURIOUS_VECTOR)] = Gate::new(ignore as *const () as usize, 0);
        InterruptTable(Box::leak(gates))
    }

    /// Makes the core that this runs on use the table, and a descriptor table of its own.
    pub fn load(&self) {
        let tables = Box::leak(Box::new(CoreTables {
            // Code: long mode, executable; data: writable.
            descriptors: [0, 0x00af_9a00_0000_ffff, 0x00cf_9200_0000_ffff, 0, 0],
            task: Task {
                reserved: 0,
                stacks: [0; 3],
                reserved_2: 0,
                interrupt_stacks: [0; 7],
                reserved_3: 0,
                reserved_4: 0,
                io_map: size_of::<Task>() as u16,
            },
            stack: Stack([0; STACK_BYTES]),
        }));
        let stack_end = tables.stack.0.as_ptr_range().end as u64;
        tables.task.interrupt_stacks = [stack_end; 7];
        let task_at = (&raw const tables.task) as u64;
        const AVAILABLE_TASK: u64 = 0x89;
        tables.descriptors[3] = (size_of::<Task>() as u64 - 1)
            | (task_at & 0xff_ffff) << 16
            | AVAILABLE_TASK << 40
            | (task_at >> 24 & 0xff) << 56;
        tables.descriptors[4] = task_at >> 32;
        let descriptors = TablePointer {
            limit: size_of_val(&tables.descriptors) as u16 - 1,
            at: tables.descriptors.as_ptr() as u64,
        };
        let gates = TablePointer { limit: size_of_val(self.0) as u16 - 1, at: self.0.as_ptr() as u64 };
        // SAFETY: the tables live for ever; code and data selectors keep their meaning; the gates lead to handlers that
        // return with all registers as they were, or not at all.
        unsafe {
            asm!(
                "lgdt [{descriptors}]",
                "lidt [{gates}]",
                "push {code}",
                "lea {scratch}, [rip + 2f]",
                "push {scratch}",
                "retfq",
                "2:",
                "mov ss, {data:x}",
                "mov ds, {data:x}",
                "mov es, {data:x}",
                "ltr {task:x}",
                descriptors = in(reg) &descriptors,
                gates = in(reg) &gates,
                code = const CODE,
                data = in(reg) DATA,
                task = in(reg) TASK,
                scratch = out(reg) _,
            );
        }
    }
}

impl Default for InterruptTable {
    fn default() -> InterruptTable {
        InterruptTable::new()
    }
}

/// Sleeps until an interrupt, unless `go_on` holds; returns with interrupts off, as it was called.
///
/// The condition is read with interrupts off, and `sti` lets none in before `hlt`: an interrupt sent after the
/// condition's change cannot be missed.
pub fn wait(go_on: impl FnOnce() -> bool) {
    if go_on() {
        return;
    }
    // SAFETY: handlers return with all registers as they were. Not `nostack`: the compiler keeps its red zone away.
    unsafe { asm!("sti", "hlt", "cli") }
}

/// Acknowledges an interrupt, which has thereby done its work: to end a `hlt`.
#[unsafe(naked)]
extern "C" fn acknowledge() {
    naked_asm!(
        "push rax",
        "push rcx",
        "push rdx",
        "mov rax, [rip + {at}]",
        "test rax, rax",
        "jz 2f",
        "mov dword ptr [rax], 0",
        "jmp 3f",
        "2:",
        "xor eax, eax",
        "xor edx, edx",
        "mov ecx, 0x80b",
        "wrmsr",
        "3:",
        "pop rdx",
        "pop rcx",
        "pop rax",
        "iretq",
        at = sym END_OF_INTERRUPT_AT,
    )
}

/// A spurious interrupt is not acknowledged.
#[unsafe(naked)]
extern "C" fn ignore() {
    naked_asm!("iretq")
}

/// What the exception stubs leave on the stack.
#[repr(C)]
struct Frame {
    /// r15 … r8, rbp, rdi, rsi, rdx, rcx, rbx, rax.
    registers: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    flags: u64,
    rsp: u64,
    ss: u64,
}

/// Exceptions that push an error code: SDM volume 3, table 7-1.
const WITH_ERROR: u32 = 1 << 8 | 0b1_1111 << 10 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;

#[unsafe(naked)]
extern "C" fn exception<const VECTOR: u32>() {
    naked_asm!(
        ".if (({with_error} >> {vector}) & 1) == 0",
        "push 0",
        ".endif",
        "push {vector}",
        "jmp {common}",
        with_error = const WITH_ERROR,
        vector = const VECTOR,
        common = sym save_and_report,
    )
}

#[unsafe(naked)]
extern "C" fn save_and_report() {
    naked_asm!(
        "push rax", "push rbx", "push rcx", "push rdx", "push rsi", "push rdi", "push rbp",
        "push r8", "push r9", "push r10", "push r11", "push r12", "push r13", "push r14", "push r15",
        "cld",
        "mov rdi, rsp",
        "and rsp, -16",
        "call {report}",
        "ud2",
        report = sym report,
    )
}

macro_rules! exceptions {
    ($($vector:literal)*) => { [$(exception::<$vector>),*] };
}

const EXCEPTIONS: [extern "C" fn(); N_EXCEPTIONS] =
    exceptions!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);

fn name(vector: u64) -> &'static str {
    match vector {
        0 => "division by zero",
        2 => "non-maskable interrupt",
        3 => "breakpoint",
        6 => "invalid instruction",
        7 => "no vector unit",
        8 => "double fault",
        12 => "stack segment",
        13 => "general protection",
        14 => "page fault",
        16 => "x87 error",
        17 => "alignment",
        18 => "machine check",
        19 => "vector arithmetic",
        _ => "exception",
    }
}

extern "C" fn report(frame: &Frame) -> ! {
    begin_report(Exit::Fault);
    let at: u64;
    // SAFETY: reading CR2 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) at, options(nomem, nostack, preserves_flags)) }
    let Frame { registers, vector, error, rip, rsp, flags, .. } = frame;
    serial::last_words(format_args!(
        "\nfault: {} (vector {vector}, error {error:#x}) at rip {rip:#x}, address {at:#x}\n",
        name(*vector)
    ));
    serial::last_words(format_args!("rsp {rsp:#018x} flags {flags:#x}\n"));
    // In the order of `Frame::registers`.
    const NAMES: [&str; 15] = [
        "r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "rbp", "rdi", "rsi", "rdx", "rcx", "rbx", "rax",
    ];
    for (i, (name, value)) in NAMES.iter().zip(registers).enumerate() {
        let end = if i % 4 == 3 || i == 14 { '\n' } else { ' ' };
        serial::last_words(format_args!("{name:>3} {value:#018x}{end}"));
    }
    exit(Exit::Fault)
}
