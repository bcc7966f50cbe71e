//! What the image needs of an operating system, and no more: memory, cores, time, devices, a network, a log.
//!
//! The machine is one address space in ring 0. Memory is mapped at its physical addresses, nothing is both writable and
//! executable ([`paging`]). One core runs the program and polls the devices; the others are an
//! [`Executor`](engine::Executor) ([`cores`]). Interrupts only end a `hlt` ([`fault`]). The entry code and what the
//! compiler needs of a C library are in the image crate, so that this one is an ordinary library with ordinary tests.
//!
//! Trust: the VMM and the boot loader may do anything to us anyway; what they say is checked so that a mistake of theirs
//! ends in a message. Bytes of the network and of the model are hostile; they are the concern of smoltcp, `gguf` and the
//! server.
#![cfg_attr(not(test), no_std)]
#![cfg(target_arch = "x86_64")]

extern crate alloc;

pub mod acpi;
pub mod apic;
pub mod boot;
pub mod clock;
pub mod console;
pub mod cores;
pub mod cpu;
pub mod devices;
pub mod disk;
pub mod exit;
pub mod fault;
pub mod heap;
pub mod machine;
pub mod memory;
pub mod net;
pub mod options;
pub mod paging;
pub mod port;
pub mod rtc;
pub mod serial;
