//! The host's side of the GPU path: one process serves one guest, on any [`Driver`](gpu_kernels::driver::Driver).
//!
//! | file | what |
//! |---|---|
//! | `window.rs` | the guest's RAM, mapped and registered with the driver |
//! | `server.rs` | the protocol: greeting, submissions, replies |
//! | `device.rs` | one guest's share of the device: what is its own, and how much it may have |
//! | `privileges.rs` | what the process gives up before it listens to a guest |
//! | `metrics.rs` | counters, as text for Prometheus |
//!
//! A guest is not trusted. It names places in the window, memory it was given, and kernels of ours; everything is checked
//! against this process's own records before the driver sees it. What a guest breaks is its own broker: another guest has
//! another process, another context on the device, and no memory in common (docs/security.md).
#![deny(unsafe_code)]

pub mod device;
pub mod metrics;
#[allow(unsafe_code)]
pub mod privileges;
pub mod server;
#[allow(unsafe_code)]
pub mod window;

pub use device::Limits;
pub use server::{BrokerError, serve};
pub use window::GuestWindow;
