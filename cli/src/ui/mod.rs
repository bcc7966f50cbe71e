//! The terminal: what is said on stderr, what goes to stdout, progress bars, Ctrl-C.

use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::exit::NoReader;

static VERBOSE: AtomicBool = AtomicBool::new(false);

/// Sets whether [`detail`] says anything.
pub fn set_verbose(on: bool) {
    VERBOSE.store(on, Ordering::Relaxed);
}

/// Whether the user wants details.
pub fn verbose() -> bool {
    VERBOSE.load(Ordering::Relaxed)
}

/// A line on stderr that nobody should miss. Control characters of foreign text cannot act on the terminal.
pub fn say(message: impl Display) {
    // Nothing can be done about a closed stderr.
    let _ = writeln!(std::io::stderr(), "runik: {}", one_line(&message.to_string()));
}

/// A line on stderr for `--verbose`.
pub fn detail(message: impl Display) {
    if verbose() {
        say(message);
    }
}

/// The line that ends a failed command.
pub fn error(message: &str) {
    say(format!("error: {message}"));
}

fn one_line(message: &str) -> String {
    message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Writes data to stdout, at once.
pub fn out(data: impl AsRef<[u8]>) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(data.as_ref()).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => NoReader.into(),
        _ => anyhow::Error::new(error).context("stdout"),
    })
}

/// Writes a value to stdout as one line of JSON.
pub fn json(value: &serde_json::Value) -> Result<()> {
    out(format!("{value}\n"))
}

/// Whether stderr may show bars. Nothing is coloured, so `NO_COLOR` has nothing to turn off.
pub fn fancy() -> bool {
    let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
    std::io::stderr().is_terminal() && !dumb
}

/// A bar over bytes; hidden unless stderr is a terminal.
pub fn bytes_bar(total: u64, what: &str) -> ProgressBar {
    let target = if fancy() { ProgressDrawTarget::stderr_with_hz(10) } else { ProgressDrawTarget::hidden() };
    let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(total), target).with_style(style).with_message(what.to_owned())
}

/// Set by Ctrl-C once [`watch_interrupts`] was called; a second Ctrl-C ends the process with status 130.
pub fn watch_interrupts() -> Result<&'static AtomicBool> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    watch(&FLAG, &[signal_hook::consts::SIGINT])
}

/// Set by Ctrl-C and by SIGTERM, what service managers send; a second one of either ends the process.
pub fn watch_terminations() -> Result<&'static AtomicBool> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    watch(&FLAG, &[signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM])
}

fn watch(once: &'static OnceLock<Arc<AtomicBool>>, signals: &[i32]) -> Result<&'static AtomicBool> {
    if let Some(flag) = once.get() {
        return Ok(flag);
    }
    let flag = Arc::new(AtomicBool::new(false));
    for &signal in signals {
        // In this order: the first signal finds the flag down, sets it and goes on. The status is a shell's.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, flag.clone())?;
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(once.get_or_init(|| flag))
}

/// Bytes with a unit, powers of 1024.
pub fn bytes(n: impl TryInto<u64>) -> String {
    let n = n.try_into().unwrap_or(u64::MAX);
    let (value, unit) = match n {
        0..1024 => return format!("{n} B"),
        1024..0x10_0000 => (n as f64 / 1024.0, "KiB"),
        0x10_0000..0x4000_0000 => (n as f64 / 1048576.0, "MiB"),
        _ => (n as f64 / 1073741824.0, "GiB"),
    };
    format!("{value:.2} {unit}")
}

/// Milliseconds, to the microsecond.
pub fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
