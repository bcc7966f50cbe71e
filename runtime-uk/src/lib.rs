//! The driver path without libcuda: [`RemoteDriver`] is the engine's [`Driver`](gpu_kernels::driver::Driver) in a guest
//! that has no GPU, and sends what it is asked to a broker on the host (`uk-broker`) by the protocol of `uk-wire`.
//!
//! ```text
//! engine ── Driver ──> RemoteDriver ── Session: batch, ring, doorbell ──> Link ~~> broker ── Driver ──> libcuda, emulator
//!                                                     data: Window (guest RAM, which the broker maps)
//! ```
//!
//! Kernels are named, not sent: the broker has them ([`RemoteDriver`]'s `builtin` module). So a guest cannot make the host
//! run code of its own, and the image carries no PTX.
//!
//! Work is collected and goes out with one doorbell when a result is wanted; a decode step on a captured graph is one
//! doorbell. What fails meanwhile is reported by the call that waits, as asynchronous drivers do.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod link;
pub mod remote;
mod session;

pub use link::{Link, LinkError, Window};
pub use remote::RemoteDriver;
