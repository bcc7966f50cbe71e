//! The command line: words `name=value`, parted by blanks; double quotes keep blanks together, a backslash takes the next
//! character as it is (`\n` is a new line).
//!
//! A word that is no option of ours is named in the log and left alone: VMMs add words for Linux. A known name with a
//! value that makes no sense is an error, because running with a guess would be worse.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::net::Ipv4Addr;

use crate::memory::Range;

/// Where the model comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ModelSource {
    /// The first of the others that there is.
    #[default]
    Auto,
    /// A file that the boot loader put into memory.
    Module,
    /// A virtio-pmem device: a file of the host, mapped.
    Pmem,
    /// A virtio-blk device, read into memory.
    Disk,
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ModelSource::Auto => "auto",
            ModelSource::Module => "module",
            ModelSource::Pmem => "pmem",
            ModelSource::Disk => "disk",
        })
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The machine's cores.
    #[default]
    Cpu,
    /// A GPU behind a broker on the host.
    Gpu,
}

/// The network address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Address {
    /// From a DHCP server.
    #[default]
    Dhcp,
    /// This one.
    Fixed {
        /// Our address.
        ip: Ipv4Addr,
        /// Bits of the network's part.
        prefix: u8,
        /// Where packets to other networks go.
        gateway: Option<Ipv4Addr>,
    },
}

/// Everything that the command line can set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `model=auto|module|pmem|disk`
    pub model: ModelSource,
    /// `device=cpu|gpu`
    pub device: Device,
    /// `threads=N`: cores to compute on; all if not given.
    pub threads: Option<usize>,
    /// `ctx=N`: positions per sequence.
    pub n_ctx: usize,
    /// `parallel=N`: sequences at once.
    pub n_seq: usize,
    /// `batch=N`: tokens computed at once; what suits the device if not given.
    pub n_batch: Option<usize>,
    /// `prompt="…"`: answered on the serial line before anything is served.
    pub prompt: Option<String>,
    /// `predict=N`: tokens of that answer.
    pub n_predict: usize,
    /// `exit`: end after the answer, serve nothing.
    pub exit: bool,
    /// `port=N`
    pub port: u16,
    /// `ip=dhcp` or `ip=ADDRESS/BITS[,GATEWAY]`
    pub address: Address,
    /// `alias=NAME`: the model's name for clients.
    pub alias: Option<String>,
    /// `key=TEXT`: what clients must send as a bearer token.
    pub api_key: Option<String>,
    /// `chat=NAME`: the chat format, if it is not to be that of the model's own template.
    pub chat: Option<String>,
    /// `embeddings`: compute them too, with a model that generates text.
    pub embeddings: bool,
    /// `debug`: say more.
    pub debug: bool,
    /// `selftest=NAME`: break the machine on purpose, for tests of what happens then.
    pub selftest: Option<String>,
    /// `virtio_mmio.device=SIZE@ADDRESS:IRQ`, as microVMs announce their devices.
    pub mmio: Vec<Range>,
    /// Words that are none of these.
    pub unknown: Vec<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            model: ModelSource::Auto,
            device: Device::Cpu,
            threads: None,
            n_ctx: 4096,
            n_seq: 4,
            n_batch: None,
            prompt: None,
            n_predict: 64,
            exit: false,
            port: 8080,
            address: Address::Dhcp,
            alias: None,
            api_key: None,
            chat: None,
            embeddings: false,
            debug: false,
            selftest: None,
            mmio: Vec::new(),
            unknown: Vec::new(),
        }
    }
}

/// A value that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionError {
    /// The option's name.
    pub name: String,
    /// Its value.
    pub value: String,
    /// What it may be.
    pub expected: &'static str,
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command line: {}={:?}, expected {}", self.name, self.value, self.expected)
    }
}

impl core::error::Error for OptionError {}

impl Options {
    /// Reads a command line. Bytes that are no UTF-8 become U+FFFD.
    pub fn parse(line: &[u8]) -> Result<Options, OptionError> {
        let mut options = Options::default();
        for word in words(&String::from_utf8_lossy(line)) {
            let (name, value) = word.split_once('=').unwrap_or((&word, ""));
            options.set(name, value, &word)?;
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str, word: &str) -> Result<(), OptionError> {
        let bad = |expected| OptionError { name: name.to_string(), value: value.to_string(), expected };
        match name {
            "model" => {
                self.model = match value {
                    "auto" => ModelSource::Auto,
                    "module" => ModelSource::Module,
                    "pmem" => ModelSource::Pmem,
                    "disk" => ModelSource::Disk,
                    _ => return Err(bad("auto, module, pmem or disk")),
                }
            }
            "device" => {
                self.device = match value {
                    "cpu" => Device::Cpu,
                    "gpu" => Device::Gpu,
                    _ => return Err(bad("cpu or gpu")),
                }
            }
            "threads" => {
                self.threads = Some(number(value, 1, 255).ok_or_else(|| bad("a number from 1 to 255"))?);
            }
            "ctx" => self.n_ctx = number(value, 1, 1 << 24).ok_or_else(|| bad("a number from 1 to 2^24"))?,
            "parallel" => {
                self.n_seq = number(value, 1, 256).ok_or_else(|| bad("a number from 1 to 256"))?;
            }
            "batch" => {
                self.n_batch = Some(number(value, 1, 1 << 16).ok_or_else(|| bad("a number from 1 to 2^16"))?);
            }
            "prompt" => self.prompt = Some(value.to_string()),
            "predict" => {
                self.n_predict = number(value, 0, 1 << 24).ok_or_else(|| bad("a number up to 2^24"))?;
            }
            "exit" => self.exit = true,
            "port" => {
                let port = number(value, 1, 65_535).ok_or_else(|| bad("a number from 1 to 65535"))?;
                self.port = port as u16;
            }
            "ip" => self.address = address(value).ok_or_else(|| bad("dhcp or ADDRESS/BITS[,GATEWAY]"))?,
            "alias" => self.alias = Some(value.to_string()),
            "key" => self.api_key = Some(value.to_string()),
            "chat" => self.chat = Some(value.to_string()),
            "embeddings" => self.embeddings = true,
            "debug" => self.debug = true,
            "selftest" => self.selftest = Some(value.to_string()),
            "virtio_mmio.device" => {
                self.mmio.push(mmio(value).ok_or_else(|| bad("SIZE@ADDRESS:IRQ"))?);
            }
            _ => self.unknown.push(word.to_string()),
        }
        Ok(())
    }
}

fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' => {
                let escaped = match chars.next() {
                    Some('n') => '\n',
                    Some(other) => other,
                    None => '\\',
                };
                word.get_or_insert_default().push(escaped);
            }
            c if c.is_ascii_whitespace() && !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

fn number(text: &str, min: usize, max: usize) -> Option<usize> {
    text.parse().ok().filter(|n| (min..=max).contains(n))
}

fn address(text: &str) -> Option<Address> {
    if text == "dhcp" {
        return Some(Address::Dhcp);
    }
    let (ours, gateway) = match text.split_once(',') {
        Some((ours, gateway)) => (ours, Some(gateway.parse().ok()?)),
        None => (text, None),
    };
    let (ip, prefix) = ours.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|bits| *bits <= 32)?;
    Some(Address::Fixed { ip: ip.parse().ok()?, prefix, gateway })
}

/// Linux's documentation, kernel-parameters: `<size>@<baseaddr>:<irq>[:<id>]`, the size with a suffix K, M or G.
fn mmio(text: &str) -> Option<Range> {
    let (size, rest) = text.split_once('@')?;
    let start = rest.split(':').next()?;
    let (digits, shift) = match size.as_bytes().last()? {
        b'K' | b'k' => (&size[..size.len() - 1], 10),
        b'M' | b'm' => (&size[..size.len() - 1], 20),
        _ => (size, 0),
    };
    let integer = |text: &str| match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    let range = Range { start: integer(start)?, len: integer(digits)?.checked_shl(shift)? };
    let fits = range.start != 0 && range.len >= 0x100 && range.start.checked_add(range.len)? < 1 << 32;
    fits.then_some(range)
}

/// The options in one line, for the log.
impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads = self.threads.map_or(String::from("all"), |n| format!("{n}"));
        write!(
            f,
            "model={} device={:?} threads={threads} ctx={} parallel={} port={}",
            self.model, self.device, self.n_ctx, self.n_seq, self.port
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn a_whole_line() {
        let line = br#"model=pmem  threads=2 batch=8 chat=llama3 embeddings alias=a key="b c" prompt="Once \"upon\"\na time" "predict=7" exit ip=10.0.2.15/24,10.0.2.2 virtio_mmio.device=512@0xfeb00e00:12 pci=off"#;
        let options = Options::parse(line).unwrap();
        let expected = Options {
            model: ModelSource::Pmem,
            threads: Some(2),
            n_batch: Some(8),
            chat: Some("llama3".into()),
            embeddings: true,
            alias: Some("a".into()),
            api_key: Some("b c".into()),
            prompt: Some("Once \"upon\"\na time".into()),
            n_predict: 7,
            exit: true,
            address: Address::Fixed {
                ip: Ipv4Addr::new(10, 0, 2, 15),
                prefix: 24,
                gateway: Some(Ipv4Addr::new(10, 0, 2, 2)),
            },
            mmio: vec![Range { start: 0xfeb0_0e00, len: 512 }],
            unknown: vec!["pci=off".into()],
            ..Options::default()
        };
        assert_eq!(options, expected);
        assert_eq!(Options::parse(b"").unwrap(), Options::default());
    }

    #[test]
    fn values_without_sense_are_errors() {
        for line in [
            "model=floppy",
            "device=tpu",
            "threads=0",
            "threads=x",
            "ctx=",
            "port=65536",
            "ip=10.0.0.1",
            "ip=10.0.0.1/33",
            "ip=1.2.3.4/24,x",
            "virtio_mmio.device=4K@0:1",
            "virtio_mmio.device=9@0xfeb00000:1",
            "predict=-1",
            "parallel=0",
            "batch=0",
            "virtio_mmio.device=18446744073709551615K@1:1",
        ] {
            let error = Options::parse(line.as_bytes()).unwrap_err();
            assert_eq!(error.name, line.split_once('=').unwrap().0);
        }
    }

    #[test]
    fn any_bytes_are_read() {
        for line in [&b"\"abc"[..], b"\\", b"=", b"\xff=\xfe \"\" a=\"b c"] {
            Options::parse(line).unwrap();
        }
        assert_eq!(words("a\"b c\"d  \"\""), ["ab cd", ""]);
    }
}
