//! `serve`: the HTTP API of a model over TCP.
//!
//! One thread waits for sockets and runs the batches between; the engine's own threads compute. All of HTTP is in the
//! crate `server`; here are sockets, the clock and signals. The first Ctrl-C or SIGTERM lets answers under way end,
//! the second ends the process.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use engine::{ContextParams, Model, Tokenizer};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use server::scheduler::Scheduler;
use server::{ConnectionId, Limits, Server, ServerConfig, Templates};

use crate::args::{self, ServeArgs};
use crate::chat::{Format, Message};
use crate::exit::usage;
use crate::load::{self, Loaded};
use crate::{machine, ui};

/// Longest wait without looking at the clock and at signals.
const WAIT: Duration = Duration::from_millis(200);

/// Bytes read from a socket at once.
const READ_BYTES: usize = 64 << 10;

/// Reads from one socket before others get their turn.
const READS_IN_TURN: usize = 16;

/// How long a client may take to close its side after ours.
const LINGER: Duration = Duration::from_secs(2);

/// Sockets that may linger at a time, beside the server's connections.
const MAX_LINGERING: usize = 256;

/// Sockets that may become ready in one wait; more come in the next.
const EVENTS: usize = 256;

/// The listener's name among sockets; connections have others.
const LISTENER: Token = Token(usize::MAX);

/// The model's chat template, for the server.
struct Chat(Format);

impl Templates for Chat {
    fn encode(&self, messages: &[server::Message], tokenizer: &Tokenizer) -> Result<Vec<u32>, String> {
        let messages: Vec<_> = messages.iter().map(|m| Message::new(&m.role, m.content.as_str())).collect();
        self.0.encode(&messages, true, tokenizer).map_err(|e| format!("{e:#}"))
    }
}

/// `serve`.
pub fn run(args: &ServeArgs) -> Result<()> {
    if args.parallel == 0 {
        return Err(usage("-np 0: at least one request must be answered at a time"));
    }
    let interrupt = ui::watch_terminations()?;
    // Before the model is loaded: a port in use should not take that long to find out.
    let listener = listen(&args.host, args.port)?;
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() && args.api_key.is_none() {
        ui::say(format!("anybody who reaches {address} can use this server; set --api-key"));
    }
    let loaded = args.engine.open_with(&args.model, None, |model| match model.hparams().causal {
        true => ContextParams { n_seq: args.parallel, ..ContextParams::default() },
        false => for_embeddings(),
    })?;
    let model = loaded.model.clone();
    let (scheduler, embedder) = if model.hparams().causal {
        let embedder = args.embeddings.then(|| embedder(args, &loaded)).transpose()?;
        let n_batch = loaded.compute.batch_size(args.engine.batch_size);
        (Some(Scheduler::new(&model, loaded.context, args.parallel, n_batch)), embedder)
    } else {
        (None, Some(loaded.context))
    };
    let format = Format::of(&args.template, &model)?;
    let config = config(args, &model, scheduler.as_ref().map_or(0, Scheduler::n_ctx));
    ui::say(format!("serving {} at http://{address}", config.model_name));
    let server = Server::new(&model, scheduler, embedder, Box::new(Chat(format)), config);
    Host::new(server, listener)?.run(interrupt)
}

fn for_embeddings() -> ContextParams {
    ContextParams { embeddings: true, ..ContextParams::default() }
}

/// A context for embeddings beside the one that generates; on the CPU they share the weights.
fn embedder(args: &ServeArgs, loaded: &Loaded) -> Result<engine::Context> {
    let params = args.engine.params(&loaded.model, &loaded.compute, loaded.context.n_ctx(), for_embeddings());
    let threads = machine::threads(args.engine.threads)?;
    Ok(load::context(&loaded.model, params, &loaded.compute, threads)?.1)
}

fn config(args: &ServeArgs, model: &Model, n_ctx: usize) -> ServerConfig {
    let file_name = || args.model.file_stem().map(|n| n.to_string_lossy().into_owned());
    let name = args.alias.clone().or_else(file_name).unwrap_or_else(|| model.arch_name().into());
    let timeout_ms = args.timeout.saturating_mul(1000);
    let epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    ServerConfig {
        model_name: name,
        sampling: args.sampling.params(0, n_ctx),
        seed: (args.sampling.seed != -1).then_some(args.sampling.seed as u64),
        entropy: args::entropy(),
        max_tokens: usize::try_from(args.predict).ok().filter(|&n| n > 0),
        api_key: args.api_key.clone(),
        epoch_s: epoch.as_secs(),
        limits: Limits { request_ms: timeout_ms, write_ms: timeout_ms, ..Limits::default() },
    }
}

fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let what = || format!("listening on {host}:{port}");
    let addresses: Vec<SocketAddr> = match host.parse::<IpAddr>() {
        Ok(ip) => vec![SocketAddr::new(ip, port)],
        Err(_) => (host, port).to_socket_addrs().with_context(what)?.collect(),
    };
    let address = addresses.first().with_context(|| format!("{host} has no address"))?;
    TcpListener::bind(*address).with_context(what)
}

/// The server and its sockets.
struct Host<'m> {
    server: Server<'m>,
    poll: Poll,
    /// None once no new client is taken.
    listener: Option<TcpListener>,
    sockets: BTreeMap<ConnectionId, TcpStream>,
    /// Ended by us, not yet closed by the client.
    lingering: Vec<(TcpStream, Instant)>,
    started: Instant,
    buffer: Vec<u8>,
}

impl<'m> Host<'m> {
    fn new(server: Server<'m>, mut listener: TcpListener) -> Result<Host<'m>> {
        let poll = Poll::new()?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        Ok(Host {
            server,
            poll,
            listener: Some(listener),
            sockets: BTreeMap::new(),
            lingering: Vec::new(),
            started: Instant::now(),
            buffer: vec![0; READ_BYTES],
        })
    }

    /// Serves until `interrupt` and the end of what is under way then.
    fn run(mut self, interrupt: &AtomicBool) -> Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        // Whether a socket may have more than was read in its turn.
        let mut more = false;
        loop {
            let wait = if self.server.has_work() || more { Duration::ZERO } else { WAIT };
            match self.poll.poll(&mut events, Some(wait)) {
                Err(e) if e.kind() != ErrorKind::Interrupted => return Err(e).context("waiting for sockets"),
                _ => {}
            }
            // Whoever connects behind it is refused, and may find another server.
            if interrupt.load(Ordering::Relaxed) && self.listener.take().is_some() {
                ui::say("no new requests; answers under way end first (a second signal: at once)");
                self.server.drain();
            }
            self.accept()?;
            more = self.read_all();
            if self.server.has_work() {
                let started = self.started;
                self.server.step(&|| millis(started));
            }
            self.server.tick(millis(self.started));
            self.write_all();
            self.let_go();
            if self.listener.is_none() && self.sockets.is_empty() && self.lingering.is_empty() {
                return Ok(());
            }
        }
    }

    fn accept(&mut self) -> Result<()> {
        while let Some(listener) = &self.listener {
            let mut socket = match listener.accept() {
                Ok((socket, _)) => socket,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The client is gone already, or there are no descriptors: the others go on.
                Err(e) => {
                    ui::detail(format!("a connection could not be accepted: {e}"));
                    return Ok(());
                }
            };
            // Too many: the client sees the connection end.
            let Some(id) = self.server.open(millis(self.started)) else { continue };
            // Tokens are small; they must not wait for each other.
            let _ = socket.set_nodelay(true);
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut socket, Token(id as usize), interest)?;
            self.sockets.insert(id, socket);
        }
        Ok(())
    }

    /// Reads what there is, a bounded amount from each; whether some may have more.
    fn read_all(&mut self) -> bool {
        let now = millis(self.started);
        let (mut gone, mut more) = (Vec::new(), false);
        for (&id, socket) in &mut self.sockets {
            for turn in 0.. {
                if !self.server.wants_bytes(id) {
                    break;
                }
                if turn == READS_IN_TURN {
                    more = true;
                    break;
                }
                match socket.read(&mut self.buffer) {
                    Ok(0) => self.server.end_of_input(id),
                    Ok(n) => self.server.receive(id, &self.buffer[..n], now),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(_) => {
                        gone.push(id);
                        break;
                    }
                }
            }
        }
        gone.into_iter().for_each(|id| self.hang_up(id));
        more
    }

    fn write_all(&mut self) {
        let ids: Vec<_> = self.sockets.keys().copied().collect();
        for id in ids {
            if !self.write(id) || self.server.is_done(id) {
                self.hang_up(id);
            }
        }
    }

    /// Writes what the socket takes; false if it is broken.
    fn write(&mut self, id: ConnectionId) -> bool {
        let Some(socket) = self.sockets.get_mut(&id) else { return false };
        while !self.server.output(id).is_empty() {
            match socket.write(self.server.output(id)) {
                Ok(0) => return false,
                Ok(n) => self.server.sent(id, n, millis(self.started)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Ends a connection. Closing a socket with unread bytes is a reset, which can take the answer with it (413 comes
    /// before the body's end), so it lingers: what comes is read and forgotten until the client closes too.
    fn hang_up(&mut self, id: ConnectionId) {
        self.server.close(id);
        if let Some(socket) = self.sockets.remove(&id) {
            // Fails where the client has closed already.
            let _ = socket.shutdown(Shutdown::Write);
            // Beyond, an answer may be lost: whoever ends so many connections at once is no ordinary client.
            if self.lingering.len() < MAX_LINGERING {
                self.lingering.push((socket, Instant::now() + LINGER));
            }
        }
    }

    fn let_go(&mut self) {
        let (now, buffer) = (Instant::now(), &mut self.buffer);
        let mut waits = |socket: &mut TcpStream| {
            // Bounded, as each read is of all reads in turn.
            let mut reads = (0..READS_IN_TURN).map(|_| socket.read(buffer));
            let last = reads.find(|read| !matches!(read, Ok(n) if *n > 0));
            last.is_none_or(|read| read.is_err_and(|e| e.kind() == ErrorKind::WouldBlock))
        };
        self.lingering.retain_mut(|(socket, until)| now < *until && waits(socket));
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
