//! From the boot loader to Rust: 32-bit protected mode without paging, by PVH or multiboot2, to long mode on page tables
//! that map the first 4 GiB at their addresses; and the same way for the other cores, from real mode.
//!
//! The page tables here allow everything; the kernel crate replaces them. Vector registers are enabled as far as the CPU
//! has them (XCR0), because the engine asks XCR0 what it may use.

use core::arch::global_asm;

use uk_kernel::boot::{MULTIBOOT2, PVH};
use uk_kernel::machine::{Image, STACK_STRIDE, STACKS, WORKERS, worker};
use uk_kernel::memory::Range;

/// Bytes of the first stack. The engine's kernels keep scratch memory on the heap; parsing and planning are what is deep.
const STACK_BYTES: usize = 512 << 10;

global_asm!(
    r#"
.section .bss.entry, "aw", @nobits
.balign 4096
entry_level4: .skip 4096
entry_level3: .skip 4096
entry_level2: .skip 4096 * 4
.globl entry_stack_guard
entry_stack_guard: .skip 4096
entry_stack: .skip {stack_bytes}
entry_stack_end:

// The PVH note: a physical 32-bit entry (Xen's elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY = 18).
.section .note.Xen, "a", @note
.balign 4
  .long 4
  .long 4
  .long 18
  .asciz "Xen"
  .long entry_pvh

// The multiboot2 header: magic, i386, length, checksum; the entry address; where modules go; the end.
.section .multiboot2, "a"
.balign 8
multiboot2_header:
  .long 0xe85250d6, 0, multiboot2_end - multiboot2_header
  .long -(0xe85250d6 + (multiboot2_end - multiboot2_header))
  .short 3, 0
  .long 12, entry_multiboot2, 0
  // Modules begin on pages.
  .short 6, 0
  .long 8
  .short 0, 0
  .long 8
multiboot2_end:

.section .data.entry, "aw"
.balign 8
entry_descriptors:
  .quad 0
  .quad 0x00af9a000000ffff
  .quad 0x00cf92000000ffff
entry_descriptor_table:
  .word 23
  .long entry_descriptors
  .long 0

.section .text.entry, "ax"
// An ELF needs an entry; nobody enters here.
.globl entry_elf
entry_elf: ud2

.code32
entry_pvh:
  mov eax, {pvh}
entry_multiboot2:
  cli
  cld
  // What the loader left: esi and ebp survive all below.
  mov esi, eax
  mov ebp, ebx
  lea esp, [entry_stack_end]
  // 4 GiB in pages of 2 MiB.
  lea eax, [entry_level3 + 3]
  mov [entry_level4], eax
  lea eax, [entry_level2 + 3]
  lea edi, [entry_level3]
  mov ecx, 4
2:
  mov [edi], eax
  add eax, 4096
  add edi, 8
  dec ecx
  jnz 2b
  lea edi, [entry_level2]
  mov eax, 0x83
  mov ecx, 2048
3:
  mov [edi], eax
  add edi, 8
  add eax, 0x200000
  dec ecx
  jnz 3b
  // The first core has number 0 in edi; the others come here with theirs plus one.
  xor edi, edi
entry_long_mode:
  lea eax, [entry_level4]
  mov cr3, eax
  // PAE, global pages, SSE and its exceptions.
  mov eax, cr4
  or eax, 0x6a0
  mov cr4, eax
  // Long mode, no-execute.
  mov ecx, 0xc0000080
  rdmsr
  or eax, 0x900
  wrmsr
  // No emulation, caches on; paging, write protection also for ring 0, native FPU errors.
  mov eax, cr0
  and eax, 0x9ffffff3
  or eax, 0x80010022
  mov cr0, eax
  lgdt [entry_descriptor_table]
  // A far jump into 64-bit code: selector 8.
  .byte 0xea
  .long entry_64
  .word 8

.code64
entry_64:
  mov ax, 16
  mov ds, ax
  mov es, ax
  mov ss, ax
  xor eax, eax
  mov fs, ax
  mov gs, ax
  // XSAVE, and in XCR0 what there is of x87, SSE, AVX and AVX-512.
  mov eax, 1
  cpuid
  bt ecx, 26
  jnc 4f
  mov rax, cr4
  or rax, 0x40000
  mov cr4, rax
  mov eax, 0xd
  xor ecx, ecx
  cpuid
  and eax, 0xe7
  xor edx, edx
  xor ecx, ecx
  xsetbv
4:
  test edi, edi
  jnz 5f
  lea rsp, [rip + entry_stack_end]
  mov edi, esi
  mov esi, ebp
  xor ebp, ebp
  call {main}
  ud2
5:
  // Another core: a number, and the stack that goes with it.
  mov edi, 1
  lock xadd [rip + {workers}], edi
  mov eax, edi
  inc rax
  imul rax, rax, {stack_stride}
  add rax, [rip + {stacks}]
  mov rsp, rax
  xor ebp, ebp
  call {worker}
  ud2

// Start code of the other cores, copied below 1 MiB and entered in real mode with cs = page: to protected mode, then
// the way above.
.section .rodata.entry, "a"
.globl entry_trampoline
entry_trampoline:
.code16
  cli
  mov ax, cs
  mov ds, ax
  // lgdt with a 32-bit base, and a far jump to selector 8: encoded by hand, as offsets from the page.
  .byte 0x66, 0x0f, 0x01, 0x16
  .word entry_trampoline_table - entry_trampoline
  mov eax, cr0
  or eax, 1
  mov cr0, eax
  .byte 0x66, 0xea
  .long entry_32
  .word 8
.balign 8
entry_trampoline_table:
  .word 23
  .long entry_trampoline_descriptors
  .balign 8
.globl entry_trampoline_end
entry_trampoline_end:
// 32-bit code and data, read at its linked address: physical memory still.
entry_trampoline_descriptors:
  .quad 0
  .quad 0x00cf9a000000ffff
  .quad 0x00cf92000000ffff

.section .text.entry, "ax"
.code32
entry_32:
  mov ax, 16
  mov ds, ax
  mov es, ax
  mov ss, ax
  mov edi, 1
  jmp entry_long_mode
.code64
.text
"#,
    stack_bytes = const STACK_BYTES,
    pvh = const PVH,
    main = sym crate::main,
    worker = sym worker,
    workers = sym WORKERS,
    stacks = sym STACKS,
    stack_stride = const STACK_STRIDE,
);

// The entry code passes on what multiboot2 put into eax.
const _: () = assert!(MULTIBOOT2 == 0x36d7_6289);

unsafe extern "C" {
    static image_text: u8;
    static image_text_end: u8;
    static image_rodata: u8;
    static image_rodata_end: u8;
    static image_data: u8;
    static image_end: u8;
    static entry_stack_guard: u8;
    static entry_trampoline: u8;
    static entry_trampoline_end: u8;
}

/// Where the linker put everything.
pub fn image() -> Image {
    let range = |from: *const u8, to: *const u8| {
        let start = from.expose_provenance() as u64;
        Range { start, len: to.expose_provenance() as u64 - start }
    };
    // SAFETY: the linker script defines these around sections that exist; only addresses are taken, but for the start
    // code, which is constant.
    unsafe {
        let code = range(&raw const entry_trampoline, &raw const entry_trampoline_end);
        Image {
            text: range(&raw const image_text, &raw const image_text_end),
            rodata: range(&raw const image_rodata, &raw const image_rodata_end),
            data: range(&raw const image_data, &raw const image_end),
            stack_guard: (&raw const entry_stack_guard).expose_provenance() as u64,
            trampoline: core::slice::from_raw_parts(&raw const entry_trampoline, code.len as usize),
        }
    }
}
