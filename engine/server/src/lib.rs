//! The HTTP API of one model, without I/O: whoever has sockets feeds bytes in, takes bytes out and calls
//! [`Server::step`]. `runik serve` does so with std sockets; an image does the same with its own network stack.
//!
//! ```text
//! bytes -> http::Reader -> api (JSON -> typed request) -> Scheduler (one batch a step for all) -> reply -> bytes
//! ```
//!
//! Nothing here reads a clock, an environment or a socket. What comes from outside is checked once, in `http` and `api`;
//! no input can cause a panic, and each buffer has a bound in [`Limits`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod api;
pub mod chat;
mod config;
pub mod error;
pub mod http;
mod metrics;
mod output;
mod reply;
pub mod scheduler;
mod server;

pub use config::{Limits, ServerConfig};
pub use error::ApiError;
pub use server::{ConnectionId, Message, Server, Templates};
