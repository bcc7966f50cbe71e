//! The loop of a serving image: packets in, one batch, packets out, and sleep when there is nothing to do. All of HTTP is
//! in the crate `server`, the same as the hosted program's.

use alloc::borrow::ToOwned;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::error::Error;

use engine::sampler::SamplerParams;
use engine::{Model, Tokenizer};
use server::chat::ChatFormat;
use server::{ConnectionId, Limits, Message, Server, ServerConfig, Templates};
use uk_kernel::devices::Devices;
use uk_kernel::machine::Machine;
use uk_kernel::net::{Network, SOCKETS, Service};
use uk_kernel::options::Options;
use uk_kernel::{clock, rtc, say};

/// Memory that runs out ends the machine, so clients get less of it than a host gives them: with all sockets in use, at
/// most 64 times these. A body holds a prompt of some 60,000 tokens.
const BODY_BYTES: usize = 256 << 10;
const OUTPUT_BYTES: usize = 256 << 10;
const ANSWER_BYTES: usize = 1 << 20;

/// The format for models without a template, a guess that the log names as one.
const FALLBACK: &str = "chatml";

/// Why there is nothing to serve.
#[derive(Debug)]
pub struct UnknownChat {
    name: String,
}

impl core::fmt::Display for UnknownChat {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let names: Vec<_> = ChatFormat::names().collect();
        write!(f, "command line: chat={:?}, expected one of {}", self.name, names.join(", "))
    }
}

impl Error for UnknownChat {}

/// Conversations of a model whose template is of no format that is known here.
struct NoFormat;

impl Templates for NoFormat {
    fn encode(&self, _: &[Message], _: &Tokenizer) -> Result<Vec<u32>, String> {
        Err("this image does not know the format of the model's chat template; start it with chat=NAME, or use \
             /v1/completions"
            .to_owned())
    }
}

/// The chat format that the command line or the model's template says.
pub fn templates(options: &Options, model: &Model) -> Result<Box<dyn Templates>, UnknownChat> {
    let template = model.meta().chat_template.as_deref();
    let (found, why) = match (&options.chat, template) {
        (Some(name), _) => (ChatFormat::named(name), "as told"),
        (None, Some(template)) => (ChatFormat::detect(template), "as the model's template"),
        (None, None) => (ChatFormat::named(FALLBACK), "a guess: the model has no template; chat=NAME"),
    };
    match (found, &options.chat) {
        (Some(format), _) => {
            say!("chat format {} ({why})", format.name);
            Ok(Box::new(format))
        }
        (None, Some(name)) => Err(UnknownChat { name: name.clone() }),
        (None, None) => {
            say!("no chats: the model's template is of no known format; chat=NAME chooses one");
            Ok(Box::new(NoFormat))
        }
    }
}

/// What the server is told.
pub fn config(options: &Options, model: &Model) -> ServerConfig {
    let name = options.alias.as_deref().or(model.meta().name.as_deref());
    let up_s = clock::now().as_secs();
    ServerConfig {
        model_name: name.unwrap_or(model.arch_name()).to_owned(),
        sampling: SamplerParams::default(),
        seed: None,
        // Differs from boot to boot.
        entropy: clock::ticks(),
        max_tokens: None,
        api_key: options.api_key.clone(),
        epoch_s: rtc::read().map_or(0, |now| now.saturating_sub(up_s)),
        limits: Limits {
            body_bytes: BODY_BYTES,
            output_bytes: OUTPUT_BYTES,
            answer_bytes: ANSWER_BYTES,
            connections: SOCKETS,
            queue: SOCKETS,
            ..Limits::default()
        },
    }
}

/// Serves until the machine is switched off.
pub fn serve(machine: &Machine, devices: &mut Devices, server: Server<'_>) -> Result<(), Box<dyn Error>> {
    let Some(card) = devices.network.pop() else {
        say!("no network card: nothing to serve");
        return Ok(());
    };
    let port = machine.options.port;
    let mut network = Network::new(card, machine.options.address, port)
        .map_err(|error| format!("the network card: {error}"))?;
    say!("listening on port {port} after {} ms", clock::now().as_millis());
    let mut clients = Clients { server, ids: alloc::vec![None; SOCKETS] };
    loop {
        let moved = network.poll(&mut clients);
        let works = clients.server.has_work();
        if works {
            clients.server.step(&now_ms);
        }
        clients.server.tick(now_ms());
        if !moved && !works {
            machine.sleep(network.next_poll(), || false);
        }
    }
}

fn now_ms() -> u64 {
    clock::now().as_millis() as u64
}

/// The server, and its name for the connection on each socket; none where it wants none.
struct Clients<'m> {
    server: Server<'m>,
    ids: Vec<Option<ConnectionId>>,
}

impl Service for Clients<'_> {
    fn open(&mut self, connection: usize) {
        self.ids[connection] = self.server.open(now_ms());
    }

    fn receive(&mut self, connection: usize, bytes: &[u8]) -> usize {
        match self.ids[connection] {
            Some(id) if self.server.wants_bytes(id) => self.server.receive(id, bytes, now_ms()),
            // The last answer waits for the peer; so does what it sends meanwhile.
            Some(id) if !self.server.is_done(id) => return 0,
            // Closing with bytes unread would be a reset, which can take the answer with it.
            _ => {}
        }
        bytes.len()
    }

    fn end_of_input(&mut self, connection: usize) {
        if let Some(id) = self.ids[connection] {
            self.server.end_of_input(id);
        }
    }

    fn transmit(&mut self, connection: usize, room: &mut [u8]) -> usize {
        let Some(id) = self.ids[connection] else { return 0 };
        let output = self.server.output(id);
        let n = output.len().min(room.len());
        room[..n].copy_from_slice(&output[..n]);
        self.server.sent(id, n, now_ms());
        n
    }

    fn finished(&self, connection: usize) -> bool {
        self.ids[connection].is_none_or(|id| self.server.is_done(id))
    }

    fn closed(&mut self, connection: usize) {
        if let Some(id) = self.ids[connection].take() {
            self.server.close(id);
        }
    }
}
